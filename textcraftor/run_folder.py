"""What a run writes down as it goes: its options, and metrics.csv with one row a step."""

import csv
import json
import math
import os
from itertools import islice
from pathlib import Path

from textcraftor.errors import UserError


def check_folder(folder, resume):
    """Raise UserError if `folder` holds a run that would be overwritten, or none to resume."""
    has_run = (Path(folder) / "options.json").is_file()
    if has_run and not resume:
        raise UserError(f"{folder} holds a run: go on with it by --resume, or choose another --output-path")
    if resume and not has_run:
        raise UserError(f"--resume: no run in {folder}; leave --resume away to start one there")


class Record:
    """metrics.csv and its rows: progress line, curves and best score are derived from them, so a resume is too.

    A row is a dict of numbers with its "step"; what a step has not (validation, mostly) is left out of it.
    """

    def __init__(self, folder, columns, writes=True):
        """columns: those of metrics.csv; writes: False in all processes but one."""
        self.folder, self.path = Path(folder), Path(folder) / "metrics.csv"
        self.columns, self.writes, self.rows = columns, writes, []

    def start(self, options):
        """Begin a run: write its options (a dict) and an empty metrics.csv."""
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._rewrite()
            (self.folder / "options.json").write_text(json.dumps(options, indent=2) + "\n")

    def resume(self, options, last_step):
        """Go on with a run: forget the rows after `last_step`. Raises UserError if it had other options."""
        earlier = json.loads((self.folder / "options.json").read_text())
        for name, value in json.loads(json.dumps(options)).items():
            if value != earlier.get(name):
                raise UserError(
                    f"--resume: the run in {self.folder} has {name} = {earlier.get(name)}, not {value}; "
                    "repeat its options, or start another run in another --output-path"
                )
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1].splitlines()  # a run killed while writing leaves half a last row
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(whole)]
        self.rows = [row for row in rows if row["step"] <= last_step]
        if self.writes:
            self._rewrite()

    def add(self, row):
        """Keep a row, and add it to metrics.csv."""
        row = {name: float(f"{value:.9g}") for name, value in row.items()}  # as a resumed run will read it
        self.rows.append(row)
        if self.writes:
            _append(self.path, self.columns, [row])

    def mean(self, name, window):
        """The mean of a column over its last `window` finite values; NaN if there is none."""
        finite = (row[name] for row in reversed(self.rows) if math.isfinite(row.get(name, math.nan)))
        values = list(islice(finite, window))
        return sum(values) / len(values) if values else math.nan

    def line(self, names, window):
        """The means of columns over their last values, and the newest validation: what a progress bar has room for."""
        parts = [f"{name} {self.mean(name, window):.4g}" for name in names]
        return " ".join([*parts, f"| held out {self.mean('val_total', 1):.4g}"])

    def best(self, name):
        """The largest value of a column so far, -inf if there is none."""
        return max((row[name] for row in self.rows if row.get(name, math.nan) > -math.inf), default=-math.inf)

    def _rewrite(self):
        unfinished = self.path.with_name("metrics.csv.tmp")
        with open(unfinished, "w", newline="") as file:
            csv.DictWriter(file, self.columns).writeheader()
        _append(unfinished, self.columns, self.rows)
        os.replace(unfinished, self.path)


def _append(path, columns, rows):
    with open(path, "a", newline="") as file:
        for row in rows:
            cells = {name: f"{value:.9g}" for name, value in row.items()}
            csv.DictWriter(file, columns).writerow(cells)
