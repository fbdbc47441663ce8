"""Read csv, tsv and similar tables of any size, skipping damaged rows."""

import bz2
import csv
import gzip
import io
import lzma
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from textcraftor.prompt_columns import NO_DELIMITER, choose_column, choose_delimiter, is_header, split, unquoted

BLOCK = 2**20  # bytes of a table that are read at once
THREADS = 4  # that read blocks
SAMPLE = 200  # rows from which column and delimiter are chosen
LONGEST_LINE = 2**20  # bytes of such a row; a longer line is cut there
LONGEST = 10_000  # characters; a longer cell is no prompt but rows that a stray quotation mark has joined
BOM = b"\xef\xbb\xbf"
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, or a byte that is not UTF-8
# The csv module has one limit for the whole process; its default of 128 KiB would refuse cells that pyarrow reads. A
# cell that is never closed is read up to this size before it counts as bad.
csv.field_size_limit(4 * BLOCK)


def suffix_of(path: Path) -> str:
    """A file's suffix in lower case, not counting that of a compression."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() in (".gz", ".bz2", ".xz") else path.name).suffix.lower()


def open_utf8(path):
    """A file's content in UTF-8, as a binary file."""
    with open(path, "rb") as file:
        start = file.read(6)
    file = next((open_file for magic, open_file in OPENERS.items() if start.startswith(magic)), open)(path, "rb")
    start = file.read(4)
    file.seek(0)
    utf16 = start[:2] in (b"\xff\xfe", b"\xfe\xff")
    if utf16 or (len(start) == 4 and start[1] == start[3] == 0 and start[0] and start[2]):
        # As Excel and PowerShell write them: never large enough to need reading in pieces.
        with file:
            text = file.read().decode("utf-16" if utf16 else "utf-16-le", "surrogatepass")
        return io.BytesIO(text.encode("utf-8", "surrogatepass"))
    return file


def sift(numbered):
    """(line number, text or None) … -> (texts, numbers of the lines without a usable text)."""
    texts, bad = [], []
    for number, text in numbered:
        if text is None or "\0" in text or _SURROGATE.search(text):
            bad.append(number)
        else:
            texts.append(text)
    return texts, bad


def read_table(path: Path):
    """Find delimiter, header and column of a csv or tsv file; returns what prompt_formats.open_prompts does."""
    with open_utf8(path) as file:
        lines = list(islice(iter(lambda: file.readline(LONGEST_LINE), b""), SAMPLE))
    lines = [line.removeprefix(BOM).decode("utf-8", "surrogateescape") for line in lines]
    skip = next((number for number, line in enumerate(lines) if line.strip()), len(lines))  # lines before the header
    if skip == len(lines):
        return None, iter([])
    if says := re.fullmatch(r'"?sep=(.)"?\s*', lines[skip]):  # as Excel writes it
        separator, skip = says[1], skip + 1
    else:
        separator = choose_delimiter(lines[skip:], "\t" if suffix_of(path) == ".tsv" else ",")
    first, *others = map(partial(split, delimiter=separator), lines[skip:])
    if is_header(first):
        with io.TextIOWrapper(open_utf8(path), "utf-8-sig", "surrogateescape", newline="\n") as text:
            reader = csv.reader(islice(text, skip, None), delimiter=separator, strict=True)
            names = next(reader)
        skip += reader.line_num
    else:
        names, others = [f"{number} (no header)" for number in range(1, len(first) + 1)], [first, *others]
    rows = [row for row in others if len(row) == len(names)]
    column = choose_column(path, names, [[row[index] for row in rows] for index in range(len(names))])
    if len(names) == 1 and separator != "\t":
        separator = NO_DELIMITER
    return names[column].strip("\ufeff \"'"), _table_pieces(path, skip, (separator, len(names), column))


def _table_pieces(path, line, layout):
    """Read a table's rows after its first `line` lines. layout: separator, number of columns, the one to read.

    Blocks are read in threads, by _clean_rows if it can, else row by row; a block that ends within a row is read in
    this thread.
    """
    separator, data, ended, waiting = layout[0], b"", False, deque()
    with open_utf8(path) as file, ThreadPoolExecutor(THREADS) as threads:
        if not line and file.read(len(BOM)) != BOM:
            file.seek(0)
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
    """Read one column of a block of rows -> texts, or None if any row is or may be bad. Faster than _any_rows,
    and mostly without Python's global lock."""
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
    """Read the rows in `data` one by one. After a bad one, continue on the next line, which it may have swallowed.

    line: number of the preceding line. Returns (texts of the column, line numbers of bad rows, bytes read); a row
    that may continue after `data` is left for the next call.
    """
    separator, width, column = layout
    text = data[: data.rfind(b"\n") + 1].decode("utf-8", "surrogateescape")
    lines, found, position = list(io.StringIO(text, newline="\n")), [], 0
    whole = [separator == "\t" and text.count("\t") == width - 1 for text in lines]  # lines with enough cells

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
            row, position = list(map(unquoted, lines[first].rstrip("\r\n").split("\t"))), first + 1
        if row and len(row) == width and len(row[column]) <= LONGEST:
            found.append((line + first + 1, row[column]))
        elif row != []:
            found.append((line + first + 1, None))
            position = first + 1
    return *sift(found), len("".join(lines[:position]).encode("utf-8", "surrogateescape"))
