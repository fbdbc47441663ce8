"""Prompt files: the prompts of a csv, tsv, txt, jsonl or parquet file, of any size, and what is wrong in it."""

import csv
import io
import json
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from textcraftor.downloads import command
from textcraftor.errors import UserError, first_line

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".parquet")
BLOCK = 2**20  # bytes of a table that are read at once
THREADS = 4  # that read blocks
LINES = 100_000  # lines of other files, and prompts whose checksum is taken at once
LONGEST = 10_000  # characters; a longer cell of a table is no prompt but rows that a stray quotation mark has joined
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, or a byte that is not UTF-8
# For the whole process, as the csv module has it; its own 128 KiB would refuse cells that pyarrow reads. A cell that is
# never closed is read so far before it counts as bad.
csv.field_size_limit(4 * BLOCK)


def read_prompts(path):
    """Read the usable prompts of a csv, tsv, txt (one a line), jsonl or parquet file, in UTF-8.

    Tables are read at their column `prompt` in any case, else at their first; other columns are never kept. Prompts
    are stripped; empty ones and repetitions are dropped, and so are bad rows: broken off, with quotation marks out of
    place or too few or too many cells, with a NUL or what is not UTF-8 in the prompt. After a bad row, reading goes on
    at the next line.

    Most tsv files quote nothing, and a cell may begin with a quotation mark: a row of a tsv is a line, its cells
    unquoted if wholly in quotation marks and else left as they are. Quotation marks hold tabs only where the line would
    have too many cells, and join lines only if at most one of these has by itself as many cells as the header.

    Returns (list of prompts in the file's order, {"empty": count, "duplicate": count, "bad": line numbers, of parquet
    row numbers}). Raises UserError if there is no such file, it cannot be read, has no rows, or holds no usable prompt.
    """
    check_prompts(path)
    path = Path(path)
    distinct, bad, rows, filled = {}, [], 0, 0
    try:
        for texts, bad_lines in _read_pieces(path):
            prompts = list(filter(None, map(str.strip, texts)))
            distinct.update(dict.fromkeys(prompts))
            bad += bad_lines
            rows += len(texts)
            filled += len(prompts)
    except (ValueError, TypeError, OSError, csv.Error) as problem:
        raise UserError(f"{path}: not a readable {path.suffix[1:]} file ({first_line(problem)})") from problem
    if not rows + len(bad):
        raise UserError(f"{path}: has no rows; expected one prompt a row")
    if not distinct:
        raise UserError(
            f"{path}: no usable prompts: {rows} rows are empty and {len(bad)} unreadable; expected UTF-8 text and, in "
            "a table, a column `prompt`"
        )
    return list(distinct), {"empty": rows - filled, "duplicate": filled - len(distinct), "bad": bad}


