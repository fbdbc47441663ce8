"""Read the output folders of test_parti.py and test_hpsv2.py, and find what can be compared between them."""

import csv
import hashlib
import math
import string
from pathlib import Path
from typing import NamedTuple

from textcraftor.errors import UserError, first_line
from textcraftor.files import read_json_object

COMPARED = ("text_path (sha256)", "unet (sha256)", "prompt_eng (sha256)")  # settings that users compare on purpose
SOURCES = ("model", "text_path", "unet_path", "prompt_eng", "score_only")
UNKNOWN = "–"
REQUIRED = ("index", "prompt", "category", "file")
OPTIONAL = ("challenge", "extended")
AGAIN = "run the benchmark again with the same --output_path"


class Run(NamedTuple):
    """One run. rows: by (index, prompt), each with its scores as floats or with a "problem"."""

    label: str  # A, B, ...
    name: str
    folder: Path
    settings: dict
    summary: dict
    scores: list[str]
    rows: dict[tuple[int, str], dict]

    def image(self, key):
        """The path of an image. After --score_only, images are in the folder that was scored, if it still exists."""
        folder = Path(self.settings.get("score_only") or self.folder)
        return (folder if folder.is_dir() else self.folder) / self.rows[key]["file"]


def read_runs(folders):
    """Read the folders as runs A, B, ...; UserError if one is not a finished run, or the runs are not comparable."""
    folders = [Path(folder) for folder in folders]
    if len(folders) > len(string.ascii_uppercase):
        raise UserError(f"{len(folders)} runs given, but at most {len(string.ascii_uppercase)} can be compared")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the same run is given twice; give different ones")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(*about) for about in zip(string.ascii_uppercase[: len(names)], names, folders, strict=True)]
    for other in runs[1:]:
        check_comparable(runs[0], other)
    return runs


def read_run(label, name, folder):
    """Read one run; UserError, in one line, if a file is missing, incomplete or damaged."""
    if not (folder / "summary.json").is_file():
        raise UserError(
            f"{folder}: no summary.json found; expected the output folder of a finished test_parti.py or test_hpsv2.py"
        )
    settings, summary = (read_json_object(folder / name, AGAIN) for name in ("settings.json", "summary.json"))
    scores = summary.get("scores")
    if not isinstance(scores, dict) or not scores:
        raise UserError(f"{folder / 'summary.json'}: lists no scores; {AGAIN}")
    if not isinstance(settings.get("benchmark"), str):
        raise UserError(f"{folder / 'settings.json'}: does not say which benchmark was run; {AGAIN}")
    rows = _read_scores(folder / "scores.csv", list(scores))
    images = summary.get("images")
    expected = images.get("scored") if isinstance(images, dict) else None
    found = sum("problem" not in row for row in rows.values())
    if isinstance(expected, int) and found < expected:  # more, after a run with a lower --limit
        raise UserError(f"{folder / 'scores.csv'}: has {found} scored images, summary.json says {expected}; {AGAIN}")
    return Run(label, name, folder, settings, summary, list(scores), rows)


