"""What a benchmark run writes: settings.json, scores.csv, summary.json and results.md."""

import csv
import io
import json
import math
import os
from pathlib import Path

import numpy as np

from textcraftor.errors import UserError, first_line

GROUPS = 10  # of a style, whose means' deviation is reported
SCORING = ("hps_v", "clip", "aesthetic", "pickscore")  # how the names of the settings begin that make no image another


class Table:
    """scores.csv: one row an image, of what is known of it and its scores; empty scores where it has none."""

    def __init__(self, path, about, scores):
        self.path, self.about, self.scores = path, about, scores

    def read(self, rows):
        """{index: row} of those of `rows` that the file has complete with scores, as they stand there.

        Nothing else counts: half a last row, and rows of files that could not be scored.
        """
        if not self.path.is_file():
            return {}
        with open(self.path, encoding="utf-8", newline="") as file:
            text = file.read()
        known = {row["index"]: row for row in rows}
        done = {}
        for cells in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")):
            row = known.get(int(cells["index"])) if (cells["index"] or "").isdigit() else None
            if not row or cells["prompt"] != row["prompt"] or not all(cells[name] for name in self.scores):
                continue
            scores = {name: float(cells[name]) for name in self.scores}
            if all(map(math.isfinite, scores.values())):
                done[row["index"]] = {name: cells[name] for name in self.about} | {"index": row["index"]} | scores
        return done

    def add(self, rows):
        """Append rows."""
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            self._write(file, rows)

    def write(self, rows):
        """Replace the file by the header and these rows."""
        unfinished = self.path.with_name(f"{self.path.name}.tmp")
        with open(unfinished, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([*self.about, *self.scores])
            self._write(file, rows)
        os.replace(unfinished, self.path)

    def _write(self, file, rows):
        # Lines end as csv ends them: with a bare "\n" it leaves "\r" in a prompt unquoted, before Python 3.13.
        for row in rows:
            scores = [f"{row[name]:.7g}" if name in row else "" for name in self.scores]
            csv.writer(file).writerow([*(row[name] for name in self.about), *scores])


def check_settings(folder, settings, rows):
    """Raise UserError if the run in `folder` has other settings, or it has images of `rows` and no run."""
    path = folder / "settings.json"
    if not path.is_file():
        for row in rows:
            if (folder / row["file"]).exists():
                raise UserError(
                    f"{folder} holds {row['file']}, of no run that is known; choose another --output_path, "
                    f"or score what is there by --score_only {folder}"
                )
        return
    earlier = read_settings(folder)
    differing = [name for name in dict.fromkeys([*settings, *earlier]) if settings.get(name) != earlier.get(name)]
    if differing:
        same_images = all(name.startswith(SCORING) for name in differing)
        score = f", or score its images anew by --score_only {folder} --output_path …" if same_images else ""
        raise UserError(
            f"{folder} holds a run with {differing[0]} = {earlier.get(differing[0])}, not "
            f"{settings.get(differing[0])}; repeat its settings, or choose another --output_path{score}"
        )


def read_settings(folder):
    """The settings that the run in `folder` recorded, a dict; UserError if the file is damaged."""
    path = Path(folder) / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"{path} cannot be read ({first_line(problem)}); choose another --output_path") from problem
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings of a run; choose another --output_path")
    return settings


def write_results(folder, summary):
    """Write summary.json, add the run to results.md, and say what came out on the screen."""
    write_whole(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    add_result(folder / "results.md", summary)
    for file, why in summary["images"]["unreadable"].items():
        print(f"{file}: {why}")
    print(describe(summary))
    for name in ("scores.csv", "summary.json", "results.md"):
        print(folder / name)


def add_result(path, summary):
    """Add a run's line to the table of results, unless it stands there already."""
    settings, scores = summary["settings"], summary["scores"]
    cells = {"benchmark": summary["benchmark"], "images": "{scored} of {of}".format(**summary["images"])}
    cells |= {name: f"{score['mean']:.5g} ± {score['std']:.3g}" for name, score in scores.items()}
    if summary.get("styles"):
        styles = [f"{name} {style['mean']:.2f} ± {style['std']:.2f}" for name, style in summary["styles"].items()]
        cells |= {"100 × score by style": ", ".join([*styles, f"average {summary['average']:.2f}"])}
    hashes = (f"{name.removesuffix(' (sha256)')} {value[:8]}" for name, value in settings.items() if "(sha256)" in name)
    told = {name: summary.get(name) for name in ("model", "text_path", "unet_path", "prompt_eng", "limit")}
    told |= {name: value for name, value in settings.items() if "(sha256)" not in name and name != "benchmark"}
    told = {name: value for name, value in told.items() if value}
    cells |= {"settings": ", ".join(f"{name} {value}" for name, value in told.items()), "sha256": ", ".join(hashes)}
    cells |= {"versions": ", ".join(f"{name} {number}" for name, number in summary["versions"].items())}
    line = "| " + " | ".join(cells.values()) + " |\n"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not text:
        text = "| " + " | ".join(cells) + " |\n" + "| --- " * len(cells) + "|\n"
    if line not in text:
        write_whole(path, text + line)


def describe(summary):
    """A summary as a table for the screen."""
    images, scores = summary["images"], summary["scores"]
    lines = [f"{summary['benchmark']}, {images['scored']} of {images['of']} images scored"]
    if images["prompts_cut"]:
        lines.append(f"{images['prompts_cut']} prompts are longer than the text encoder reads, and were cut")
    if "score_prompt" in summary["settings"]:
        lines.append(f"scored with the {summary['settings']['score_prompt']} prompts")
    rows = {"all": {"count": images["scored"], **{name: score["mean"] for name, score in scores.items()}}}
    rows |= summary["category"] | summary.get("challenge", {})
    lines.append("".join([" " * 26, *(f"{name:>11}" for name in ("images", *scores))]))
    for label, row in rows.items():
        lines.append("".join([f"{label:<26}{row['count']:>11}", *(f"{row[name]:>11.4f}" for name in scores)]))
    for name, style in summary.get("styles", {}).items():
        lines.append(f"100 × {name:<20}{style['mean']:>11.2f} ± {style['std']:.4f}")
    if summary.get("average") is not None:
        lines.append(f"100 × average{summary['average']:>24.2f}")
    return "\n".join(lines)


def write_whole(path, text):
    """Write a text file beside its place, then rename it: nobody ever sees half of it."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def summarize(rows, columns, groups):
    """Means of the score columns over all rows that have them, and by each column of `groups`.

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
    """100 × HPSv2 a style, as its own program reports it -> ({style: {"mean", "std", "count"}}, mean of all images).

    std: of the means of ten groups of images next to each other, by their place in the list of their style; sizes:
    {style: prompts in the whole list}, so that with a part of 800 images the groups still are of 80.
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
