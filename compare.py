"""
Compare runs of test_parti.py or test_hpsv2.py, prompt by prompt: differences and win rates with 95 % intervals, a plot,
and a page of pictures side by side that opens from the disk.

$ python compare.py tests/miniature_parti tests/miniature_output_tc_text_parti
$ python compare.py RUN_A RUN_B RUN_C --output_path compare      # each against the first

Human preference: a page that shows A and B in an order that nobody knows and exports votes.json; then what was voted,
and with the runs named how far each score agrees.
$ python compare.py RUN_A RUN_B --blind --limit 100
$ python compare.py RUN_A RUN_B --votes votes.json
"""

import json
from pathlib import Path

from textcraftor.errors import UserError, run_program
from textcraftor.options import make_parser, require

# fmt: off
OPTIONS = (
    ("--output_path", "compare", "folder of what is written"),
    ("--image_size",  512,       "longest side of the images in a page, in pixels; larger ones are scaled down"),
    ("--blind",       False,     "write the page for votes, of two runs"),
    ("--limit",       0,         "with --blind: only so many prompts, drawn at random; 0 = all"),
    ("--seed",        0,         "of the resampling, and of the order in a page for votes"),
)
# fmt: on


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, OPTIONS)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="output folder; the first is compared with")
    parser.add_argument("--votes", nargs="+", default=[], metavar="FILE", help="votes that a --blind page exported")
    args = parser.parse_intermixed_args(argv)
    require(args, {"image_size": 16, "limit seed": 0})
    if len(args.runs) < 2 and not (args.votes and not args.runs):
        raise UserError(f"expected two or more output folders of a benchmark, found {len(args.runs)}")
    if (args.blind or args.votes) and len(args.runs) > 2:
        raise UserError(f"{len(args.runs)} runs named: a vote is between two")
    if args.blind and args.votes:
        raise UserError("--blind --votes: the page comes first and its votes later; give one of them")
    if args.limit and not args.blind:
        raise UserError("--limit: is of --blind; scores are compared on all prompts")
    args.output_path = Path(args.output_path)
    if args.output_path.exists() and not args.output_path.is_dir():
        raise UserError(f"--output_path {args.output_path}: is a file, expected a folder")

    # Imported only now: whatever is wrong above is said at once.
    from textcraftor.comparison.runs import read_runs

    runs = read_runs(args.runs)
    if args.votes:
        report_votes(args, runs)
    elif args.blind:
        write_blind(args, runs)
    else:
        write_comparison(args, runs)


def write_comparison(args, runs):
    """comparison.json, comparison.png and report.html, and the tables on the screen."""
    import numpy as np

    from textcraftor.benchmark.results import write_whole
    from textcraftor.comparison.report import METHOD, comparison_tables, write_report
    from textcraftor.comparison.runs import notes, pair, settings_table
    from textcraftor.pictures import difference_plot
    from textcraftor.statistics import compare_groups

    columns, keys = pair(runs)
    first = [runs[0].rows[key] for key in keys]
    scores = np.array([[[run.rows[key][name] for name in columns] for key in keys] for run in runs])
    groups = {by: [row[by] for row in first] for by in ("category", "challenge") if by in first[0]}
    records = compare_groups(scores, columns, groups, args.seed)
    remarks = notes(runs, columns, keys)
    about = {
        "benchmark": runs[0].settings["benchmark"],
        "runs": [{"label": run.label, "name": run.name, "folder": str(run.folder)} for run in runs],
        "prompts": len(keys), "notes": remarks, "method": METHOD, "seed": args.seed, "settings": settings_table(runs),
    }  # fmt: skip
    file = args.output_path / "comparison.json"
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else about["runs"]
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{file}: is no comparison; choose another --output_path") from problem
    if earlier != about["runs"]:
        print(f"{args.output_path}: replacing the comparison of {', '.join(run['folder'] for run in earlier)}")
    args.output_path.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(about | {"results": records}, indent=1) + "\n")
    (args.output_path / "comparison.png").write_bytes(difference_plot(records, [run.name for run in runs]))
    print(comparison_tables(about, records))
    page = args.output_path / "report.html"
    lost = write_report(page, about, records, runs, keys, scores, args.image_size)
    for name in ("comparison.json", "comparison.png"):
        print(args.output_path / name)
    say_page(page, lost, args.image_size)


def say_page(page, lost, image_size):
    """Name a page with its size, and the images it lacks."""
    for file, why in lost.items():
        print(f"{file}: {why}")
    if lost:
        print(f"{len(lost)} images could not be read and are missing from the page")
    megabytes = page.stat().st_size / 1e6
    advice = f"; an --image_size below {image_size} makes it smaller" if megabytes > 100 else ""
    print(f"{page}, {megabytes:.1f} MB{advice}")


def write_blind(args, runs):
    """blind.html."""
    from textcraftor.comparison import votes
    from textcraftor.comparison.runs import pair

    _, keys = pair(runs)
    args.output_path.mkdir(parents=True, exist_ok=True)
    page = args.output_path / "blind.html"
    votes.write_blind(page, runs, keys, args.seed, args.limit, args.image_size)
    say_page(page, {}, args.image_size)


def report_votes(args, runs):
    """preference.json, and the same on the screen; with the runs, how far each score agrees."""
    import numpy as np

    from textcraftor.benchmark.results import write_whole
    from textcraftor.comparison import votes
    from textcraftor.comparison.runs import comparison_hash, pair

    about, voted = votes.read_votes(args.votes)
    records, agreements = votes.preference(voted), {}
    if runs:
        if comparison_hash(runs) != about["comparison"]:
            raise UserError(
                f"{args.votes[0]}: votes on {' against '.join(about['runs'])}, not on these results of "
                f"{' against '.join(args.runs)}; name the runs that the page was made of, in its order"
            )
        columns, _ = pair(runs)
        share = votes.shares(voted)
        gain = [[runs[1].rows[key][name] - runs[0].rows[key][name] for name in columns] for key in share]
        rates, intervals, count = votes.agreement(np.array(list(share.values())), np.array(gain))
        for name, rate, (low, high) in zip(columns, rates.tolist(), intervals.tolist(), strict=True):
            if count:
                agreements[name] = {"agreement": rate, "low": low, "high": high, "prompts": count}
    args.output_path.mkdir(parents=True, exist_ok=True)
    result = about | {"raters": len(voted), "results": records, "agreement": agreements}
    write_whole(args.output_path / "preference.json", json.dumps(result, indent=1) + "\n")
    print(votes.preference_table(about, voted, records, agreements))
    print(args.output_path / "preference.json")


if __name__ == "__main__":
    run_program(main)
