"""test_parti.py and test_hpsv2.py from the command line: what can be checked without torch, which is slow to import."""

from pathlib import Path

from textcraftor.benchmark.options import SAMPLING, parse_options
from textcraftor.benchmark.prompt_lists import Benchmark, prompts_hash
from textcraftor.benchmark.results import check_output, check_settings


def evaluate(benchmark: Benchmark, description: str, argv: list[str] | None = None) -> None:
    """Generate and score the benchmark's images, or continue such a run; UserError for what the user can mend.

    argv: command line, by default the process's own; description: its --help text. See textcraftor.benchmark.run for
    what is written.
    """
    args = parse_options(benchmark, description, argv)
    check_output(args.output_path, [])
    path = Path(args.prompts)
    if args.fetch and not path.exists():
        benchmark.fetch(path)
    every_row = benchmark.read(path)
    rows = [row for row in every_row if not args.limit or int(Path(row["file"]).stem) < args.limit]
    settings = {"benchmark": benchmark.title, "prompts (sha256)": prompts_hash(every_row)}
    settings |= {"hps_version": args.hps_version}
    if not args.score_only:
        settings |= {name: getattr(args, name) for name in SAMPLING}
    images = [] if args.score_only else rows
    check_output(args.output_path, images)
    check_settings(args.output_path, settings, images, complete=False)

    from textcraftor.benchmark.run import run  # imports torch

    run(benchmark, args, every_row, rows, settings)
