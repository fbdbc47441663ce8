"""Pictures of runs: captioned grids of samples, before and after training, reward curves, differences between runs."""

import io
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from textcraftor.files import write_whole
from textcraftor.fonts import NBSP, draw_text, plot_families, plot_text, wrap

# All in pixels.
MARGIN, GAP = 12, 4  # around cells; between the images of one cell
TEXT, LINE, TITLE = 13, 18, 17  # font size and line height of captions, font size of the title
SMALLEST = 192  # images with a shorter side are enlarged, by a whole factor
TITLES = {"total": "weighted total", "grad_norm": "gradient norm"}
CURVE_WINDOW = 20  # the thick lines are means over this many steps


def sample_grid(images, prompts, scores, step):
    """A PIL image of the sampled images, each above its prompt and total score; the title has the mean scores.

    images: (N, 3, H, W) uint8; prompts: M >= N; scores: {name: (M,)}, one of them "total".
    """
    notes = [f"total {score:.2f}" for score in scores["total"]]
    means = " · ".join(f"{name}{NBSP}{score.mean():.4g}" for name, score in scores.items())
    return grid([[image] for image in images], prompts, notes, f"step {step} · {means}")


def before_after_grid(before, after, prompts, tuned, path, ranked=0):
    """Write a PNG of image pairs, before training on the left and after it on the right, each above its prompt.

    before, after: (scores, images) as in sample_grid; tuned: what was trained and how long, for the title; ranked: show
    only this many pairs, chosen by spread_by_gain; 0 = all, in their order.
    """
    (first, first_images), (last, last_images) = before, after
    count = min(len(first_images), len(last_images))  # a run that an earlier version began kept fewer before
    pairs = list(zip(first_images[:count], last_images[:count], strict=True))
    shown, order = range(count), ""
    if ranked:
        gains = (last["total"] - first["total"])[:count]
        shown, order = spread_by_gain(gains, ranked), ", from the largest gain in total to the largest loss"
        order += f" ({len(shown)} of {count} pairs, evenly spaced)" if len(shown) < count else ""
    notes = [f"total {first['total'][i]:.2f} → {last['total'][i]:.2f}" for i in shown]
    ends = {name: (first[name].mean(), last[name].mean()) for name in last}
    means = " · ".join(f"{name}{NBSP}{x:.4g}{NBSP}→{NBSP}{y:.4g}" for name, (x, y) in ends.items())
    title = f"before (left) and after {tuned} (right){order} · {means}"
    save(grid([pairs[i] for i in shown], [prompts[i] for i in shown], notes, title), path)


def spread_by_gain(gains, most):
    """Choose at most `most` pairs that show gains and losses alike: indices from the largest gain to the largest loss,
    evenly spaced by rank, both ends included.

    gains: (N,) tensor, what each prompt's total gained.
    """
    ranks = torch.linspace(0, len(gains) - 1, min(most, len(gains))).round().long()
    return gains.argsort(descending=True, stable=True)[ranks].tolist()


def grid(groups, prompts, notes, title):
    """A page of cells, each with images side by side above a prompt and a note.

    groups: one sequence of (3, H, W) uint8 images per cell; there may be more prompts and notes than groups.
    """
    pixels = groups[0][0].shape[-2:]
    zoom = max(1, math.ceil(SMALLEST / min(pixels)))
    height, width = (side * zoom for side in pixels)
    cell = len(groups[0]) * (width + GAP) - GAP
    columns = _columns(len(groups), cell, height + 90)
    texts = [
        [*wrap(prompt, TEXT, cell, most=4), note]
        for prompt, note in zip(prompts[: len(groups)], notes[: len(groups)], strict=True)
    ]
    heading = wrap(title, TITLE, columns * (cell + MARGIN) - MARGIN)
    top = MARGIN + len(heading) * 24
    row_height = height + max(map(len, texts)) * LINE + 2 * MARGIN
    rows = math.ceil(len(groups) / columns)
    page = Image.new("RGB", (columns * (cell + MARGIN) + MARGIN, top + rows * row_height + MARGIN), "white")
    for number, line in enumerate(heading):
        draw_text(page, (MARGIN, MARGIN + 17 + 24 * number), line, TITLE)
    for index, (group, text) in enumerate(zip(groups, texts, strict=True)):
        x = MARGIN + index % columns * (cell + MARGIN)
        y = top + MARGIN + index // columns * row_height
        for number, image in enumerate(group):
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize((width, height), Image.LANCZOS)
            page.paste(picture, (x + number * (width + GAP), y))
        for number, line in enumerate(text):
            draw_text(page, (x, y + height + 4 + 13 + LINE * number), line, TEXT)
    return page


def _columns(count, width, height):
    """Columns for `count` cells that make a page about twice as wide as high, with few empty cells."""

    def badness(columns):
        rows = math.ceil(count / columns)
        return abs(math.log(columns * width / (rows * height) / 2)) + (columns * rows - count) / count

    return min(range(1, count + 1), key=badness)


