"""The results of a comparison as text tables and as report.html."""

import math
from html import escape

from textcraftor.comparison.pages import BLOCK, embed_json, image_blocks, svg_uri, write_page
from textcraftor.comparison.runs import scored_prompts
from textcraftor.pictures import difference_plot
from textcraftor.statistics import BOOTSTRAP_FROM, RESAMPLES

METHOD = (
    "Runs are paired by prompt. Differences: mean over prompts with a 95 % interval, from the percentile bootstrap "
    f"({RESAMPLES:,} resamples, each group resampled by itself) if there are {BOOTSTRAP_FROM} prompts or more, by "
    "Student's t if there are fewer; a single prompt has no interval. Win rates: share of prompts with the higher "
    "score, ties counted half, with 95 % Wilson intervals. Where there is no real difference, one interval in 20 "
    "excludes zero by chance."
)


def decimals(records):
    """{score: number of decimals that shows two digits of the half width of its interval over all prompts}."""
    found = {}
    for record in records:
        if record["by"] == "all":
            width = ((record["high"] or 0) - (record["low"] or 0)) / 2
            places = min(6, max(1, 1 - math.floor(math.log10(width)))) if width > 0 else 4
            found[record["score"]] = max(places, found.get(record["score"], 0))
    return found


def signed(value, places):
    """A difference as text, with its sign; a true minus, not a hyphen."""
    text = f"{value:+.{places}f}"
    return (text[1:] if float(text) == 0 else text).replace("-", "−")


def _number(value, places):
    return f"{value:.{places}f}".replace("-", "−")


def interval(record, places):
    """The interval of a record's difference, as text."""
    if record["low"] is None:
        return "–"
    return f"{signed(record['low'], places)} … {signed(record['high'], places)}"


def clear(record):
    """1 if the interval of a record's difference lies above zero, -1 if below, 0 if it includes zero."""
    return 0 if record["low"] is None else (record["low"] > 0) - (record["high"] < 0)


def comparison_tables(about, records):
    """The comparison as text tables."""
    places = decimals(records)
    runs = about["runs"]
    lines = [f"{about['benchmark']}: {about['prompts']} prompts paired"]
    lines += [f"{run['label']}  {run['name']}  ({run['folder']})" for run in runs]
    lines += [f"note: {note}" for note in about["notes"]]
    for number in range(1, len(runs)):
        mine = [record for record in records if record["run"] == number]
        label = runs[number]["label"]
        for title, cell in (
            (f"{label} − A, mean difference [95 % interval]", _difference_cell),
            (f"{label} against A, win rate in % [95 % Wilson interval], ties counted half", _rate_cell),
        ):
            lines += ["", title, "".join([f"{'':<26}{'prompts':>8}", *(f"{name:>31}" for name in places)])]
            rows = {}
            for record in mine:
                rows.setdefault((record["by"], record["group"]), []).append(record)
            kind = "all"
            for (by, group), cells in rows.items():
                if by != kind:
                    lines.append(f"by {by}")
                    kind = by
                texts = (f"{cell(record, places[record['score']]):>31}" for record in cells)
                lines.append("".join([f"{group:<26}{cells[0]['prompts']:>8}", *texts]))
    return "\n".join(lines)


def _difference_cell(record, places):
    return f"{signed(record['difference'], places)} [{interval(record, places)}]"


def _rate_cell(record, _):
    return f"{100 * record['win_rate']:.1f} [{100 * record['win_low']:.1f} … {100 * record['win_high']:.1f}]"


