"""Read prompt files of every supported format in pieces, and list the rows that cannot be read."""

import csv
import json
import lzma
import zlib
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from textcraftor.errors import UserError, first_line
from textcraftor.prompt_columns import choose_column, kind_of
from textcraftor.prompt_tables import BOM, SAMPLE, open_utf8, read_table, sift, suffix_of

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet")
LINES = 100_000  # lines of other files that are read at once
# What Python's and pyarrow's readers raise for damaged files.
UNREADABLE = (ValueError, TypeError, OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error)
# Files that are not what their names say: (how the file begins, what it is and what to do).
MISTAKEN = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save the sheet as csv in UTF-8",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"version https://git-lfs": "a Git LFS pointer in the file's place; fetch the file with `git lfs pull`",
    b"<!doctype": "a web page in the file's place; fetch the file again",
    b"<html": "a web page in the file's place; fetch the file again",
}


def open_prompts(path: Path) -> tuple[str | None, Iterator[tuple[list[str], list[int]]]]:
    """Find the prompts of a file: (name of the column in use or None, pieces of (texts, numbers of bad rows)).

    The content decides where it contradicts the name: parquet files, gzip, bz2, xz, UTF-16 and other delimiters are
    recognised. Most tsv files quote nothing, and a cell may begin with a quotation mark: a row of a tsv is a line, and
    a cell loses its quotation marks only if they enclose it. They hold tabs together only where a line would have too
    many cells, and join lines only if at most one of these has as many cells as the header by itself.

    Raises UserError, also while iterating over the pieces, if the file cannot be read or does not hold prompts.
    """
    try:
        start = _head(path)
        for beginning, mistake in MISTAKEN.items():
            if start.lower().startswith(beginning.lower()):
                raise UserError(f"{path}: is {mistake}")
        suffix = ".parquet" if start.startswith(b"PAR1") else suffix_of(path)
        opened = {".csv": read_table, ".tsv": read_table, ".txt": _text, ".parquet": _parquet}.get(suffix, _json)(path)
    except UNREADABLE as problem:
        raise _unreadable(path, problem) from problem
    return opened[0], _guarded(path, opened[1])


def _unreadable(path, problem):
    return UserError(f"{path}: not a readable {suffix_of(path)[1:]} file ({first_line(problem)})")


def _guarded(path, pieces):
    try:
        yield from pieces
    except UNREADABLE as problem:
        raise _unreadable(path, problem) from problem


def _head(path):
    with open(path, "rb") as file:
        return file.read(64).removeprefix(BOM).lstrip()


def _pieces(numbered):
    """Iterate over pieces of (line number, text or None) …."""
    return iter(lambda: sift(islice(numbered, LINES)), ([], []))


def _lines(path):
    with open_utf8(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                yield number, None


def _check_texts(path, texts):
    if kind := kind_of(texts):
        raise UserError(f"{path}: holds {kind}, not prompts; expected one prompt per line")


def _text(path):
    lines = _lines(path)
    first = list(islice(lines, SAMPLE))
    _check_texts(path, [line for _, line in first])
    return None, _pieces(chain(first, lines))


def _json(path):
    records = json_records(path)
    first = list(islice(records, SAMPLE))
    tables = [record for _, record in first if isinstance(record, dict)]
    names, column = list(dict.fromkeys(chain.from_iterable(tables))), None
    if names:
        column = names[choose_column(path, names, [[table.get(name) for table in tables] for name in names])]
    else:
        _check_texts(path, [record for _, record in first if record is not ...])

    def text(record):
        value = record.get(column, ...) if isinstance(record, dict) else record
        return "" if value is None else value if isinstance(value, str) else None

    return column, _pieces((number, text(record)) for number, record in chain(first, records))


def json_records(path):
    """Yield (line number, value) of a file with one JSON value per line, or (number, value) of one JSON array; ... as
    the value of what is no JSON."""
    with open_utf8(path) as file:
        start = file.read(64).removeprefix(BOM).lstrip()[:1]
        if start == b"[":
            file.seek(0)
            try:
                values = json.loads(file.read().decode("utf-8-sig", "surrogatepass"))
            except (ValueError, RecursionError):  # one array per line
                values = None
            if isinstance(values, list):
                yield from enumerate(values, 1)
                return
    for number, line in _lines(path):
        if line is None or line.strip():
            try:
                yield number, ... if line is None else json.loads(line)
            except (ValueError, RecursionError):  # too many brackets
                yield number, ...


def _parquet(path):
    file = pyarrow.parquet.ParquetFile(path)
    schema = file.schema_arrow
    kinds = [arrow_kind(field.type) for field in schema]
    texts = [name for name, kind in zip(schema.names, kinds, strict=True) if not kind]
    head = next(file.iter_batches(SAMPLE, columns=texts), None) if texts else None
    sampled = {name: list(arrow_texts(head[name])) for name in texts} if head else {}
    samples = [kind or sampled.get(name, []) for name, kind in zip(schema.names, kinds, strict=True)]
    column = schema.names[choose_column(path, schema.names, samples)]
    values = chain.from_iterable(map(arrow_texts, (batch[column] for batch in file.iter_batches(columns=[column]))))
    return column, _pieces(enumerate(values, 1))


def arrow_kind(kind):
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return None
    if pa.types.is_struct(kind) or pa.types.is_map(kind):
        return "structs"
    if pa.types.is_nested(kind):
        return "lists"
    if any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
        return "bytes"
    return "no text" if pa.types.is_null(kind) else "numbers" if pa.types.is_primitive(kind) else str(kind)


def arrow_texts(values):
    try:
        return ["" if text is None else text for text in values.to_pylist()]
    except UnicodeDecodeError:
        return map(_arrow_text, values)


def _arrow_text(value):
    try:
        return value.as_py() or ""
    except UnicodeDecodeError:
        return None
