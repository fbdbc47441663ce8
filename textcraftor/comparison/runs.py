"""Output folders of test_parti.py and test_hpsv2.py, read to be compared."""

import csv
import hashlib
import json
import math
import string
from pathlib import Path
from typing import NamedTuple

from textcraftor.errors import UserError, first_line

# Settings that are expected to differ, being what is compared.
COMPARED = ("text_path (sha256)", "unet (sha256)", "prompt_eng (sha256)")
SOURCES = ("model", "text_path", "unet_path", "prompt_eng", "score_only")
UNKNOWN = "–"


class Run(NamedTuple):
    """One run: its settings, and its rows by (index, prompt), with scores as floats or a "problem"."""

    label: str  # A, B, …
    name: str
    folder: Path
    settings: dict
    summary: dict
    scores: list[str]
    rows: dict[tuple[int, str], dict]

    def image(self, key):
        """The path of an image; one that --score_only scored lies in the folder that it was given, if that is there."""
        folder = Path(self.settings.get("score_only") or self.folder)
        return (folder if folder.is_dir() else self.folder) / self.rows[key]["file"]


def read_runs(folders):
    """Runs A, B, … of the folders; UserError for a folder that is no finished run, or if they cannot be compared."""
    folders = [Path(folder) for folder in folders]
    if len(folders) > len(string.ascii_uppercase):
        raise UserError(f"{len(folders)} runs: at most {len(string.ascii_uppercase)} can be compared")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; name different ones")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(*about) for about in zip(string.ascii_uppercase[: len(names)], names, folders, strict=True)]
    for other in runs[1:]:
        check_comparable(runs[0], other)
    return runs


def read_run(label, name, folder):
    """The run in a folder; UserError, one line, for what is missing or malformed."""
    if not (folder / "summary.json").is_file():
        raise UserError(
            f"{folder}: no summary.json in it; expected the output folder of a finished test_parti.py or test_hpsv2.py"
        )
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        scores = list(summary["scores"])
        with open(folder / "scores.csv", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = [_read_row(row, scores, f"{folder / 'scores.csv'}, line {reader.line_num}") for row in reader]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{folder}: cannot be read as a benchmark's run ({first_line(problem)})") from problem
    if not scores or "benchmark" not in settings:
        raise UserError(f"{folder}: holds no scores of a benchmark")
    return Run(label, name, folder, settings, summary, scores, {(row["index"], row["prompt"]): row for row in rows})


def _read_row(cells, scores, place):
    row = {name: cells[name] for name in ("prompt", "category", "file")} | {"index": int(cells["index"])}
    row |= {name: cells[name] for name in ("challenge", "extended") if name in cells}
    if not all(cells[name] for name in scores):
        return row | {"problem": "no score"}
    row |= {name: float(cells[name]) for name in scores}
    for name in scores:
        if not math.isfinite(row[name]):
            raise UserError(f"{place}: {name} is {cells[name]}, no number to compare; run the benchmark again")
    return row


def check_comparable(first, other):
    """Raise UserError if the two runs' scores mean different things."""

    def refuse(what, before, after, remedy):
        raise UserError(f"{first.folder} and {other.folder} differ in {what} ({before}, {after}): {remedy}")

    ours, theirs = first.settings, other.settings
    for name, remedy in (
        ("benchmark", "compare runs of the same one"),
        ("prompts (sha256)", "compare runs of the same list of prompts"),
        ("hps_version", "score the images of one again with --score_only, the other's --hps_version and a new folder"),
    ):
        if ours.get(name) != theirs.get(name):
            refuse(name, _short(name, ours.get(name)), _short(name, theirs.get(name)), remedy)
    for score in first.scores:
        name = f"{score} (sha256)"
        if score in other.scores and ours.get(name) != theirs.get(name):
            values = _short(name, ours.get(name)), _short(name, theirs.get(name))
            refuse(f"the weights of {score}", *values, "score the images of both with the same, by --score_only")
    if not set(first.scores) & set(other.scores):
        raise UserError(f"{first.folder} and {other.folder} have no score in common")


def pair(runs):
    """What can be compared: ([score], [(index, prompt)] of the images that every run has scored).

    Raises UserError if nothing is left.
    """
    columns = [name for name in runs[0].scores if all(name in run.scores for run in runs)]
    if not columns:
        raise UserError("the runs have no score that all of them share")
    keys = [key for key in runs[0].rows if all("problem" not in run.rows.get(key, {"problem": ""}) for run in runs)]
    if not keys:
        raise UserError("the runs have no prompt that all of them have an image of")
    return columns, keys


def notes(runs, columns, keys):
    """What a reader of the comparison must know, as lines: what was left out, and what else sets the runs apart."""
    lines = []
    for run in runs:
        problems = sum("problem" in row for row in run.rows.values())
        unpaired = len(run.rows) - len(keys) - problems
        for count, why in ((problems, "have no score"), (unpaired, "have no partner in every other run")):
            if count:
                lines.append(f"{run.label}: {count} of {len(run.rows)} images {why} and are left out")
    for score in dict.fromkeys(name for run in runs for name in run.scores):
        if score not in columns:
            having = ", ".join(run.label for run in runs if score in run.scores)
            lines.append(f"{score} is left out, being known of {having} alone")
    prompts = [scored_prompts(run) for run in runs]
    if len(set(prompts)) > 1:
        told = ", ".join(f"{run.label} with the {kind} ones" for run, kind in zip(runs, prompts, strict=True))
        lines.append(f"scored with different prompts: {told}")
    lines += [f"{run.label}: how its images were made is not known" for run in runs if "seed" not in run.settings]
    for name, values in settings_table(runs).items():
        if len({*values} - {UNKNOWN}) > 1 and name not in (*COMPARED, *SOURCES, "score_prompt"):
            told = ", ".join(f"{run.label} {value}" for run, value in zip(runs, values, strict=True))
            lines.append(f"the runs differ in {name}: {told}")
    return lines


def scored_prompts(run):
    """Which prompts a run's scores use: those of the benchmark or those that a language model extended."""
    return run.settings.get("score_prompt", "original")


def settings_table(runs):
    """{name: [value of each run]} of all that the runs were made and scored with."""
    every = [{name: run.summary.get(name) for name in SOURCES} | run.settings for run in runs]
    names = dict.fromkeys(name for settings in every for name in settings)
    table = {name: [_short(name, settings.get(name)) for settings in every] for name in names}
    return {name: values for name, values in table.items() if set(values) != {UNKNOWN}}


def _short(name, value):
    if value in (None, ""):
        return UNKNOWN
    return str(value)[:12] if "(sha256)" in name else str(value)


def comparison_hash(runs):
    """Names the comparison of just these results, in this order."""
    digest = hashlib.sha256()
    for run in runs:
        for file in ("settings.json", "scores.csv"):
            digest.update(hashlib.sha256((run.folder / file).read_bytes()).digest())
    return digest.hexdigest()[:16]