def write_report(path, about, records, runs, keys, scores, image_size):
    """Write report.html and return {path: reason} of the images that could not be read.

    scores: (R, N, K), of the R runs, the N paired prompts `keys`, and the K scores in the order of the records.
    """
    places = decimals(records)
    names = list(places)
    first = [runs[0].rows[key] for key in keys]
    extended = [[run.rows[key].get("extended", "") for run in runs] for key in keys]
    gallery = {
        "runs": [{"label": run.label, "name": run.name} for run in runs],
        "scores": names,
        "places": list(places.values()),
        "block": BLOCK,
        "rows": [
            [row["index"], row["prompt"], row["category"], row.get("challenge", ""), values.tolist(), texts]
            for row, values, texts in zip(first, scores.swapaxes(0, 1), extended, strict=True)
        ],
    }
    plots = [[record for record in records if record["score"] == name] for name in names]
    run_names = [run.name for run in runs]
    problems = {}
    parts = {
        "title": escape(f"{about['benchmark']}: {', '.join(run_names[1:])} against {run_names[0]}"),
        "lead": _lead(about, runs),
        "overall": _overall_table(about, records),
        "plots": "".join(
            f'<img src="{svg_uri(difference_plot(mine, run_names, "svg"))}" alt="Differences in {escape(name)}, '
            'overall and by group; the tables have the same numbers">\n'
            for name, mine in zip(names, plots, strict=True)
        ),
        "groups": "".join(_group_table(about, records, run) for run in range(1, len(runs))),
        "method": escape(METHOD),
        "settings": _settings_table(about),
        "data": embed_json(gallery),
        "images": image_blocks([[run.image(key) for run in runs] for key in keys], image_size, problems),
    }
    write_page(path, "report.html", parts)
    return problems


def _lead(about, runs):
    listed = "".join(
        f'<li><b class="label">{run.label}</b> <b>{escape(run.name)}</b> <span class="path">{escape(str(run.folder))}'
        f"</span>{'' if scored_prompts(run) == 'original' else ', scored with its extended prompts'}</li>"
        for run in runs
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in about["notes"])
    notes = f'<div class="notes" role="note"><b>Note</b><ul>{notes}</ul></div>' if notes else ""
    return f'<ul class="runs">{listed}</ul><p>{about["prompts"]:,} prompts paired.</p>{notes}'


def _overall_table(about, records):
    places = decimals(records)
    several = len(about["runs"]) > 2
    rows = []
    for record in records:
        if record["by"] == "all":
            digits = places[record["score"]]
            label = f"<td>{about['runs'][record['run']]['label']}</td>" if several else ""
            means = "".join(f"<td>{_number(record[name], digits)}</td>" for name in ("first", "mean"))
            counts = f"<td>{record['wins']} / {record['ties']} / {record['losses']}</td>"
            cells = label + means + _difference_html(record, digits) + _rate_html(record) + counts
            rows.append(f"<tr><th scope=row>{escape(record['score'])}</th>{cells}</tr>")
    names = ("run", "A", "its mean") if several else ("A", "B")
    names = ("score", *names, "difference", "win rate", "won / tied / lost")
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _group_table(about, records, run):
    """One table of all groups for one run against the first: difference and win rate for each score."""
    places = decimals(records)
    rows = {}
    for record in records:
        if record["run"] == run:
            rows.setdefault((record["by"], record["group"]), []).append(record)
    head = "".join(f"<th scope=colgroup colspan=2>{escape(name)}</th>" for name in places)
    below = "<th scope=col>difference</th><th scope=col>win rate</th>" * len(places)
    body, kind = "", "all"
    for (by, group), cells in rows.items():
        if by != kind:
            body += f"<tr class=kind><th scope=rowgroup colspan={2 + 2 * len(places)}>by {escape(by)}</th></tr>"
            kind = by
        values = "".join(_difference_html(cell, places[cell["score"]]) + _rate_html(cell) for cell in cells)
        body += f"<tr><th scope=row>{escape(group)}</th><td>{cells[0]['prompts']}</td>{values}</tr>"
    other = about["runs"][run]
    return (
        f"<h3>{other['label']} − A: {escape(other['name'])} against {escape(about['runs'][0]['name'])}</h3>"
        f'<div class="wide" tabindex=0><table><thead><tr><th rowspan=2>prompts</th><th rowspan=2>count</th>{head}</tr>'
        f"<tr>{below}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _difference_html(record, places):
    mark = {1: ("up", "▲ "), -1: ("down", "▼ "), 0: ("", "")}[clear(record)]
    return (
        f'<td class="{mark[0]}">{mark[1]}{signed(record["difference"], places)}'
        f"<small>{interval(record, places)}</small></td>"
    )


def _rate_html(record):
    low, high = (f"{100 * record[name]:.0f}" for name in ("win_low", "win_high"))
    return f"<td>{100 * record['win_rate']:.1f} %<small>{low} … {high}</small></td>"


def _settings_table(about):
    head = "".join(f"<th scope=col>{run['label']}: {escape(run['name'])}</th>" for run in about["runs"])
    body = ""
    for name, values in about["settings"].items():
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        body += f"<tr{differs}><th scope=row>{escape(name)}</th>{cells}</tr>"
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
