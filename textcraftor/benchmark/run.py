"""A benchmark run: load the models, generate and score the images, write the results.

The output folder gets the images; settings.json, what they were generated and scored with, which a continued run must
repeat; scores.csv, one row per image; summary.json; and a line in results.md.
"""

import platform
from argparse import Namespace
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from accelerate import Accelerator

from textcraftor.benchmark.batches import work_through
from textcraftor.benchmark.images import check_space, damaged_images
from textcraftor.benchmark.prompt_lists import Benchmark
from textcraftor.benchmark.results import (
    SCORES,
    SETTINGS,
    SUMMARY,
    Table,
    check_settings,
    read_settings,
    style_scores,
    summarize,
    write_results,
)
from textcraftor.benchmark.scores import check_scorers, load_scorers, score_columns
from textcraftor.benchmark.sources import Folder, Generator, check_folder
from textcraftor.errors import UserError
from textcraftor.files import write_json
from textcraftor.hashes import weights_hash
from textcraftor.models import check_model, quiet_libraries
from textcraftor.options import check_all
from textcraftor.precision import PRECISIONS, choose_precision
from textcraftor.weight_files import check_text_encoder, check_unet

LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "accelerate", "pillow", "numpy")
# By their types' names, which settings.json has.
PRECISION_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in PRECISIONS.items()}


def run(benchmark: Benchmark, args: Namespace, every_row: list[dict], rows: list[dict], settings: dict) -> None:
    """Generate and score the images of `rows`, or continue with that; UserError for what the user can mend.

    args: see options.parse_options; every_row: the benchmark without --limit; settings: those known already.
    """
    check_models(benchmark, args, rows)
    quiet_libraries()
    accelerator = Accelerator(mixed_precision="no", dynamo_backend="no")  # instead of its environment variables
    device, is_main, output = accelerator.device, accelerator.is_main_process, Path(args.output_path)
    table = make_table(benchmark, args, rows)
    done = {} if args.score_only else table.read(every_row)
    precision, why = (None, "") if args.score_only else chosen_precision(args, device)

    scorers = load_scorers(benchmark.rewards, args.weights, device, args.hps_version, benchmark.from_files)
    if args.score_only:
        source = Folder(benchmark, args, scorers)
    else:
        source = Generator(benchmark, args, scorers, device, precision)
    settings = (
        settings | source.settings | {f"{name} (sha256)": weights_hash(reward) for name, reward in scorers.items()}
    )
    check_settings(output, settings, [] if args.score_only else rows)
    lost = [] if args.score_only else forget_damaged(output, done, rows, source.image_size)

    accelerator.wait_for_everyone()  # all have read what the main process replaces now
    if is_main:
        (output / SUMMARY).unlink(missing_ok=True)  # of a run with another --limit: this one is not finished
        write_json(output / SETTINGS, settings)
        table.write(done.values())
        print(start_line(benchmark, rows, done, device, precision, why))
        if lost:
            print(f"images missing, damaged or of another size, to be made again: {len(lost)}, first {lost[0]}")
    try:
        finished = work_through(accelerator, rows, done, args.batch_size, source, table)
    except UserError as problem:
        raise UserError(f"{problem}; the same command continues the run afterwards") from problem
    if is_main and finished:
        table.write([done[index] for index in sorted(done)])  # also rows beyond --limit, of an earlier run
        finish(benchmark, args, settings, every_row, [done[row["index"]] for row in rows], source)
    elif is_main:
        print(f"stopped with {len(done)} images done; the same command continues the run")


def check_models(benchmark, args, rows):
    """Raise UserError with everything that is missing or wrong about models and images, without loading them."""
    checks = [(check_scorers, benchmark.rewards, args.weights, args.hps_version)]
    if args.score_only:
        checks += [(check_folder, args.score_only, rows)]
    else:
        checks += [(check_model, args.model)]
        checks += [(check_text_encoder, path) for path, _ in args.encoders]
        checks += [(check_unet, args.unet_path)] if args.unet_path else []
    check_all(checks)


def make_table(benchmark, args, rows):
    """The run's scores.csv."""
    about = [*rows[0], "extended"] if args.prompt_eng else [*rows[0]]
    columns = score_columns(benchmark.rewards, args.hps_version, benchmark.from_files)
    return Table(Path(args.output_path, SCORES), about, columns)


def chosen_precision(args, device):
    """("no", "fp16" or "bf16" to generate in, why). With auto, a continued run keeps its precision."""
    if args.mixed_precision == "auto" and Path(args.output_path, SETTINGS).is_file():
        recorded = read_settings(args.output_path).get("precision")
        if recorded in list(PRECISION_NAMES):
            return PRECISION_NAMES[recorded], "as when this run began"
    return choose_precision(args.mixed_precision, device)


def forget_damaged(output, done, rows, image_size):
    """Remove from `done` the rows whose images are lost or damaged, and return the paths of these images.

    Raises UserError if the disk has no room for the images that `rows` still lack.
    """
    paths = {output / row["file"]: index for index, row in done.items()}
    damaged = damaged_images(list(paths), image_size)
    for path in damaged:
        del done[paths[path]]
    check_space(output, [row["file"] for row in rows if row["index"] not in done], image_size)
    return damaged


def start_line(benchmark, rows, done, device, precision, why):
    """One line for the user: what is going to be done."""
    count = sum(row["index"] in done for row in rows)
    how = f", mixed precision: {precision} ({why})" if precision else ""
    return f"{benchmark.title}: {len(rows)} prompts, {count} of them done before, on {device}{how}"


def finish(benchmark, args, settings, every_row, finished, source):
    """Write and print the results of a run; UserError if no image has a score."""
    summary = summarize(finished, list(source.scorers), benchmark.groups)
    summary["images"]["prompts_cut"] = source.count_cut(finished)
    if benchmark.from_files:
        (column,) = source.scorers
        sizes = Counter(row["category"] for row in every_row)
        summary["styles"], summary["average"] = style_scores(finished, column, sizes)
    names = ("score_only",) if args.score_only else ("model", "text_path", "unet_path", "prompt_eng")
    versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    about = {"benchmark": benchmark.title} | {name: getattr(args, name) for name in (*names, "limit")}
    write_results(Path(args.output_path), about | summary | {"settings": settings, "versions": versions})
    if not summary["images"]["scored"]:
        why = next(iter(summary["images"]["unreadable"].values()))
        raise UserError(f"{args.output_path}: none of the {len(finished)} images has a score; the first: {why}")
