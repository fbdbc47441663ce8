"""
Compare runs of test_parti.py or test_hpsv2.py prompt by prompt: mean differences and win rates with 95 % intervals,
a plot, and a page (report.html) with the pictures side by side. The page opens from the disk, without a network.

$ python compare.py tests/miniature_parti tests/miniature_output_tc_text_parti
$ python compare.py RUN_A RUN_B RUN_C --output_path compare      # each against the first

Human preference: --blind writes a page that shows the pictures of two runs in random order and exports votes.json.
--votes reports the votes; with the runs given as well, also how often each score agrees with them.
$ python compare.py RUN_A RUN_B --blind --limit 100
$ python compare.py RUN_A RUN_B --votes votes.json
"""

from pathlib import Path

import numpy as np

from textcraftor.comparison import votes
from textcraftor.comparison.report import METHOD, comparison_tables, write_report
from textcraftor.comparison.runs import comparison_hash, notes, pair, read_runs, settings_table
from textcraftor.errors import UserError, run_program
from textcraftor.files import check_writable, read_json_object, write_json, write_whole
from textcraftor.options import make_parser, require
from textcraftor.pictures import difference_plot
from textcraftor.statistics import compare_groups

# fmt: off
OPTIONS = (
    ("--output_path", "compare", "output folder"),
    ("--image_size",  512,       "longest side of the pictures in a page, in pixels; larger ones are scaled down"),
    ("--blind",       False,     "write a page for voting between two runs"),
    ("--limit",       0,         "with --blind: number of prompts, drawn at random; 0 = all"),
    ("--seed",        0,         "random seed of the bootstrap, and of the order of the voting page"),
)
# fmt: on


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    runs = read_runs(args.runs)
    if args.votes:
        report_votes(args, runs)
    elif args.blind:
        write_blind(args, runs)
    else:
        write_comparison(args, runs)


def parse(argv):
    """The checked options; UserError if they do not fit together."""
    parser = make_parser(__doc__, OPTIONS)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="output folders; the first is the baseline")
    parser.add_argument("--votes", nargs="+", default=[], metavar="FILE", help="votes exported from a --blind page")
    args = parser.parse_intermixed_args(argv)
    require(args, {"image_size": 16, "limit seed": 0})
    if len(args.runs) < 2 and not (args.votes and not args.runs):
        raise UserError(f"expected two or more output folders of a benchmark, found {len(args.runs)}")
    if (args.blind or args.votes) and len(args.runs) > 2:
        raise UserError(f"--blind and --votes compare two runs, found {len(args.runs)}; give two")
    if args.blind and args.votes:
        raise UserError("--blind writes the page and --votes reads its votes afterwards; give only one of them")
    if args.limit and not args.blind:
        raise UserError("--limit works only with --blind; scores are compared on all prompts")
    check_writable(args.output_path, "--output_path")
    args.output_path = Path(args.output_path)
    return args


def write_comparison(args, runs):
    """Write comparison.json, comparison.png and report.html, then print the tables.

    All files are written before anything is printed: a closed or unusual terminal costs no result.
    """
    columns, keys = pair(runs)
    first = [runs[0].rows[key] for key in keys]
    scores = np.array([[[run.rows[key][name] for name in columns] for key in keys] for run in runs])
    groups = {by: [row[by] for row in first] for by in ("category", "challenge") if by in first[0]}
    records = compare_groups(scores, columns, groups, args.seed)
    about = {
        "benchmark": runs[0].settings["benchmark"],
        "runs": [{"label": run.label, "name": run.name, "folder": str(run.folder)} for run in runs],
        "prompts": len(keys), "notes": notes(runs, columns, keys), "method": METHOD, "seed": args.seed,
        "settings": settings_table(runs),
    }  # fmt: skip
    file, plot, page = (args.output_path / name for name in ("comparison.json", "comparison.png", "report.html"))
    earlier = earlier_runs(file) or about["runs"]
    write_json(file, about | {"results": records})
    with write_whole(plot) as unfinished:
        unfinished.write_bytes(difference_plot(records, [run.name for run in runs]))
    lost = write_report(page, about, records, runs, keys, scores, args.image_size)
    if earlier != about["runs"]:
        print(f"{args.output_path}: replaced the comparison of {', '.join(run['folder'] for run in earlier)}")
    print(comparison_tables(about, records))
    print(file, plot, sep="\n")
    print_page(page, lost, args.image_size)


def earlier_runs(file):
    """The runs that an existing comparison.json compares, None if there is no such file; UserError if it is damaged."""
    if not file.exists():
        return None
    remedy = "choose another --output_path, or remove the file"
    try:
        runs = read_json_object(file, remedy)["runs"]
        return [{name: run[name] for name in ("label", "name", "folder")} for run in runs]
    except (KeyError, TypeError) as problem:
        raise UserError(f"{file}: is not a comparison of compare.py; {remedy}") from problem


def print_page(page, lost, image_size):
    """Print the images that a page lacks ({path: reason}), and its path and size."""
    for file, why in lost.items():
        print(f"{file}: {why}")
    if lost:
        print(f"images missing from the page because they could not be read: {len(lost)}")
    megabytes = page.stat().st_size / 1e6
    advice = f"; an --image_size below {image_size} makes it smaller" if megabytes > 100 else ""
    print(f"{page}, {megabytes:.1f} MB{advice}")


def write_blind(args, runs):
    """Write blind.html, the page for voting."""
    _, keys = pair(runs)
    page = args.output_path / "blind.html"
    votes.write_blind(page, runs, keys, args.seed, args.limit, args.image_size)
    print_page(page, {}, args.image_size)


def report_votes(args, runs):
    """Write preference.json and print it; with the runs, also how often each score agrees with the votes."""
    about, voted = votes.read_votes(args.votes)
    if runs and comparison_hash(runs) != about["comparison"]:
        raise UserError(
            f"{args.votes[0]}: votes on {' against '.join(about['runs'])}, not on these results of "
            f"{' against '.join(args.runs)}; give the runs that the page was made from, in the same order"
        )
    records = votes.preference(voted)
    agreements = score_agreements(runs, votes.shares(voted), args.votes[0]) if runs else {}
    file = args.output_path / "preference.json"
    write_json(file, about | {"raters": len(voted), "results": records, "agreement": agreements})
    print(votes.preference_table(about, voted, records, agreements))
    print(file)


def score_agreements(runs, shares, file):
    """{score: {"agreement", "low", "high", "prompts"}}: how often each score prefers the run that people prefer.

    shares: {(index, prompt): share of votes for run B}. Empty if people preferred neither run on any prompt.
    """
    columns, keys = pair(runs)
    if unknown := shares.keys() - set(keys):
        raise UserError(
            f"{file}: votes on a prompt that the runs do not share ({min(unknown)[1]!r}); export them again"
        )
    gain = [[runs[1].rows[key][name] - runs[0].rows[key][name] for name in columns] for key in shares]
    rates, intervals, count = votes.agreement(np.array(list(shares.values())), np.array(gain))
    if not count:
        return {}
    return {
        name: {"agreement": rate, "low": low, "high": high, "prompts": count}
        for name, rate, (low, high) in zip(columns, rates.tolist(), intervals.tolist(), strict=True)
    }


if __name__ == "__main__":
    run_program(main)