def save(picture, path):
    """Write a PIL image as a PNG file, whole or not at all."""
    with write_whole(path) as unfinished:
        picture.save(unfinished, "PNG")


def reward_curves(rows, trained, monitors, path):
    """Write a PNG with one panel each for the weighted total, the rewards, the monitors and the gradient norm.

    rows: those of metrics.csv, as dicts. Training is drawn as a thin line with its running mean, held-out prompts as
    dots with a dotted line at their value before training.
    """
    names = ["total", *trained, *monitors, "grad_norm"]
    columns = min(3, len(names))
    with plt.rc_context(_style(names)):
        figure, axes = plt.subplots(
            math.ceil(len(names) / columns), columns, figsize=(4.6 * columns, 3.2 * math.ceil(len(names) / columns)),
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for axis, name in zip(axes.flat[: len(names)], names, strict=True):
            points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
            if points:
                steps, values = zip(*points, strict=True)
                window = [values[max(0, end - CURVE_WINDOW) : end] for end in range(1, len(values) + 1)]
                axis.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8)
                axis.plot(
                    steps, [sum(w) / len(w) for w in window], color="C0", label=f"training, mean of {CURVE_WINDOW}"
                )
            held_out = [(row["step"], row[f"val_{name}"]) for row in rows if f"val_{name}" in row]
            if held_out:
                axis.axhline(held_out[0][1], color="C1", linestyle=":", linewidth=1.2, label="held out, before")
                axis.plot(
                    *zip(*held_out, strict=True), "o-", color="C1", markersize=4, label="held out, as at test time"
                )
            note = " (monitor, never trained on)" if name in monitors else ""
            axis.set_title(TITLES.get(name) or plot_text(name) + note, fontsize=11)
            axis.set_xlabel("step")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in list(axes.flat)[len(names) :]:
            axis.set_visible(False)
        axes.flat[0].legend(fontsize=8)
        with write_whole(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=130)
        plt.close(figure)


def _style(labels):
    """Matplotlib settings for a plot whose labels users chose."""
    return {
        "text.parse_math": False,  # names may contain dollar signs
        "svg.hashsalt": "",  # reproducible files
        "font.family": plot_families(labels),
    }


def difference_plot(records, runs, kind="png"):
    """Plot mean differences to the first of `runs` (names) with intervals: a panel per score, a line per group.

    records: from statistics.compare_groups. Returns the bytes of a PNG or SVG file.
    """
    scores = list(dict.fromkeys(record["score"] for record in records))
    groups = list(dict.fromkeys((record["by"], record["group"]) for record in records))
    kinds = list(dict.fromkeys(by for by, _ in groups))
    places = {group: i + 0.7 * kinds.index(group[0]) for i, group in enumerate(groups)}  # a gap between kinds
    size = (2.2 + 2.9 * len(scores), 1.5 + 0.3 * max(places.values()) + 0.3 * (len(runs) > 2))
    style = _style([*runs, *scores, *(group for _, group in groups)])
    runs = [plot_text(run) for run in runs]
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, len(scores), figsize=size, sharey=True, squeeze=False, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1)
        for axis, score in zip(axes[0], scores, strict=True):
            for run in range(1, len(runs)):
                mine = [record for record in records if record["score"] == score and record["run"] == run]
                shift = 0.6 * ((run - 0.5) / (len(runs) - 1) - 0.5)
                y = [places[record["by"], record["group"]] + shift for record in mine]
                known = [(place, record) for place, record in zip(y, mine, strict=True) if record["low"] is not None]
                for place, record in known:
                    axis.plot([record["low"], record["high"]], [place, place], color=f"C{run - 1}", linewidth=1.6)
                axis.plot([record["difference"] for record in mine], y, "o", color=f"C{run - 1}", markersize=4.5)
            axis.axvline(0, color="0.35", linewidth=0.9)
            axis.set_title(plot_text(score), fontsize=11)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.grid(axis="x", alpha=0.25)
            axis.tick_params(axis="y", length=0)
            axis.spines[["top", "right", "left"]].set_visible(False)
        counts = {(record["by"], record["group"]): record["prompts"] for record in records}
        axes[0][0].set_yticks(
            list(places.values()), [f"{plot_text(group)} ({counts[by, group]})" for by, group in groups]
        )
        axes[0][0].set_ylim(max(places.values()) + 0.7, -0.7)
        other = runs[1] if len(runs) == 2 else "each run"
        figure.supxlabel(f"{other} − {runs[0]}\nmean difference, 95 % interval", fontsize=10)
        if len(runs) > 2:
            handles = [plt.Line2D([], [], color=f"C{run - 1}", marker="o") for run in range(1, len(runs))]
            figure.legend(handles, runs[1:], loc="outside upper center", ncols=len(handles), fontsize=9)
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
    return file.getvalue()
