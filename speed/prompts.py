"""
Time and memory that reading the prompts of a csv as large as openprompts.csv takes.

$ head -n 1000 openprompts.csv > rows.csv
$ python -m speed.prompts --rows rows.csv --folder /tmp

Writes a temporary csv of 3 GB made from real rows and reads it alternately in three ways, each in a new process:
    whole   pandas.read_csv of all columns, the reference for the ratios
    column  pandas.read_csv of the column `prompt`, then its distinct prompts as a list of strings
    ours    textcraftor.prompts: read_training_prompts and checksum, as one process per node does before training
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from textcraftor.errors import UserError, run_program
from textcraftor.options import REPOSITORY


def build(path, rows, size):
    """Write `rows` (prompt, raw_data) to `path` again and again, with new last letters, until it has `size` bytes."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["prompt", "raw_data"])
        turn = 0
        while file.tell() < size:
            writer.writerows((prompt and f"{prompt[:-5]}{turn:5d}", data) for prompt, data in rows)
            turn += 1


def read(how, path):
    """Read in one of the three ways -> (seconds, peak memory of this process in bytes, number of prompts)."""
    import pandas as pd

    from textcraftor.prompts import checksum, read_training_prompts

    began = time.perf_counter()
    if how == "whole":
        prompts = pd.read_csv(path)
    elif how == "column":
        column = pd.read_csv(path, usecols=["prompt"], dtype=str, keep_default_na=False)["prompt"].tolist()
        prompts = list(dict.fromkeys(filter(None, (prompt.strip() for prompt in column))))
    else:
        with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
            prompts = read_training_prompts(path, None, 16, Path(folder, "prompts"))[0]
            checksum(prompts)
    seconds = time.perf_counter() - began
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, len(prompts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="folder for the temporary csv")
    parser.add_argument("--rows", default="openprompts.csv", help="csv whose first 1,000 rows are repeated")
    parser.add_argument("--gigabytes", type=float, default=3, help="size of the temporary csv")
    parser.add_argument("--rounds", type=int, default=2, help="times that each way is measured")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(*args.read)))
        return

    if not Path(args.rows).is_file():
        raise UserError(f"--rows {args.rows}: no such file; expected a csv with the columns prompt and raw_data")
    with open(args.rows, newline="", encoding="utf-8") as file:
        names, *rows = [*islice(csv.reader(file), 1001)] or [[]]
    if names != ["prompt", "raw_data"] or not rows or any(len(row) != 2 for row in rows):
        raise UserError(
            f"--rows {args.rows}: has the columns {', '.join(names) or 'none'} and {len(rows)} rows; expected prompt "
            "and raw_data, and rows of two cells"
        )
    if not Path(args.folder).is_dir():
        raise UserError(f"--folder {args.folder}: no such folder; name one with {args.gigabytes:g} GB of free space")
    results = {"whole": [], "column": [], "ours": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "openprompts.csv"
        build(path, rows, args.gigabytes * 1e9)
        print(f"{path.stat().st_size / 1e9:.2f} GB; the machine has {os.cpu_count()} cores")
        for _ in range(args.rounds):
            for how, measured in results.items():
                command = [sys.executable, "-m", "speed.prompts", "--read", how, str(path)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY)
                measured.append(json.loads(done.stdout))
                seconds, peak, count = measured[-1]
                print(f"{how:<8}{seconds:8.1f} s{peak / 1e9:8.2f} GB{count:12,} prompts", flush=True)
    best = {how: [min(values) for values in zip(*measured, strict=True)] for how, measured in results.items()}
    for how in ("column", "ours"):
        ratios = [mine / whole for mine, whole in zip(best[how], best["whole"], strict=True)]
        print(f"{how} : whole   time {ratios[0]:.2f}   peak memory {ratios[1]:.2f}")


if __name__ == "__main__":
    run_program(main)
