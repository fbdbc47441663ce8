"""A benchmark from its command line to its files: what test_parti.py and test_hpsv2.py do.

The output folder gets the images; settings.json, what they were generated and scored with, which a continued run must
repeat; scores.csv, one row per image; summary.json; and a line in results.md.
"""

import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from textcraftor.benchmark.options import SAMPLING, parse_options
from textcraftor.benchmark.prompt_lists import Benchmark, prompts_hash
from textcraftor.benchmark.results import (
    SCORES,
    SETTINGS,
    SUMMARY,
    Table,
    check_output,
    check_settings,
    read_settings,
    style_scores,
    summarize,
    write_json,
    write_results,
)
from textcraftor.errors import UserError
from textcraftor.options import check_all

LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "accelerate", "pillow", "numpy")
PRECISION_NAMES = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # of settings.json, and as options


def evaluate(benchmark: Benchmark, description: str, argv: list[str] | None = None) -> None:
    """Generate and score the benchmark's images, or continue with that; UserError for what the user can mend."""
    args = parse_options(benchmark, description, argv)
    every_row = check_files(benchmark, args)
    # Torch and the libraries above it take seconds to import; everything so far is checked without them.
    from accelerate import Accelerator

    from textcraftor.benchmark.batches import work_through
    from textcraftor.benchmark.scores import load_scorers
    from textcraftor.benchmark.sources import check_folder
    from textcraftor.hashes import weights_hash
    from textcraftor.models import quiet_libraries

    check_models(benchmark, args)
    if not every_row:
        benchmark.fetch(Path(args.prompts))
        every_row = check_files(benchmark, args)
    rows = limited(every_row, args.limit)
    if args.score_only:
        check_folder(args.score_only, rows)
    quiet_libraries()
    accelerator = Accelerator(mixed_precision="no", dynamo_backend="no")  # instead of its environment variables
    device, is_main = accelerator.device, accelerator.is_main_process

    table = make_table(benchmark, args, rows)
    done = {} if args.score_only else table.read(every_row)
    precision = None if args.score_only else chosen_precision(args, device)
    scorers = load_scorers(benchmark.rewards, args.weights, device, args.hps_version, benchmark.from_files)
    source = load_source(benchmark, args, scorers, device, precision)
    settings = known_settings(benchmark, args, every_row) | source.settings
    settings |= {f"{name} (sha256)": weights_hash(scorer) for name, scorer in scorers.items()}
    check_settings(args.output_path, settings, [] if args.score_only else rows)
    lost = [] if args.score_only else forget_damaged(args, done, rows, source.image_size)
    accelerator.wait_for_everyone()
    if is_main:
        begin(args, settings, table, done)
        count = sum(row["index"] in done for row in rows)
        how = "" if args.score_only else f", generated in {settings['precision']}"
        print(f"{benchmark.title}: {len(rows)} prompts, {count} of them done before, on {device}{how}")
        if lost:
            print(f"{len(lost)} images are missing, damaged or of another size and are made again; first: {lost[0]}")

    try:
        finished = work_through(accelerator, rows, done, args.batch_size, source, table)
    except UserError as problem:
        raise UserError(f"{problem}; the same command continues the run afterwards") from problem
    if is_main and finished:
        table.write([done[index] for index in sorted(done)])  # also rows beyond --limit, of an earlier run
        finish(benchmark, args, settings, every_row, [done[row["index"]] for row in rows], scorers, source)
    elif is_main:
        print(f"stopped with {len(done)} images done; the same command continues the run")


def limited(rows, limit):
    """The first `limit` rows, of each style in the HPSv2 benchmark; all of them for 0."""
    return [row for row in rows if not limit or int(Path(row["file"]).stem) < limit]


def check_files(benchmark, args):
    """The benchmark's rows, [] if they must be downloaded first. UserError if files cannot be read or written."""
    rows = [] if args.fetch and not Path(args.prompts).exists() else benchmark.read(Path(args.prompts))
    images = [] if args.score_only else limited(rows, args.limit)
    check_output(args.output_path, images)
    if Path(args.output_path, SETTINGS).is_file():
        read_settings(args.output_path)
    if rows:
        check_settings(args.output_path, known_settings(benchmark, args, rows), images, complete=False)
    return rows


