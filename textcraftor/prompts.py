"""Prompt files: the prompts of a csv, tsv, txt, jsonl or parquet file."""

import json
from pathlib import Path

import pandas as pd

from textcraftor.downloads import command
from textcraftor.errors import UserError, first_line

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".parquet")


def read_prompts(path):
    """Read the usable prompts of a csv, tsv, txt (one a line), jsonl or parquet file.

    Tables are read at their column `prompt` in any case, else at their first; other columns are never loaded. Prompts
    are stripped; empty ones and repetitions are dropped.

    Returns (prompts in the file's order, {"empty": count, "duplicate": count}).
    Raises UserError if there is no such file, it cannot be read, has no rows, or holds no usable prompt.
    """
    check_prompts(path)
    path = Path(path)
    try:
        rows = _read_rows(path)
    except (ValueError, OSError, AttributeError, TypeError, KeyError) as problem:
        raise UserError(f"{path}: not a readable {path.suffix[1:]} file ({first_line(problem)})") from problem
    if not rows:
        raise UserError(f"{path}: has no rows; expected one prompt a row")
    stripped = [str(row).strip() for row in rows]
    filled = [prompt for prompt in stripped if prompt]
    prompts = list(dict.fromkeys(filled))
    if not prompts:
        raise UserError(f"{path}: no usable prompts, all {len(rows)} rows are empty; expected a column `prompt`")
    return prompts, {"empty": len(rows) - len(filled), "duplicate": len(filled) - len(prompts)}


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


def _read_rows(path):
    suffix = path.suffix.lower()
    if suffix == ".txt":
        with open(path, encoding="utf-8-sig") as lines:
            return list(lines)
    if suffix == ".jsonl":
        with open(path, encoding="utf-8-sig") as lines:
            records = [json.loads(line) for line in lines if line.strip()]
        return [_fill(record if isinstance(record, str) else record[_column(record)]) for record in records]
    if suffix == ".parquet":
        import pyarrow.parquet

        column = _column(pyarrow.parquet.read_schema(path).names)
        return [_fill(value) for value in pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()]
    # dtype=str and keep_default_na=False: "42", "null" and "None" are prompts.
    options = {"sep": "," if suffix == ".csv" else "\t", "dtype": str, "keep_default_na": False}
    try:
        header = pd.read_csv(path, nrows=0, **options).columns
    except pd.errors.EmptyDataError:
        return []
    return pd.read_csv(path, usecols=[_column(header)], **options).iloc[:, 0].tolist()


def _column(names):
    names = list(names)
    return next((name for name in names if str(name).strip().lower() == "prompt"), names[0] if names else None)


def _fill(value):
    return "" if value is None else value
