"""Pictures with their captions on disk: image folders with metadata, parquet files with pictures inside, name pairs.

Nothing here needs torch.
"""

import csv
import io
import os
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet
from PIL import Image, ImageOps, UnidentifiedImageError

from textcraftor.errors import UserError, first_line
from textcraftor.files import write_whole
from textcraftor.image_files import upright_rgb
from textcraftor.prompt_columns import choose_column, choose_delimiter
from textcraftor.prompt_formats import MISTAKEN, UNREADABLE, arrow_kind, arrow_texts, json_records
from textcraftor.prompt_tables import SAMPLE, open_utf8, suffix_of

# Those that Pillow cannot open without a plug-in are here too, so that they are reported and not overlooked.
PICTURES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl",
)  # fmt: skip
CAPTIONS = (".txt", ".caption")
TABLES = (".jsonl", ".csv", ".tsv", ".json", ".parquet")
# Names of columns, the most telling first. Case does not matter, nor whether "_", "-" or spaces join the words.
FILE_COLUMNS = (
    "file name", "filename", "image file", "image path", "image name", "file path", "filepath", "file", "image", "img",
    "path",
)  # fmt: skip
PICTURE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image bytes", "bytes")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, half a character, or a byte that is not UTF-8
THREADS = min(16, os.cpu_count() or 1)  # for reading and decoding
EXPECTED = (
    "expected a folder of pictures with metadata.jsonl, metadata.csv or metadata.parquet (columns `file_name`, "
    "`text`), or with a caption name.txt beside each name.jpg, or parquet files with the pictures inside"
)


class Pair(NamedTuple):
    """A picture, which is a file or a row (from 0) of a parquet file, and its caption."""

    file: str
    row: int | None
    caption: str

    @property
    def name(self) -> str:
        return self.file if self.row is None else f"{self.file}, row {self.row + 1}"


def check_images(path: Path | str) -> None:
    """Raise UserError unless `path` holds at least one picture with a caption, as far as names and tables tell."""
    skipped = []
    if next(_pairs(Path(path), skipped), None) is None:
        raise UserError(nothing_usable(path, skipped))


