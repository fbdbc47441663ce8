"""Prompt files, and the endless seeded stream of prompts that training draws from."""

import functools
import json
from pathlib import Path

import numpy as np
import pandas as pd

from textcraftor.errors import UserError

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".parquet")


def read_prompts(path):
    """Read the usable prompts of a csv, tsv, txt (one a line), jsonl or parquet file.

    Tables are read at their column `prompt` in any case, else at their first; other columns are never loaded. Prompts
    are stripped; empty ones and repetitions are dropped.

    Returns (prompts in the file's order, {"empty": count, "duplicate": count}).
    Raises UserError if there is no such file, it cannot be read, has no rows, or holds no usable prompt.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: cannot tell the format of this prompt file; expected one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file; name one of your own with --prompts (a column `prompt`)")
    try:
        rows = _read_rows(path)
    except (ValueError, OSError, AttributeError) as problem:
        raise UserError(f"{path}: not a readable {path.suffix[1:]} file ({str(problem).splitlines()[0]})") from problem
    if not rows:
        raise UserError(f"{path}: has no rows; expected one prompt a row")
    stripped = [str(row).strip() for row in rows]
    filled = [prompt for prompt in stripped if prompt]
    prompts = list(dict.fromkeys(filled))
    if not prompts:
        raise UserError(f"{path}: no usable prompts, all {len(rows)} rows are empty; expected a column `prompt`")
    return prompts, {"empty": len(rows) - len(filled), "duplicate": len(filled) - len(prompts)}


def _read_rows(path):
    suffix = path.suffix.lower()
    if suffix == ".txt":
        with open(path, encoding="utf-8") as lines:
            return list(lines)
    if suffix == ".jsonl":
        with open(path, encoding="utf-8") as lines:
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


class PromptStream:
    """Sample n of training, for every n ≥ 0: its prompt, from a fresh seeded order of all prompts in each epoch.

    Depends on (prompts, seed, n) alone, so neither the batch size nor the number of processes changes a sample.
    """

    def __init__(self, prompts, seed):
        self.prompts = prompts
        self.order = functools.lru_cache(maxsize=1)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(prompts))
        )

    def __getitem__(self, n):
        epoch, position = divmod(n, len(self.prompts))
        return self.prompts[self.order(epoch)[position]]