def check_models(benchmark, args):
    """Raise UserError with everything that is missing or wrong about models and weights, without loading them."""
    from textcraftor.benchmark.scores import check_scorers
    from textcraftor.models import check_model
    from textcraftor.weight_files import check_text_encoder, check_unet

    checks = [(check_scorers, benchmark.rewards, args.weights, args.hps_version)]
    if not args.score_only:
        checks += [(check_model, args.model)]
        checks += [(check_text_encoder, args.text_path)] if args.text_path else []
        checks += [(check_unet, args.unet_path)] if args.unet_path else []
    check_all(checks)


def known_settings(benchmark, args, every_row):
    """The settings of a run that are known before its models are loaded."""
    settings = {"benchmark": benchmark.title, "prompts (sha256)": prompts_hash(every_row)}
    settings |= {"hps_version": args.hps_version}
    return settings if args.score_only else settings | {name: getattr(args, name) for name in SAMPLING}


def make_table(benchmark, args, rows):
    """The run's scores.csv."""
    from textcraftor.benchmark.scores import score_columns

    about = [*rows[0], "extended"] if args.prompt_eng else [*rows[0]]
    columns = score_columns(benchmark.rewards, args.hps_version, benchmark.from_files)
    return Table(Path(args.output_path, SCORES), about, columns)


def chosen_precision(args, device):
    """The precision to generate in: "no", "fp16" or "bf16". With auto, a continued run keeps its own."""
    from textcraftor.precision import choose_precision

    if args.mixed_precision == "auto" and Path(args.output_path, SETTINGS).is_file():
        recorded = read_settings(args.output_path).get("precision")
        if recorded in list(PRECISION_NAMES):
            return PRECISION_NAMES[recorded]
    return choose_precision(args.mixed_precision, device)[0]


def load_source(benchmark, args, scorers, device, precision):
    """Where the images come from: a sources.Folder with --score_only, else a sources.Generator."""
    from textcraftor.benchmark.sources import Folder, Generator

    if args.score_only:
        return Folder(benchmark, args, scorers)
    return Generator(benchmark, args, scorers, device, precision)


def forget_damaged(args, done, rows, image_size):
    """Remove from `done` the rows whose images are lost or damaged, and return those paths.

    Raises UserError if the disk has no room for the images that `rows` still lack.
    """
    from textcraftor.benchmark.images import check_space, damaged_images

    paths = {Path(args.output_path, row["file"]): index for index, row in done.items()}
    damaged = damaged_images(list(paths), image_size)
    for path in damaged:
        del done[paths[path]]
    check_space(args.output_path, [row["file"] for row in rows if row["index"] not in done], image_size)
    return damaged


def begin(args, settings, table, done):
    """Begin a run, or continue one, in the output folder."""
    output = Path(args.output_path)
    (output / SUMMARY).unlink(missing_ok=True)  # of a run with another --limit: this one is not finished
    write_json(output / SETTINGS, settings)
    table.write(done.values())


def finish(benchmark, args, settings, every_row, finished, scorers, source):
    """Write and print the results of a run; UserError if no image has a score."""
    summary = summarize(finished, list(scorers), benchmark.groups)
    summary["images"]["prompts_cut"] = source.count_cut(finished)
    if benchmark.from_files:
        (column,) = scorers
        sizes = Counter(row["category"] for row in every_row)
        summary["styles"], summary["average"] = style_scores(finished, column, sizes)
    sources = ("score_only",) if args.score_only else ("model", "text_path", "unet_path", "prompt_eng")
    versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    about = {"benchmark": benchmark.title} | {name: getattr(args, name) for name in (*sources, "limit")}
    write_results(Path(args.output_path), about | summary | {"settings": settings, "versions": versions})
    if not summary["images"]["scored"]:
        why = next(iter(summary["images"]["unreadable"].values()))
        raise UserError(f"{args.output_path}: none of the {len(finished)} images has a score; the first: {why}")
