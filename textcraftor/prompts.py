"""The prompts to train on: read once per node from a csv, tsv, txt, jsonl, json or parquet file, of any size.

`prompt_formats` and `prompt_tables` read the files, `prompt_columns` finds the column. This module turns prompts into a
list or a memory-mapped file. It does not need torch.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from zlib import crc32

import numpy as np

from textcraftor.downloads import command
from textcraftor.errors import UserError
from textcraftor.files import write_whole
from textcraftor.prompt_formats import SUFFIXES, open_prompts
from textcraftor.prompt_tables import suffix_of

CHUNK = 100_000  # prompts that are written or checksummed at once


def check_prompts(path: Path | str) -> None:
    """Raise UserError unless `path` is a file of a format that read_prompts knows, by its name."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected one prompt file ({', '.join(SUFFIXES)})")
    if not path.is_file():
        raise UserError(
            f"{path}: no such prompt file; expected a csv with a column `prompt` (the paper uses krea.ai's Open "
            f"Prompts: {command('prompts')}), or any csv, tsv, txt, jsonl or parquet file of your own"
        )
    if suffix_of(path) not in SUFFIXES:
        raise UserError(f"{path}: unknown format for a prompt file; expected one of {', '.join(SUFFIXES)}")


def read_prompts(path: Path | str) -> tuple[list[str], dict]:
    """Read the distinct prompts of a file in their order, without leading and trailing spaces.

    Returns (prompts, report) with report = {"column": name of the column in use, None where the format has no columns,
    "empty": count, "duplicate": count, "bad": line numbers (in parquet and json arrays: row numbers, from 1)}. A row is
    bad if it is cut off, has misplaced quotation marks or too few or too many cells, or if its prompt is not text,
    contains a NUL or is not valid Unicode. Reading continues on the line after a bad row.

    Raises UserError, in one line, if the file is missing, cannot be read, or holds no prompts.
    """
    report = {}
    return list(_distinct_prompts(path, report)), report


def describe(path: Path | str, report: dict) -> str:
    """One line for the user: which column of the prompt file is used, and what was left out."""
    column = "" if report["column"] is None else f"reading the column `{report['column']}`; "
    counts = {"empty": report["empty"], "repeated": report["duplicate"], "bad": len(report["bad"])}
    dropped = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    first = f", the first bad one at line {report['bad'][0]}" if report["bad"] else ""
    return f"{path}: {column}rows left out: {dropped or 'none'}{first}"


class PromptFile(Sequence):
    """Prompts in a memory-mapped file: a sequence of strings that occupies no memory of its own.

    All processes that open the same file share its pages. Layout: every prompt in UTF-8 followed by a zero byte; where
    each begins, and where the last one ends, as int64; the number of prompts as int64.
    """

    def __init__(self, path: Path | str):
        self._bytes = np.memmap(path, np.uint8, "r")
        count = int(self._bytes[-8:].view(np.int64)[0])
        self._starts = self._bytes[-8 * (count + 2) : -8].view(np.int64)

    def __len__(self):
        return len(self._starts) - 1

    def __getitem__(self, index):
        """A prompt, or for a slice a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        index %= len(self)
        return self._bytes[self._starts[index] : self._starts[index + 1] - 1].tobytes().decode()

    @classmethod
    def write(cls, path: Path | str, prompts: Iterable[str]) -> "PromptFile":
        """Stream prompts (without NULs) to `path` without holding them in memory, then open that file."""
        prompts, starts, position = iter(prompts), array("q", [0]), 0
        with open(path, "wb") as file:
            while chunk := [prompt.encode() for prompt in islice(prompts, CHUNK)]:
                for text in chunk:
                    position += len(text) + 1
                    starts.append(position)
                file.write(b"\0".join([*chunk, b""]))
            file.write(bytes(-position % 8))  # the numbers begin at a multiple of their size
            starts.tofile(file)
            array("q", [len(starts) - 1]).tofile(file)
        return cls(path)


def checksum(prompts: Sequence[str]) -> int:
    """CRC-32 of all prompts in order, computed in chunks."""
    crc = 0
    for start in range(0, len(prompts), CHUNK):
        crc = crc32("\0".join([*prompts[start : start + CHUNK], ""]).encode(), crc)
    return crc


def read_training_prompts(
    path: Path | str, val_path: Path | str | None, val_count: int, file: Path | str
) -> tuple[PromptFile, list[str], dict[str, dict]]:
    """Write the training prompts of `path` to the new file `file` and return the held-out ones.

    The first `val_count` prompts of `val_path` are held out, or without it the first ones of `path`, at most half of
    them. Training never uses them. Returns (training prompts, held-out prompts, {path: report as of read_prompts}).
    Raises UserError as read_prompts does, and if no prompts are left for either.
    """
    reports = {str(path): {}}
    prompts = _distinct_prompts(path, reports[str(path)])
    if val_path:
        held_out, reports[str(val_path)] = read_prompts(val_path)
        held_out = held_out[:val_count]
        apart = set(held_out)
        rest = (prompt for prompt in prompts if prompt not in apart)
    else:
        first = list(islice(prompts, 2 * val_count))
        held_out = first[: len(first) // 2]
        rest = chain(first[len(held_out) :], prompts)
    training = PromptFile.write(file, rest)
    if not training or not held_out:
        raise UserError(
            f"{path}: {len(training)} prompts to train on and {len(held_out)} held out; both need at least one: use a "
            "file with more prompts, or hold out others with --val_prompts"
        )
    return training, held_out, reports


def _distinct_prompts(path: Path | str, report: dict) -> Iterator[str]:
    """Yield each prompt of a file once, keeping only 16 bytes of each; fill `report` meanwhile, see read_prompts."""
    check_prompts(path)
    column, pieces = open_prompts(Path(path))
    report |= {"column": column, "empty": 0, "duplicate": 0, "bad": []}
    seen, rows = set(), 0
    for texts, bad_lines in pieces:
        report["bad"] += bad_lines
        rows += len(texts)
        for text in texts:
            if not (prompt := text.strip()):
                report["empty"] += 1
                continue
            digest = blake2b(prompt.encode(), digest_size=16).digest()
            if digest in seen:
                report["duplicate"] += 1
                continue
            seen.add(digest)
            yield prompt
    if not rows + len(report["bad"]):
        raise UserError(f"{path}: has no rows; expected one prompt per row")
    if not seen:
        raise UserError(
            f"{path}: no usable prompts: {report['empty']} rows are empty and {len(report['bad'])} unreadable; "
            "expected UTF-8 text and, in a table, a column `prompt`"
        )


def write_bad_rows(reports: dict[str, dict], path: Path) -> None:
    """Write "FILE: line NUMBER" to `path` for each row that could not be read; no file if there is none.

    reports: {file: report as of read_prompts}.
    """
    lines = [f"{file}: line {number}\n" for file, report in reports.items() for number in report["bad"]]
    if lines:
        with write_whole(path) as unfinished:
            unfinished.write_text("".join(lines), encoding="utf-8")