def _read_scores(path, scores):
    """The rows of a scores.csv by (index, prompt)."""
    rows = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
            reader = csv.DictReader(file)
            missing = [name for name in (*REQUIRED, *scores) if name not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise UserError(f"{path}: no column {missing[0]!r}, found columns: {found}; {AGAIN}")
            for cells in reader:
                place = f"{path}, line {reader.line_num}"
                row = _read_row(cells, scores, place)
                if rows.setdefault((row["index"], row["prompt"]), row) is not row:
                    raise UserError(f"{place}: image {row['index']} is listed twice; {AGAIN}")
    except (OSError, ValueError, csv.Error) as problem:
        reason = getattr(problem, "strerror", None) or first_line(problem)  # an OSError's text repeats the path
        raise UserError(f"{path}: cannot be read ({reason}); {AGAIN}") from problem
    return rows


def _read_row(cells, scores, place):
    """One row of scores.csv, checked; a row without scores gets a "problem"."""
    if None in cells or None in cells.values():
        raise UserError(f"{place}: has more or fewer cells than the header; {AGAIN}")
    if not cells["index"].isdecimal():
        raise UserError(f"{place}: index is {cells['index']!r}, expected a whole number; {AGAIN}")
    row = {name: cells[name] for name in (*REQUIRED, *OPTIONAL) if name in cells} | {"index": int(cells["index"])}
    if not all(cells[name] for name in scores):
        return row | {"problem": "no score"}
    for name in scores:
        try:
            row[name] = float(cells[name])
        except ValueError:
            row[name] = math.nan
        if not math.isfinite(row[name]):
            raise UserError(f"{place}: {name} is {cells[name]}, expected a finite number; {AGAIN}")
    return row


def check_comparable(first, other):
    """Raise UserError if scores of the two runs have different meanings."""

    def refuse(what, name, remedy):
        values = ", ".join(_short(name, run.settings.get(name)) for run in (first, other))
        raise UserError(f"{first.folder} and {other.folder} differ in {what} ({values}): {remedy}")

    ours, theirs = first.settings, other.settings
    for name, remedy in (
        ("benchmark", "compare runs of the same benchmark"),
        ("prompts (sha256)", "compare runs on the same list of prompts"),
    ):
        if ours.get(name) != theirs.get(name):
            refuse(name, name, remedy)
    shared = [score for score in first.scores if score in other.scores]
    for score in shared:
        name = f"{score} (sha256)"
        if ours.get(name) != theirs.get(name):
            refuse(f"the weights of {score}", name, "score the images of both with the same weights, with --score_only")
    if not shared:
        names = " and ".join(f"{run.folder} ({', '.join(run.scores)})" for run in (first, other))
        raise UserError(
            f"no score in common: {names}; score the images of one run as those of the other, with --score_only"
        )


def pair(runs):
    """Return ([score], [(index, prompt)]): the scores that all runs have, and the images that all runs have scored.

    Raises UserError if either is empty.
    """
    columns = [name for name in runs[0].scores if all(name in run.scores for run in runs)]
    if not columns:
        raise UserError("no score in common to all runs")
    keys = [key for key in runs[0].rows if all("problem" not in run.rows.get(key, {"problem": ""}) for run in runs)]
    if not keys:
        raise UserError("no prompt in common whose image every run has scored")
    return columns, keys


def notes(runs, columns, keys):
    """Lines of text for the reader of a comparison: what was left out, and how else the runs differ."""
    lines = []
    for run in runs:
        problems = sum("problem" in row for row in run.rows.values())
        unpaired = len(run.rows) - len(keys) - problems
        for count, why in ((problems, "have no score"), (unpaired, "were not scored in every other run")):
            if count:
                lines.append(f"{run.label}: {count} of {len(run.rows)} images are left out: they {why}")
    for score in dict.fromkeys(name for run in runs for name in run.scores):
        if score not in columns:
            lacking = ", ".join(run.label for run in runs if score not in run.scores)
            lines.append(f"{score} is left out: not measured in {lacking}")
    prompts = [scored_prompts(run) for run in runs]
    if len(set(prompts)) > 1:
        told = ", ".join(f"{run.label} with the {kind} ones" for run, kind in zip(runs, prompts, strict=True))
        lines.append(f"the runs were scored with different prompts: {told}")
    lines += [f"{run.label}: how its images were made is not known" for run in runs if "seed" not in run.settings]
    for name, values in settings_table(runs).items():
        if len({*values} - {UNKNOWN}) > 1 and name not in (*COMPARED, *SOURCES, "score_prompt"):
            told = ", ".join(f"{run.label} {value}" for run, value in zip(runs, values, strict=True))
            lines.append(f"the runs differ in {name}: {told}")
    return lines


def scored_prompts(run):
    """Which prompts a run was scored with: "original" (the benchmark's) or "extended" (by a language model)."""
    return run.settings.get("score_prompt", "original")


def settings_table(runs):
    """{name: [value of each run]} of all settings that the runs' images were generated and scored with."""
    every = [{name: run.summary.get(name) for name in SOURCES} | run.settings for run in runs]
    names = dict.fromkeys(name for settings in every for name in settings)
    table = {name: [_short(name, settings.get(name)) for settings in every] for name in names}
    return {name: values for name, values in table.items() if set(values) != {UNKNOWN}}


def _short(name, value):
    if value in (None, ""):
        return UNKNOWN
    return str(value)[:12] if "(sha256)" in name else str(value)


def comparison_hash(runs):
    """A hash of the runs' settings and scores, in the order of the runs: votes are only valid for these."""
    digest = hashlib.sha256()
    for run in runs:
        for file in ("settings.json", "scores.csv"):
            digest.update(hashlib.sha256((run.folder / file).read_bytes()).digest())
    return digest.hexdigest()[:16]