def read_pairs(path: Path | str) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Find the pictures with captions in a folder or file -> (pairs, what is left out as (name, reason)).

    A folder holds, in itself or in folders below it, either
    - pictures and metadata.jsonl, metadata.csv or metadata.parquet, whose file names are relative to its own folder
      (the image-folder convention of the `datasets` library), or
    - pictures and a text file of the same name beside each, or
    - parquet files with pictures inside, as `datasets` writes them or as plain bytes.
    A file is one such table. Captions are in the column that prompt_columns.choose_column picks. A picture is left out
    if it has no caption or the metadata names it but it does not exist. Broken pictures show when they are decoded.

    Raises UserError, in one line, if `path` is missing, is something else, or has nothing usable.
    """
    skipped = []
    pairs = list(_pairs(Path(path), skipped))
    if not pairs:
        raise UserError(nothing_usable(path, skipped))
    return pairs, skipped


def nothing_usable(path: Path | str, skipped: list[tuple[str, str]]) -> str:
    """What to tell the user if no picture is left."""
    return f"{path}: no usable picture with a caption in it{f' ({_count(skipped)})' if skipped else ''}; {EXPECTED}"


def describe_skipped(path: Path | str, skipped: list[tuple[str, str]]) -> str:
    """One line for the user: how many pictures are left out, why, and which is the first."""
    return f"{path}: left out: {_count(skipped)}"


def write_skipped(skipped: list[tuple[str, str]], path: Path) -> None:
    """Write "NAME: REASON" to `path` for each picture that is left out; no file if there is none."""
    if skipped:
        with write_whole(path) as unfinished:
            text = "".join(f"{name}: {reason}\n" for name, reason in skipped)
            unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


def _count(skipped):
    counts = Counter(reason.partition(":")[0] for _, reason in skipped)
    name, reason = skipped[0]
    return ", ".join(f"{kind} {count}" for kind, count in counts.items()) + f"; the first is {name} ({reason})"


def _pairs(path, skipped):
    if path.is_file():
        if suffix_of(path) not in TABLES:
            raise UserError(f"{path}: is a {path.suffix or 'nameless'} file; {EXPECTED}")
        yield from _table(path, skipped)
        return
    if not path.is_dir():
        raise UserError(f"{path}: no such folder of pictures; {EXPECTED}")
    files = list(_files(path))
    metadata = [file for file in files if re.fullmatch(r"metadata\.(jsonl|csv|parquet)", file.name, re.I)]
    folders = [file.parent for file in metadata]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        names = ", ".join(file.name for file in metadata if file.parent == twice)
        raise UserError(f"{twice}: holds {names}; keep the one that describes its pictures")
    if metadata:
        listed = set()
        for table in metadata:
            for pair in _table(table, skipped):
                listed.add(os.path.normpath(pair.file))
                yield pair
        listed.update(os.path.normpath(name) for name, _ in skipped)
        pictures = (str(file) for file in files if file.suffix.lower() in PICTURES)
        skipped += [(file, "no caption") for file in pictures if os.path.normpath(file) not in listed]
        return
    captions = {}
    for file in files:
        if file.suffix.lower() in CAPTIONS:
            captions.setdefault(file.with_suffix(""), file)
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    # img2dataset writes name pairs, and beside them parquet files that only list where the pictures came from.
    if tables and not any(file.with_suffix("") in captions for file in pictures):
        for table in tables:
            yield from _table(table, skipped)
    else:
        yield from _named_alike(pictures, captions, skipped)


def _files(folder):
    """All files below a folder, ordered by name, also behind links; hidden ones and those of macOS are left out."""

    def refuse(problem):
        raise UserError(f"{problem.filename}: cannot be read ({problem.strerror})") from problem

    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder that contains it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _named_alike(pictures, captions, skipped):
    """captions: {path without suffix: text file}."""
    for file in pictures:
        text = captions.get(file.with_suffix(""))
        try:
            with open_utf8(text) if text else io.BytesIO() as opened:
                caption = _caption(" ".join(opened.read().decode("utf-8-sig").split()))
        except (OSError, ValueError) as problem:
            skipped.append((str(file), f"no caption: {text.name} is unreadable ({first_line(problem)})"))
            continue
        if caption:
            yield Pair(str(file), None, caption)
        else:
            skipped.append((str(file), "no caption"))


def _table(path, skipped):
    """Pairs of one table of any format; raises UserError if it cannot be read or lacks a column."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        if mistake := _mistake(start):
            raise UserError(f"{path}: is {mistake}")
        if start.startswith(b"PAR1"):
            yield from _parquet(path, skipped)
        elif suffix_of(path) in (".csv", ".tsv"):
            yield from _listed(path, _csv_rows(path), skipped)
        elif suffix_of(path) == ".parquet":
            raise UserError(f"{path}: is not a parquet file: it does not begin with PAR1")
        else:
            yield from _listed(path, json_records(path), skipped)
    except UNREADABLE as problem:
        raise UserError(f"{path}: not a readable {suffix_of(path)[1:]} file ({first_line(problem)})") from problem


def _mistake(start):
    return next((what for magic, what in MISTAKEN.items() if start.lower().startswith(magic.lower())), None)


def _csv_rows(path):
    """Yield (line number, {column: cell}) of a table with a header; ... for a row with too few or too many cells."""
    with open_utf8(path) as file:
        head = [line.decode("utf-8-sig", "surrogateescape") for line in islice(file, SAMPLE)]
    delimiter = choose_delimiter(head or [""], "\t" if suffix_of(path) == ".tsv" else ",")
    with io.TextIOWrapper(open_utf8(path), "utf-8-sig", "surrogateescape", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter)
        names = [name.strip() for name in next(rows, [])]
        for row in rows:
            if row:
                yield rows.line_num, dict(zip(names, row, strict=True)) if len(row) == len(names) else ...


def _listed(table, rows, skipped):
    """Pairs of a table that names picture files. rows: (number, {column: value}), or (number, anything else)."""
    rows = iter(rows)
    first = list(islice(rows, SAMPLE))
    dicts = [row for _, row in first if isinstance(row, dict)]
    names = list(dict.fromkeys(chain.from_iterable(dicts)))
    file_column = _named(names, FILE_COLUMNS)
    if file_column is None:
        shown = ", ".join(f"`{name}`" for name in names) or "no columns"
        raise UserError(
            f"{table}: no column `file_name` that tells which picture a caption belongs to, and no pictures inside; "
            f"found {shown}"
        )
    samples = ["file names" if name == file_column else [row.get(name) for row in dicts] for name in names]
    caption_column = names[choose_column(table, names, samples)]
    for number, row in chain(first, rows):
        name = row.get(file_column) if isinstance(row, dict) else None
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            skipped.append((f"{table}, line {number}", "no file name"))
        elif (file := _find(table.parent, name.strip())) is None:
            skipped.append((str(table.parent / name.strip()), "no such file"))
        elif caption := _caption(row.get(caption_column)):
            yield Pair(file, None, caption)
        else:
            skipped.append((file, "no caption"))


