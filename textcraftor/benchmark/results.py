"""The files of a benchmark run: settings.json, scores.csv, summary.json and results.md."""

import csv
import io
import math
import os
from pathlib import Path

import numpy as np

from textcraftor.errors import UserError, first_line
from textcraftor.files import check_writable, read_json_object, write_json, write_whole

GROUPS = 10  # per style; the standard deviation of their means is reported
SCORING = ("hps_v", "clip", "aesthetic", "pickscore")  # settings that begin like this change scores, but no image
SETTINGS, SCORES, SUMMARY, RESULTS = FILES = ("settings.json", "scores.csv", "summary.json", "results.md")
ELSEWHERE = "choose another --output_path"


class Table:
    """scores.csv: one row per image with what is known of it and its scores, left empty if it has none."""

    def __init__(self, path, about, scores):
        """about: columns before the scores; scores: columns of scores."""
        self.path, self.about, self.scores = path, about, scores

    def read(self, rows):
        """{index: row} of those of `rows` that the file has with all their scores.

        Left out are cut or edited rows that no longer match, and images that could not be scored. Raises UserError if
        the file as a whole cannot be read as such a table.
        """
        if not self.path.is_file():
            return {}
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
                text = file.read()
            text = text[: text.rfind("\n") + 1]  # an interrupted run may leave half a last row
            reader = csv.DictReader(io.StringIO(text, newline=""))
            found, header = list(reader), reader.fieldnames
        except (OSError, ValueError, csv.Error) as problem:
            raise UserError(f"{self.path}: cannot be read ({first_line(problem)}); {self._remedy()}") from problem
        if text and header != [*self.about, *self.scores]:
            raise UserError(
                f"{self.path}, line 1: found {','.join(header)[:80]!r}, expected the columns "
                f"{','.join([*self.about, *self.scores])}; {self._remedy()}"
            )
        known = {str(row["index"]): row for row in rows}
        complete = (self._complete(cells, known.get(cells["index"])) for cells in found)
        return {row["index"]: row for row in complete if row}

    def _complete(self, cells, expected):
        """The row in `cells`, or None unless it has all scores and the content that is expected of it."""
        if expected is None or None in cells or None in cells.values() or "" in cells.values():
            return None
        if any(cells[name] != str(value) for name, value in expected.items()):
            return None
        try:
            scores = {name: float(cells[name]) for name in self.scores}
        except ValueError:
            return None
        if not all(map(math.isfinite, scores.values())):
            return None
        return {name: cells[name] for name in self.about} | {"index": expected["index"]} | scores

    def _remedy(self):
        return "restore it, or remove it to generate and score all images again"

    def add(self, rows):
        """Append rows, all of them or none."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                self._write(file, rows)
        except OSError as problem:
            os.truncate(self.path, size)
            raise UserError(f"{self.path}: cannot be written ({problem.strerror})") from problem

    def write(self, rows):
        """Replace the file by the header and these rows."""
        with write_whole(self.path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([*self.about, *self.scores])
            self._write(file, rows)

    def _write(self, file, rows):
        # csv's own line ends: with a bare "\n", it leaves a "\r" in a prompt unquoted before Python 3.13.
        for row in rows:
            scores = [f"{row[name]:.7g}" if name in row else "" for name in self.scores]
            csv.writer(file).writerow([*(row[name] for name in self.about), *scores])


def check_output(folder, rows):
    """Raise UserError unless the files of a run, with images for `rows`, can be written in `folder`."""
    for place in dict.fromkeys([folder, *(Path(folder, row["file"]).parent for row in rows)]):
        check_writable(place, "--output_path")
    for name in FILES:
        path = Path(folder, name)
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"--output_path {folder}: {path} is not a file; remove it, or {ELSEWHERE}")


def check_settings(folder, settings, rows, complete=True):
    """Raise UserError if the run in `folder` has other settings, or if there is none but its files would be replaced.

    rows: those whose images would be written. complete=False: `settings` are those known before models are loaded;
    others are not compared.
    """
    if not Path(folder, SETTINGS).is_file():
        for name in (SCORES, *(row["file"] for row in rows)):
            if Path(folder, name).exists():
                raise UserError(
                    f"{folder} holds {name}, but no settings.json of the run that made it; {ELSEWHERE}, or score its "
                    f"images with --score_only {folder} --output_path …"
                )
        return
    earlier = read_settings(folder)
    names = dict.fromkeys([*settings, *(earlier if complete else ())])
    differing = [name for name in names if settings.get(name) != earlier.get(name)]
    if differing:
        name = differing[0]
        same_images = all(name.startswith(SCORING) for name in differing)
        score = f", or score its images again with --score_only {folder} --output_path …" if same_images else ""
        raise UserError(
            f"{folder} holds a run with {name} = {earlier.get(name)}, not {settings.get(name)}; repeat its settings, "
            f"or {ELSEWHERE}{score}"
        )


def read_settings(folder):
    """The settings that the run in `folder` recorded, a dict; UserError if the file is damaged."""
    path = Path(folder, SETTINGS)
    settings = read_json_object(path, ELSEWHERE)
    if "benchmark" not in settings:
        raise UserError(f"{path}: holds no settings of a run; {ELSEWHERE}")
    return settings


def write_results(folder, summary):
    """Write summary.json, append the run to results.md, and print the results."""
    write_json(folder / SUMMARY, summary)
    add_result(folder / RESULTS, summary)
    for file, why in summary["images"]["unreadable"].items():
        print(f"{file}: {why}")
    print(describe(summary))
    for name in (SCORES, SUMMARY, RESULTS):
        print(folder / name)


def add_result(path, summary):
    """Append a run's line to the table in results.md, unless it is there already.

    The file is handled as bytes: users edit it, and whatever they wrote is kept.
    """
    settings, scores = summary["settings"], summary["scores"]
    cells = {"benchmark": summary["benchmark"], "images": "{scored} of {of}".format(**summary["images"])}
    cells |= {name: f"{score['mean']:.5g} ± {score['std']:.3g}" for name, score in scores.items()}
    if summary.get("styles"):
        styles = [f"{name} {style['mean']:.2f} ± {style['std']:.2f}" for name, style in summary["styles"].items()]
        styles += [f"average {summary['average']:.2f}"]
        cells |= {"100 × score by style": f"{_hps(summary)}: {', '.join(styles)}"}
    hashes = (f"{name.removesuffix(' (sha256)')} {value[:8]}" for name, value in settings.items() if "(sha256)" in name)
    told = {name: summary.get(name) for name in ("model", "text_path", "unet_path", "prompt_eng", "limit")}
    told |= {name: value for name, value in settings.items() if "(sha256)" not in name and name != "benchmark"}
    told = {name: value for name, value in told.items() if value}
    cells |= {"settings": ", ".join(f"{name} {value}" for name, value in told.items()), "sha256": ", ".join(hashes)}
    cells |= {"versions": ", ".join(f"{name} {number}" for name, number in summary["versions"].items())}
    line = _table_line(cells.values())
    content = path.read_bytes() if path.is_file() else b""
    content += b"\n" * (content[-1:] not in (b"", b"\n"))
    content = content or _table_line(cells) + b"| --- " * len(cells) + b"|\n"
    if line not in content:
        with write_whole(path) as unfinished:
            unfinished.write_bytes(content + line)


def _table_line(cells):
    return f"| {' | '.join(cells)} |\n".encode(errors="backslashreplace")


def _hps(summary):
    """The name of the HPS v2 score, which says its version: 2.0 and 2.1 cannot be compared."""
    return next(name for name in summary["scores"] if name.startswith("hps"))


def describe(summary):
    """The summary of a run as a text table."""
    images, scores = summary["images"], summary["scores"]
    lines = [f"{summary['benchmark']}, {images['scored']} of {images['of']} images scored"]
    if images["prompts_cut"]:
        lines.append(f"{images['prompts_cut']} prompts were cut: they have more tokens than the text encoder reads")
    if "score_prompt" in summary["settings"]:
        lines.append(f"scored with the {summary['settings']['score_prompt']} prompts")
    rows = {"all": {"count": images["scored"], **{name: score["mean"] for name, score in scores.items()}}}
    rows |= summary["category"] | summary.get("challenge", {})
    widths = {name: max(11, len(name) + 2) for name in scores}
    lines.append(f"{'':<26}{'images':>11}" + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for label, row in rows.items():
        cells = "".join(f"{row[name]:>{width}.4f}" for name, width in widths.items())
        lines.append(f"{label:<26}{row['count']:>11}{cells}")
    for name, style in summary.get("styles", {}).items():
        lines.append(f"{f'100 × {_hps(summary)}, {name}':<37}{style['mean']:>11.2f} ± {style['std']:.4f}")
    if summary.get("average") is not None:
        lines.append(f"{f'100 × {_hps(summary)}, average':<37}{summary['average']:>11.2f}")
    return "\n".join(lines)


def summarize(rows, columns, groups):
    """Means of the score columns over all scored rows, and within each group; groups: columns to group by.

    Returns {"images": {"scored", "of", "unreadable": {file: why}}, "scores": {column: {"mean", "std"}},
    group: {value: {"count", column: mean}}}.
    """
    scored = [row for row in rows if "problem" not in row]
    unreadable = {row["file"]: row["problem"] for row in rows if "problem" in row}
    summary = {"images": {"scored": len(scored), "of": len(rows), "unreadable": unreadable}, "scores": {}}
    for column in columns if scored else ():
        values = [row[column] for row in scored]
        summary["scores"][column] = {"mean": float(np.mean(values)), "std": float(np.std(values))}
    for group in groups:
        summary[group] = {}
        for value in sorted({row[group] for row in scored}):
            members = [row for row in scored if row[group] == value]
            means = {column: float(np.mean([row[column] for row in members])) for column in columns}
            summary[group][value] = {"count": len(members), **means}
    return summary


def style_scores(rows, column, sizes):
    """100 × HPS v2 of each style, as its own program reports it -> ({style: {"mean", "std", "count"}}, overall mean).

    std is the standard deviation of the means of ten groups of consecutive images. sizes: {style: number of prompts in
    its whole list}, so that a run with --limit has the same groups (of 80 for a list of 800), but fewer.
    """
    report, every = {}, []
    for style, size in sizes.items():
        groups = {}
        for row in rows:
            if row["category"] == style and "problem" not in row:
                group = int(Path(row["file"]).stem) // max(1, size // GROUPS)
                groups.setdefault(group, []).append(100 * row[column])
        if groups:
            scores = [score for group in groups.values() for score in group]
            std = float(np.std([np.mean(group) for group in groups.values()]))
            report[style] = {"mean": float(np.mean(scores)), "std": std, "count": len(scores)}
            every += scores
    return report, float(np.mean(every)) if every else None