def hold_out(prompts, held_out, count):
    """Split into prompts to train on and at most `count` to look at: the first of `held_out`, else those of `prompts`.

    Returns (training prompts, held-out prompts), with none in both. Raises UserError if either would be empty.
    """
    held_out = (held_out or prompts[: len(prompts) // 2])[:count]
    apart = set(held_out)
    prompts = [prompt for prompt in prompts if prompt not in apart]
    if not prompts or not held_out:
        raise UserError("no prompts left to train on beside those held out; give more, or others with --val_prompts")
    return prompts, held_out


def checksum(prompts):
    """CRC-32 of prompts in their order, without a copy of them all."""
    crc = 0
    for start in range(0, len(prompts), LINES):
        crc = crc32("\0".join([*prompts[start : start + LINES], ""]).encode(), crc)
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
    line, data, ended, waiting = reader.line_num, b"", not header, deque()
    layout = separator, len(header), header.index(_column(header)) if header else 0
    with open(path, "rb") as file, ThreadPoolExecutor(THREADS) as threads:
        for _ in range(line):
            file.readline()
        while data or not ended:
            if not ended:
                more = file.read(BLOCK)
                ended = not more
                data += more or b"\n"  # the last row may lack its line break
            # In a tsv the number of quotation marks says nothing.
            end = 0 if separator == "\t" and b'"' in data else _end_of_rows(data)
            if end:
                waiting.append(threads.submit(_rows, data[:end], line, layout))
            while waiting and (len(waiting) > THREADS or not end):
                yield waiting.popleft().result()
            if not end:
                texts, bad, end = _any_rows(data, line, layout, ended)
                yield texts, bad
            line += int(np.count_nonzero(np.frombuffer(data, np.uint8, end) == ord("\n")))
            data = data[end:]
        for rows in waiting:
            yield rows.result()


def _end_of_rows(data):
    """Where the last line of `data` ends before which quotation marks are even in number, as they are between rows."""
    end = data.rfind(b"\n") + 1
    odd = np.count_nonzero(np.frombuffer(data, np.uint8, end) == ord('"')) % 2
    while odd:
        line = data.rfind(b"\n", 0, end - 1) + 1
        odd ^= data.count(b'"', line, end) % 2
        end = line
    return end


def _rows(data, line, layout):
    if texts := _clean_rows(data, layout):
        return texts, []
    return _any_rows(data, line, layout, ended=True)[:2]


def _clean_rows(data, layout):
    """Read a column of rows, bytes of a table -> texts, or None if any row is bad or in doubt. Faster than _any_rows,
    and mostly without Python's lock."""
    separator, width, column = layout
    codes = np.frombuffer(data, np.uint8)
    quotes = np.flatnonzero(codes == ord('"'))
    # Opening marks stand after a separator, closing ones before; within a cell they come in pairs.
    allowed = np.zeros((2, 256), bool)
    allowed[:, [ord(separator), ord("\n"), ord('"')]] = allowed[1, ord("\r")] = True
    clean = allowed[0, codes[quotes[::2] - 1]].all() and allowed[1, codes[quotes[1::2] + 1]].all()
    if not clean or b"\0" in data or (b"\r" in data and data.count(b"\r") != data.count(b"\r\n")):
        return None
    names = [str(number) for number in range(width)]
    wanted = names[column]
    try:
        table = pyarrow.csv.read_csv(
            pa.py_buffer(data),
            pyarrow.csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
            pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(include_columns=[wanted], column_types={wanted: pa.large_string()}),
        )
    except pa.ArrowInvalid:  # too few or too many cells, or not UTF-8
        return None
    texts = table[0].to_pylist()
    return texts if max(map(len, texts), default=0) <= LONGEST else None


def _any_rows(data, line, layout, ended):
    """Read the rows in `data` one by one. After a bad one, go on at the next line: it may have swallowed others.

    line: number of the line before. Returns (texts of a column, line numbers of bad rows, bytes read); a row that may
    go on after `data` is left.
    """
    separator, width, column = layout
    text = data[: data.rfind(b"\n") + 1].decode("utf-8", "surrogateescape")
    lines, found, position = list(io.StringIO(text, newline="\n")), [], 0
    whole = [separator == "\t" and text.count("\t") == width - 1 for text in lines]  # lines that may be rows

    def following():
        nonlocal position
        rows = 0
        while position < len(lines):
            rows += whole[position]
            if rows > 1:
                return
            position += 1
            yield lines[position - 1]

    while position < len(lines):
        first = position
        try:
            row = next(csv.reader(following(), delimiter=separator, strict=True))
        except csv.Error:
            row = None
            if position == len(lines) and not ended:
                position = first
                break
        if whole[first] and (row is None or len(row) not in (0, width)):
            row, position = list(map(_unquoted, lines[first].rstrip("\r\n").split("\t"))), first + 1
        if row and len(row) == width and len(row[column]) <= LONGEST:
            found.append((line + first + 1, row[column]))
        elif row != []:
            found.append((line + first + 1, None))
            position = first + 1
    return *_sift(found), len("".join(lines[:position]).encode("utf-8", "surrogateescape"))


def _unquoted(cell):
    inside = cell[1:-1]
    return inside.replace('""', '"') if cell == f'"{inside}"' and '"' not in inside.replace('""', "") else cell


def _column(names):
    names = list(names)
    return next((name for name in names if str(name).strip().lower() == "prompt"), names[0] if names else None)


def _cell(value):
    return "" if value is None else str(value)
