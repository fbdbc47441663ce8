"""Prompt files: the prompts of a csv, tsv, txt, jsonl or parquet file, of any size, and what is wrong in it."""

import csv
import io
import json
import re
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from textcraftor.downloads import command
from textcraftor.errors import UserError, first_line

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".parquet")
BLOCK = 2**24  # bytes of a table that are read at once
LINES = 100_000  # lines of other files, and prompts whose checksum is taken at once
LONGEST = 10_000  # bytes; a longer cell of a table is no prompt but rows that a stray quotation mark has joined
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, or a byte that is not UTF-8


def read_prompts(path):
    """Read the usable prompts of a csv, tsv, txt (one a line), jsonl or parquet file, in UTF-8.

    Tables are read at their column `prompt` in any case, else at their first; other columns are never kept. Prompts
    are stripped; empty ones and repetitions are dropped, and so are bad rows: broken off, with quotation marks out of
    place or too few or too many cells, with a NUL or what is not UTF-8 in the prompt. After a bad row, reading goes on
    at the next line.

    Returns (prompts in the file's order, as an Arrow array of strings, which takes a third of the memory of a list and
    is shared by forked workers; {"empty": count, "duplicate": count, "bad": line numbers (of parquet, row numbers)}).
    Raises UserError if there is no such file, it cannot be read, has no rows, or holds no usable prompt.
    """
    check_prompts(path)
    path = Path(path)
    pieces, bad, empty = [], [], 0
    try:
        for texts, bad_lines in _read_pieces(path):
            texts = pc.utf8_trim_whitespace(pa.array(texts, pa.large_string()))
            pieces.append(texts.filter(pc.not_equal(texts, "")))
            empty += len(texts) - len(pieces[-1])
            bad += bad_lines
    except (ValueError, TypeError, OSError, csv.Error) as problem:
        raise UserError(f"{path}: not a readable {path.suffix[1:]} file ({first_line(problem)})") from problem
    filled = pa.chunked_array(pieces, pa.large_string())
    rows = len(filled) + empty + len(bad)
    if not rows:
        raise UserError(f"{path}: has no rows; expected one prompt a row")
    if not len(filled):
        raise UserError(
            f"{path}: no usable prompts, of {rows} rows {empty} are empty and {len(bad)} unreadable; expected UTF-8 "
            "text and, in a table, a column `prompt`"
        )
    prompts = pc.unique(filled)
    return prompts, {"empty": empty, "duplicate": len(filled) - len(prompts), "bad": bad}