def _find(folder, name):
    """The file that a table names, also if written on Windows or with the other Unicode form of its accents."""
    slashes = name.replace("\\", "/")
    forms = (unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))
    return next((path for form in (name, slashes, *forms) if os.path.isfile(path := os.path.join(folder, form))), None)


def _parquet(path, skipped):
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        picture = _picture_column(path, file.schema_arrow)
        if picture is None:
            batches = (batch.to_pylist() for batch in file.iter_batches(columns=_flat_columns(file.schema_arrow)))
            yield from _listed(path, enumerate(chain.from_iterable(batches), 1), skipped)
            return
        kinds = [arrow_kind(field.type) for field in file.schema_arrow]
        texts = [name for name, kind in zip(names, kinds, strict=True) if not kind]
        head = next(file.iter_batches(SAMPLE, columns=texts), None) if texts else None
        sampled = {name: list(arrow_texts(head[name])) for name in texts} if head else {}
        samples = [kind or sampled.get(name, []) for name, kind in zip(names, kinds, strict=True)]
        column = names[choose_column(path, names, samples)]
        captions = chain.from_iterable(arrow_texts(batch[column]) for batch in file.iter_batches(columns=[column]))
        for row, text in enumerate(captions):
            if caption := _caption(text):
                yield Pair(str(path), row, caption)
            else:
                skipped.append((Pair(str(path), row, "").name, "no caption"))


def _flat_columns(schema):
    return [field.name for field in schema if not pa.types.is_nested(field.type)]


def _picture_column(path, schema):
    """Name of the column that holds pictures, as bytes or as {bytes, path}; None if there is none."""

    def holds_bytes(kind):
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)

    able = [field.name for field in schema if holds_bytes(field.type)]
    chosen = able[0] if len(able) == 1 else _named(able, PICTURE_COLUMNS)
    if able and chosen is None:
        raise UserError(
            f"{path}: cannot tell which of its columns holds the pictures: {', '.join(able)}; call it image"
        )
    return chosen


def _named(names, known):
    words = {name: " ".join(re.findall(r"[^\W_]+", str(name).lower())) for name in names}
    return next((name for candidate in known for name in names if words[name] == candidate), None)


def _caption(value):
    """A caption without spaces at its ends; None if it is empty, not text, or not valid Unicode."""
    text = value.strip() if isinstance(value, str) else ""
    return text if text and not _NO_TEXT.search(text) else None


def open_pictures(pairs: Iterable[Pair]) -> Iterator[Callable[[], bytes]]:
    """For each pair, in order, a function that returns the bytes of its picture file, or raises OSError or ValueError.

    The rows of a parquet file must be in ascending order. Raises UserError if a parquet file is damaged.
    """
    for (file, inside), group in groupby(pairs, key=lambda pair: (pair.file, pair.row is not None)):
        if inside:
            yield from _parquet_pictures(Path(file), [pair.row for pair in group])
        else:
            for _ in group:
                yield Path(file).read_bytes


def _parquet_pictures(path, rows):
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column, start, wanted = _picture_column(path, file.schema_arrow), 0, deque(rows)
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if wanted and wanted[0] < end:
                    for batch in file.iter_batches(THREADS, row_groups=[group], columns=[column]):
                        while wanted and wanted[0] < start + len(batch):
                            value = batch[column][wanted.popleft() - start].as_py()
                            yield lambda value=value: _inside(path, value)
                        start += len(batch)
                start = end
    except (OSError, pa.ArrowException) as problem:
        raise UserError(f"{path}: not a readable parquet file ({first_line(problem)})") from problem


def _inside(path, value):
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            return path.parent.joinpath(value["path"]).read_bytes()
        value = value["bytes"]
    if not value:
        raise ValueError("an empty cell")
    return value


def decode_picture(data: bytes, height: int, width: int) -> Image.Image:
    """A picture file of any format and mode -> upright RGB, `width` x `height` pixels.

    Scaled, with antialiasing, until it just covers that size, then cropped at the centre. Raises ValueError if the
    picture is broken.
    """
    if mistake := _mistake(data[:64]):
        raise ValueError(mistake)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return ImageOps.fit(upright_rgb(picture), (width, height), Image.Resampling.BICUBIC)
    except UnidentifiedImageError as problem:
        raise ValueError("no picture, or of a format that Pillow cannot read") from problem
    except Exception as problem:  # each of Pillow's decoders raises its own kinds for damaged data
        raise ValueError(first_line(problem)) from problem


def in_threads(function, items: Iterable) -> Iterator:
    """Yield function(item) for each item, in order, computed by several threads a little ahead."""
    with ThreadPoolExecutor(THREADS) as threads:
        waiting = deque()
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > 4 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
