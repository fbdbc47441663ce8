"""The record of a run: options.json, and metrics.csv with one row per step."""

import csv
import json
import math
import os
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from textcraftor.errors import UserError, first_line
from textcraftor.files import check_writable, read_json_object, write_whole

OPTIONS_FILE = "options.json"
RESTART = "start another run elsewhere (--output-path), from the text encoder in {folder} if it has one (--text_path)"


def check_folder(folder, resume):
    """Raise UserError if `folder` cannot be written to, holds a run that would be overwritten, or none to resume."""
    folder = Path(folder)
    check_writable(folder, "--output-path")
    has_run = (folder / OPTIONS_FILE).is_file()
    if has_run and not resume and not _stopped_at_once(folder):
        raise UserError(f"{folder} holds a run: continue it with --resume, or choose another --output-path")
    if resume:
        if not has_run:
            raise UserError(f"--resume: no run in {folder}; leave out --resume to start one there")
        read_options(folder)
        if not (folder / "metrics.csv").is_file():
            raise UserError(f"--resume: {folder}/metrics.csv is missing; put it back, or start another run elsewhere")


@contextmanager
def only_run(folder):
    """A context in which no other run may write to `folder`; UserError if one already does.

    The operating system lifts the lock when the process ends, however it ends. Only the main process takes it. A folder
    made for it goes again if nothing was written there.
    """
    folder = Path(folder)
    lock, is_new = folder / ".lock", not folder.exists()
    with ExitStack() as held:
        if os.environ.get("RANK", "0") == "0":
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(lock, timeout=0, fallback_to_soft=False))
            except Timeout:
                raise UserError(
                    f"{folder}: another run is writing here; wait for its end, or choose another --output-path"
                ) from None
            except OSError as problem:  # a network file system without locks
                print(f"{folder}: cannot be locked ({first_line(problem)}): start no second run here", flush=True)
            held.callback(_remove_if_unused, folder, lock, is_new)
        yield


def _remove_if_unused(folder, lock, is_new):
    if is_new and set(folder.iterdir()) <= {lock}:
        lock.unlink(missing_ok=True)
        folder.rmdir()


def _stopped_at_once(folder):
    """Whether the run in `folder` ended before its first update, for lack of memory, say: nothing is lost with it."""
    try:
        return not any((folder / "resume").glob("step_*")) and len(read_rows(folder / "metrics.csv")) <= 1
    except (OSError, ValueError, TypeError):
        return False


def read_options(folder):
    """The options that the run in `folder` recorded, a dict; UserError if the file is damaged."""
    return read_json_object(Path(folder) / OPTIONS_FILE, "start another run elsewhere")


def read_rows(path):
    """The rows of a metrics.csv, dicts of numbers without the empty cells.

    Raises OSError, ValueError or TypeError if the file is damaged; half a last row, as of a killed run, is left out.
    """
    text = Path(path).read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1].splitlines()
    rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(whole)]
    if any("step" not in row for row in rows):
        raise ValueError("a row has no step")
    return rows


class Record:
    """The rows of metrics.csv. The progress line, the curves and the best score are computed from them, so they are the
    same in a resumed run.

    A row is a dict of numbers, one of them "step"; values that a step does not have, such as validation scores, are
    left out.
    """

    def __init__(self, folder, columns, writes=True):
        """columns: those of metrics.csv; writes: whether this process writes the file (the main one does)."""
        self.folder, self.path = Path(folder), Path(folder) / "metrics.csv"
        self.columns, self.writes, self.rows, self.behind = columns, writes, [], False

    def start(self, options):
        """Begin a run: write its options (a dict) and an empty metrics.csv."""
        if self.writes:
            self._rewrite()
            with write_whole(self.folder / OPTIONS_FILE) as file:
                file.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")

    def check(self, options, compared):
        """Raise UserError if any `compared` option of the run to resume differs from `options`."""
        earlier = read_options(self.folder)
        options = json.loads(json.dumps(options))
        for name in compared:
            if options[name] != earlier.get(name):
                found = f"has {name} = {earlier.get(name)}, not {options[name]}"
                if name == "content":
                    before = earlier.get(name) or {}
                    changed = [what for what, value in options[name].items() if value != before.get(what)]
                    found = f"had different {', '.join(changed) or 'files'} (compared by content)"
                raise UserError(
                    f"--resume: the run in {self.folder} {found}; repeat its options, or start another run with "
                    "another --output-path"
                )

    def resume(self, last_step):
        """Continue a run: read its rows and drop those after `last_step`.

        Raises UserError if they are damaged, or have other columns.
        """
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                found = next(csv.reader(file), [])
            self.rows = [row for row in read_rows(self.path) if row["step"] <= last_step]
            if [row["step"] for row in self.rows] != list(range(last_step + 1)):
                raise ValueError(f"expected one row for each of the steps 0 to {last_step}, found {len(self.rows)}")
        except (OSError, ValueError, TypeError) as problem:
            raise UserError(
                f"--resume: {self.path} is damaged ({first_line(problem)}); {RESTART.format(folder=self.folder)}"
            ) from problem
        if set(found) != set(self.columns):
            differing = ", ".join(sorted(set(found) ^ set(self.columns)))
            raise UserError(
                f"--resume: {self.path} does not have the columns of this run ({differing}); repeat its --monitor, or "
                "start another run elsewhere"
            )
        if self.writes:
            self._rewrite()

    def add(self, row):
        """Keep a row, and append it to metrics.csv."""
        self.rows.append(_rounded(row))
        self._write(whole=False)

    def amend(self, values):
        """Add values to the last row."""
        self.rows[-1] |= _rounded(values)
        self._write(whole=True)

    def _write(self, whole):
        """Append the last row to metrics.csv, or write all. On a full disk the run goes on, and says so once: the next
        row that can be written brings all that are missing."""
        if not self.writes:
            return
        try:
            if whole or self.behind:
                self._rewrite()
            else:
                _append(self.path, self.columns, self.rows[-1:])
            self.behind = False
        except (OSError, UserError) as problem:
            if not self.behind:
                tqdm.write(f"{self.path}: NOT WRITTEN ({first_line(problem)}); free some space, and it will be")
            self.behind = True

    def mean(self, name, window):
        """The mean of a column over its last `window` finite values; NaN if there is none."""
        finite = (row[name] for row in reversed(self.rows) if math.isfinite(row.get(name, math.nan)))
        values = list(islice(finite, window))
        return sum(values) / len(values) if values else math.nan

    def line(self, names, window):
        """Means of columns over the last `window` steps and the newest validation score, for the progress bar."""
        parts = [f"{name} {self.mean(name, window):.4g}" for name in names]
        return " ".join([*parts, f"| held out {self.mean('val_total', 1):.4g}"])

    def best(self, name):
        """The largest value of a column so far, -inf if there is none."""
        return max((row[name] for row in self.rows if row.get(name, math.nan) > -math.inf), default=-math.inf)

    def _rewrite(self):
        with write_whole(self.path) as unfinished:
            with open(unfinished, "w", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writeheader()
            _append(unfinished, self.columns, self.rows)


def _rounded(row):
    return {name: float(f"{value:.9g}") for name, value in row.items()}  # as a resumed run will read it


def _append(path, columns, rows):
    with open(path, "a", newline="", encoding="utf-8") as file:
        for row in rows:
            cells = {name: f"{value:.9g}" for name, value in row.items()}
            csv.DictWriter(file, columns).writerow(cells)