def hold_out(prompts, held_out, count):
    """Split into prompts to train on and at most `count` to look at: the first of `held_out`, else those of `prompts`.

    prompts, held_out: Arrow arrays. Returns (Arrow array of training prompts, list of held-out prompts), with none in
    both. Raises UserError if either would be empty.
    """
    held_out = (held_out if len(held_out) else prompts[: len(prompts) // 2])[:count]
    prompts = prompts.filter(pc.invert(pc.is_in(prompts, value_set=held_out)))
    if not len(prompts) or not len(held_out):
        raise UserError("no prompts left to train on beside those held out; give more, or others with --val_prompts")
    return prompts, held_out.to_pylist()


def checksum(prompts):
    """CRC-32 of a list or an Arrow array of prompts in their order."""
    crc = 0
    for start in range(0, len(prompts), LINES):
        crc = crc32(repr([str(prompt) for prompt in prompts[start : start + LINES]]).encode(), crc)
    return crc


def check_prompts(path):
    """Raise UserError unless `path` is a file of a format that read_prompts knows."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such prompt file; training takes a csv with a column `prompt` (in the paper krea.ai's Open "
            f"Prompts: {command('prompts')}), or any csv, tsv, txt, jsonl or parquet file of yours"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: unknown format of a prompt file; expected one of {', '.join(SUFFIXES)}")


def _read_pieces(path):
    """Iterate over a file's (texts, line numbers of bad rows), piece by piece."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _table_pieces(path, "," if suffix == ".csv" else "\t")
    texts = {".txt": _lines, ".jsonl": _json_texts, ".parquet": _parquet_texts}[suffix](path)
    return iter(lambda: _sift(islice(texts, LINES)), ([], []))


def _sift(numbered):
    """(line number, text or None) … -> (texts, line numbers of those that are none)."""
    texts, bad = [], []
    for number, text in numbered:
        if text is None or "\0" in text or _SURROGATE.search(text):
            bad.append(number)
        else:
            texts.append(text)
    return texts, bad


def _lines(path):
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                yield number, None


def _json_texts(path):
    for number, line in _lines(path):
        if line is None or line.strip():
            try:
                record = json.loads(line)
                yield number, record if isinstance(record, str) else _cell(record[_column(record)])
            except (ValueError, TypeError, KeyError):
                yield number, None


def _parquet_texts(path):
    column = _column(pyarrow.parquet.read_schema(path).names)
    batches = pyarrow.parquet.ParquetFile(path).iter_batches(columns=[column])
    return enumerate((_cell(value) for batch in batches for value in batch[column].to_pylist()), 1)


def _table_pieces(path, separator):
    with open(path, newline="\n", encoding="utf-8-sig", errors="surrogateescape") as text:
        reader = csv.reader(text, delimiter=separator, strict=True)
        header = next(filter(None, reader), [])
    column, line = _column(header), reader.line_num
    with open(path, "rb") as file:
        for _ in range(line):
            file.readline()
        data, ended = b"", not header
        while data or not ended:
            if not ended:
                more = file.read(BLOCK)
                ended = not more
                data += more or b"\n"  # the last row may lack its line break
            rows = (data, separator, len(header), header.index(column))
            texts, bad, used = _clean_rows(*rows) or _any_rows(*rows, ended)
            yield texts, [line + number for number in bad]
            line += data.count(b"\n", 0, used)
            data = data[used:]


def _clean_rows(data, separator, width, column):
    """Read the whole rows in `data`, bytes of a table, if none is bad.

    Returns (texts of a column, [], bytes read), or None.
    """
    codes = np.frombuffer(data, np.uint8)
    quotes = np.flatnonzero(codes == ord('"'))
    end = data.rfind(b"\n") + 1
    while np.searchsorted(quotes, end) % 2:  # a line break within quotation marks
        end = data.rfind(b"\n", 0, end - 1) + 1
    codes, quotes = codes[:end], quotes[: np.searchsorted(quotes, end)]
    # Opening marks stand after a separator, closing ones before; within a cell they come in pairs.
    before, after = codes[quotes[::2] - 1], codes[quotes[1::2] + 1]
    places = [ord(mark) for mark in (separator, "\n", '"')]
    clean = end and np.isin(before, places).all() and np.isin(after, [*places, ord("\r")]).all()
    if not clean or b"\0" in data or data.count(b"\r") != data.count(b"\r\n"):
        return None
    names = [str(number) for number in range(width)]
    wanted = names[column]
    try:
        table = pyarrow.csv.read_csv(
            pa.py_buffer(memoryview(data)[:end]),
            pyarrow.csv.ReadOptions(use_threads=False, block_size=end + 1, column_names=names),
            pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(include_columns=[wanted], column_types={wanted: pa.large_string()}),
        )
    except pa.ArrowInvalid:  # too few or too many cells, or not UTF-8
        return None
    texts = table[0].combine_chunks()
    longest = pc.max(pc.binary_length(texts)).as_py() or 0
    return (texts, [], end) if longest <= LONGEST else None


def _any_rows(data, separator, width, column, ended):
    """Read the rows in `data` one by one. After a bad one, go on at the next line: it may have swallowed others.

    Returns (texts of a column, line numbers of bad rows, bytes read); a row that may go on after `data` is left.
    """
    text = data[: data.rfind(b"\n") + 1].decode("utf-8", "surrogateescape")
    lines, found, position = list(io.StringIO(text, newline="\n")), [], 0

    def following():
        nonlocal position
        while position < len(lines):
            position += 1
            yield lines[position - 1]

    while position < len(lines):
        first = position
        try:
            row = next(csv.reader(following(), delimiter=separator, strict=True))
        except csv.Error:
            if position == len(lines) and not ended:
                position = first
                break
            position = first + 1
            # Most tsv files quote nothing, and a cell may begin with a quotation mark.
            row = lines[first].rstrip("\r\n").split("\t") if separator == "\t" else None
        if row and len(row) == width and len(row[column].encode("utf-8", "surrogateescape")) <= LONGEST:
            found.append((first + 1, row[column]))
        elif row != []:
            found.append((first + 1, None))
            position = first + 1
    return *_sift(found), len("".join(lines[:position]).encode("utf-8", "surrogateescape"))


def _column(names):
    names = list(names)
    return next((name for name in names if str(name).strip().lower() == "prompt"), names[0] if names else None)


def _cell(value):
    return "" if value is None else str(value)
