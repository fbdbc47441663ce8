"""A benchmark from its command line to its files: what test_parti.py and test_hpsv2.py do.

In the output folder: the images; settings.json, what they were made and scored with, checked by a run that goes on;
scores.csv, one row an image; summary.json; and a line in results.md.
"""

import json
import os
import platform
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from textcraftor.benchmark.prompt_lists import Benchmark, prompts_hash
from textcraftor.benchmark.results import (
    Table,
    check_settings,
    read_settings,
    style_scores,
    summarize,
    write_results,
    write_whole,
)
from textcraftor.errors import UserError
from textcraftor.options import SCHEDULERS, TEST_SEED, TEST_TUNED_STEPS, check_all, make_parser, require

REPOSITORY = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "accelerate", "pillow", "numpy")

MODEL = "./stable-diffusion-v1-5"

# fmt: off
OPTIONS = (
    ("--model",            MODEL,                     "folder, file, hub id, or `miniature` (its own prompts)"),
    ("--weights",          str(REPOSITORY),           "where the rewards' weights lie: hpsv2/, pickscore/, aesthetic/"),
    ("--text_path",        "",                        "tuned text encoder: safetensors, .pth, folder or hub id"),
    ("--unet_path",        "",                        "tuned UNet, likewise"),
    ("--prompts",          "",                        "the benchmark's prompts; none: prompts/, fetched on first use"),
    ("--limit",            0,                         "only the first so many prompts (of each style), 0 = all"),
    ("--output_path",      "",                        "folder (default: under tests/, or the one of --score_only)"),
    ("--score_only",       "",                        "score the images in this folder, of any model, and make none"),
    ("--hps_version",      ("2.0", "2.1"),            "of HPSv2; their scores cannot be compared"),
    # How to sample.
    ("--scheduler",        tuple(SCHEDULERS),         "sampler; DDIM is the one of training"),
    ("--step",             25,                        "T, sampling steps"),
    ("--grad_steps",       TEST_TUNED_STEPS,                        "last steps, under the tuned text encoder"),
    ("--guidance",         7.5,                       "classifier-free guidance scale"),
    ("--prompt_weighting", 1.0,                       "w in w * tuned + (1 - w) * original, in the tuned steps"),
    ("--seed",             TEST_SEED,                      "of the noise, with each prompt's number"),
    ("--batch-size",       8,                         "images at once on each device"),
    ("--mixed_precision",  ("auto", "no", "fp16", "bf16"), "of image making; scores are always fp32"),
    ("--score_prompt",     ("", "extended", "original"), "what scores use after --prompt_eng (default: extended)"),
)
# fmt: on
EXTENDER = "daspartho/prompt-extend"
PAPER = "checkpoints/tc_text_e_0_iter_10000.pth"  # the paper's text encoder
WORKERS = 2  # batches in work at once
# What an image depends on and a score does not: the settings that --score_only does not know.
SAMPLING = ("scheduler", "step", "grad_steps", "guidance", "prompt_weighting", "seed")


def evaluate(benchmark: Benchmark, description: str, argv: list[str] | None = None) -> None:
    """Make the benchmark's images and score them, or go on with that; UserError for what the user can mend."""
    args = parse_arguments(benchmark, description, argv)
    check_arguments(args)
    to_fetch = args.fetch and not Path(args.prompts).exists()
    every_row = [] if to_fetch else benchmark.read(Path(args.prompts))

    # Imported only now: whatever is wrong above is said at once.
    from accelerate import Accelerator

    from rewards import hpsv2
    from textcraftor.benchmark.scores import check_scorers, load_scorers, whole_view
    from textcraftor.hashes import weights_hash
    from textcraftor.models import check_model, quiet_libraries
    from textcraftor.weight_files import check_text_encoder, check_unet

    checks = [(check_scorers, benchmark.rewards, args.weights, args.hps_version)]
    if not args.score_only:
        checks += [(check_model, args.model)]
        checks += [(check_text_encoder, args.text_path)] if args.text_path else []
        checks += [(check_unet, args.unet_path)] if args.unet_path else []
    check_all(checks)
    if to_fetch:
        benchmark.fetch(Path(args.prompts))
        every_row = benchmark.read(Path(args.prompts))
    rows = [row for row in every_row if not args.limit or int(Path(row["file"]).stem) < args.limit]
    quiet_libraries()
    accelerator = Accelerator(mixed_precision="no", dynamo_backend="no")  # not its environment variables
    say = print if accelerator.is_main_process else lambda text: None

    scorers = load_scorers(benchmark.rewards, args.weights, accelerator.device, args.hps_version, benchmark.from_files)
    size = next(iter(scorers.values())).image_size[0]
    view = partial(hpsv2.prepare, size=size) if benchmark.from_files else whole_view
    if args.score_only:
        maker = reader(args, rows, scorers, view)
    else:
        maker = generator(benchmark, args, scorers, view, accelerator.device)
    settings = {"benchmark": benchmark.title, "prompts (sha256)": prompts_hash(every_row)}
    settings |= {"hps_version": args.hps_version, **maker.settings}
    settings |= {f"{name} (sha256)": weights_hash(scorer) for name, scorer in scorers.items()}

    output = Path(args.output_path)
    table = Table(output / "scores.csv", [*rows[0], *maker.columns], list(scorers))
    check_settings(output, settings, [] if args.score_only else rows)
    done = {}
    if not args.score_only:  # images of others may have changed since
        done = {index: row for index, row in table.read(every_row).items() if (output / row["file"]).is_file()}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / "summary.json").unlink(missing_ok=True)  # of a run with another --limit: this one is not finished
        write_whole(output / "settings.json", json.dumps(settings, indent=2) + "\n")
        table.write(done.values())
    before = sum(row["index"] in done for row in rows)
    say(f"{benchmark.title}: {len(rows)} prompts, {before} of them done before, on {accelerator.device}")

    if not work_through(accelerator, rows, done, args.batch_size, maker.work, table):
        say(f"stopped with {len(done)} images done; the same command goes on")
        return
    if accelerator.is_main_process:
        table.write([done[index] for index in sorted(done)])  # with those beyond --limit that an earlier run did
        finished = [done[row["index"]] for row in rows]
        summary = summarize(finished, list(scorers), benchmark.groups)
        summary["images"]["prompts_cut"] = maker.count_cut(finished)
        if benchmark.from_files:
            (column,) = scorers
            sizes = Counter(row["category"] for row in every_row)
            summary["styles"], summary["average"] = style_scores(finished, column, sizes)
        sources = ("score_only",) if args.score_only else ("model", "text_path", "unet_path", "prompt_eng")
        versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
        about = {"benchmark": benchmark.title} | {name: getattr(args, name) for name in (*sources, "limit")}
        write_results(output, about | summary | {"settings": settings, "versions": versions})
        if not summary["images"]["scored"]:
            why = next(iter(summary["images"]["unreadable"].values()))
            raise UserError(f"{output}: none of the {len(finished)} images has a score; the first: {why}")


def parse_arguments(benchmark, description, argv):
    """Command line -> options. `--model miniature` brings its own defaults; flags that are given win."""
    parser = make_parser(description, OPTIONS)
    parser.add_argument(
        "--prompt_eng", "--prompt-eng", nargs="?", const=True, default="", metavar="MODEL",
        help=f"let a language model extend the prompts, folder or hub id ({EXTENDER}, or the miniature's own, if none "
        "is named)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.score_prompt and not args.prompt_eng:
        raise UserError(f"--score_prompt {args.score_prompt}: is of --prompt_eng; without it, leave this out")
    parser.set_defaults(score_prompt="extended")
    args = parser.parse_args(argv)
    default_output = f"tests/{run_name(args, benchmark.name, parser.get_default)}"
    args.fetch, extender = not args.prompts, EXTENDER
    if args.model == "miniature":
        folder = REPOSITORY / "miniature"
        guidance = json.loads((folder / "defaults.json").read_text())["guidance"]
        prompts = str(folder / "benchmarks" / benchmark.prompts)
        parser.set_defaults(weights=str(folder), prompts=prompts, guidance=guidance, batch_size=16)
        args = parser.parse_args(argv)
        args.model, args.fetch, extender = str(folder / "stable-diffusion"), False, str(folder / "extender")
    args.prompt_eng = extender if args.prompt_eng is True else args.prompt_eng
    args.prompts = args.prompts or str(REPOSITORY / "prompts" / benchmark.prompts)
    args.output_path = args.output_path or args.score_only or default_output
    return args


def run_name(args, benchmark, default):
    """What is tested, on what and how, as a folder's name: "paper_ckpt_parti", "original_hpsv2_v2.1", …"""

    def last_parts(path, count):
        parts = [part for part in Path(path).parts[-count:] if part.strip("./")]
        parts = parts or [Path(path).resolve().name]
        return "_".join(part.removesuffix(".safetensors").removesuffix(".pth") for part in parts)

    names = [] if args.model == MODEL else [last_parts(args.model, 1)]
    tuned = [path for path in (args.text_path, args.unet_path) if path]
    names += ["paper_ckpt" if Path(path) == Path(PAPER) else last_parts(path, 2) for path in tuned]
    names = [*(names or ["original"]), *(["prompt_eng"] if args.prompt_eng else []), benchmark]
    for option, before in (("hps_version", "v"), ("score_prompt", "score_"), ("scheduler", ""), ("seed", "seed_")):
        value = getattr(args, option)
        names += [f"{before}{value}"] if value != default(option) else []
    return "_".join(names)


def check_arguments(args):
    """Raise UserError, one line, for options that make no sense."""
    require(args, {"step batch_size guidance": 1, "grad_steps limit seed prompt_weighting": 0})
    if not args.grad_steps <= args.step <= 1000:
        raise UserError(
            f"--grad_steps {args.grad_steps} --step {args.step}: the tuned text encoder's steps are the last ones "
            "of all, so grad_steps <= step <= 1000"
        )
    if args.score_only and not Path(args.score_only).is_dir():
        raise UserError(f"--score_only {args.score_only}: no such folder")
    if args.score_only and args.prompt_eng:
        raise UserError("--score_only --prompt_eng: no prompt is extended where no image is made; give one of them")


class Maker(NamedTuple):
    """Where scores come from: work(rows) -> the rows with their scores, or with a "problem"."""

    work: Callable[[list[dict]], list[dict]]
    settings: dict
    columns: list[str]  # what it adds to a row beside the scores
    count_cut: Callable[[list[dict]], int | None]  # rows whose prompts the text encoder did not read whole, if known


def generator(benchmark, args, scorers, view, device):
    """The Maker that generates images, saves them, and scores them."""
    import torch

    from textcraftor.benchmark.extend import extend_prompt, load_extender
    from textcraftor.benchmark.images import generate, load_pipeline
    from textcraftor.benchmark.scores import score_files, score_images
    from textcraftor.embeddings import count_cut
    from textcraftor.hashes import weights_hash
    from textcraftor.precision import PRECISIONS, choose_precision

    pipeline, tuned = load_pipeline(args.model, args.scheduler, args.step, args.text_path, args.unet_path)
    precision = recorded_precision(args) or choose_precision(args.mixed_precision, device)[0]
    dtype = PRECISIONS[precision]
    settings = {name: getattr(args, name) for name in SAMPLING}
    networks = {"text_path": tuned, "unet": pipeline.unet, "text encoder": pipeline.text_encoder, "vae": pipeline.vae}
    settings |= {f"{name} (sha256)": weights_hash(network) for name, network in networks.items()}
    settings |= {"precision": str(dtype).removeprefix("torch.")}
    if args.prompt_eng:
        extender = load_extender(args.prompt_eng, device)
        settings |= {"prompt_eng (sha256)": weights_hash(extender[1]), "score_prompt": args.score_prompt}
    pipeline.to(device, dtype)
    tuned.to(device, dtype)
    output = Path(args.output_path)
    how = {"seed": args.seed, "grad_steps": args.grad_steps, "guidance": args.guidance}
    how |= {"weighting": args.prompt_weighting}
    savers = ThreadPoolExecutor(4)
    turn = Lock() if device.type == "cuda" else nullcontext()  # two batches at once would not be drawn faster

    drawn = "extended" if args.prompt_eng else "prompt"
    scored = "extended" if args.prompt_eng and args.score_prompt == "extended" else "prompt"

    def work(rows):
        indices = [row["index"] for row in rows]
        if args.prompt_eng:
            rows = [row | {drawn: extend_prompt(*extender, row["prompt"], args.seed, row["index"])} for row in rows]
        with turn:
            images = generate(pipeline, tuned, [row[drawn] for row in rows], indices, **how)
        prompts = [row[scored] for row in rows]
        paths = [output / row["file"] for row in rows]
        saving = savers.map(save_image, (images * 255).round().to(torch.uint8).cpu(), paths)
        if benchmark.from_files:
            list(saving)
            scores = score_files(scorers, paths, prompts, view)
        else:
            scores = score_images(scorers, images, prompts)
            list(saving)
        return [row | score for row, score in zip(rows, scores, strict=True)]

    added = [drawn] if args.prompt_eng else []
    return Maker(work, settings, added, lambda rows: count_cut(pipeline.tokenizer, [row[drawn] for row in rows]))


def reader(args, rows, scorers, view):
    """The Maker that scores the images there are in the folder --score_only."""
    from textcraftor.benchmark.scores import find_image, score_files

    folder = Path(args.score_only)
    if not any((folder / find_image(folder, row["file"])).is_file() for row in rows):
        raise UserError(f"--score_only {folder}: has no image of this benchmark; the first would be {rows[0]['file']}")

    def work(rows):
        found = [row | {"file": find_image(folder, row["file"])} for row in rows]
        paths = [folder / row["file"] for row in found]
        scores = score_files(scorers, paths, [row["prompt"] for row in rows], view)
        return [row | score for row, score in zip(found, scores, strict=True)]

    # A folder that holds its own scores may be moved with them.
    elsewhere = Path(args.output_path).resolve() != folder.resolve()
    return Maker(work, {"score_only": str(folder.resolve())} if elsewhere else {}, [], lambda rows: None)


def save_image(pixels, path):
    """Write uint8 (3, H, W) with Pillow's own defaults, as HPSv2's instructions do, whole or not at all."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished_{path.name}")
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(unfinished)
    os.replace(unfinished, path)


def threads_per_worker(cores, workers):
    """Threads of torch for each worker: at least one, also under a launcher that sets OMP_NUM_THREADS=1."""
    return max(1, cores // workers)


def recorded_precision(args):
    """The precision of the run in --output_path that `auto` continues with; None if there is no run."""
    path = Path(args.output_path) / "settings.json"
    if args.mixed_precision != "auto" or not path.is_file():
        return None
    recorded = read_settings(path.parent).get("precision")
    return {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}.get(recorded)


def start_worker(device, threads):
    """Give the calling thread its cores, and its process's GPU: both are of each thread alone."""
    import torch

    torch.set_num_threads(threads)
    if device.type == "cuda" and device.index is not None:  # accelerate gives none where there is one GPU
        torch.cuda.set_device(device)


def work_through(accelerator, rows, done, batch_size, work, table):
    """Do all rows that are not in `done`, {index: row}, adding them there and to the table.

    Batches are cut from all rows, whatever is done, and shared among the processes: neither an interruption nor the
    number of processes changes which images are computed together, and so no bit of them. Each process has two batches
    in work, in threads: a GPU draws one while the other is scored and saved, and of a CPU each has half of the cores,
    which small networks use better than one batch uses all. Returns False if a signal ended it early.
    """
    import torch
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from textcraftor.processes import stop_signals

    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches = [batch for batch in batches if any(row["index"] not in done for row in batch)]
    missing = sum(row["index"] not in done for row in rows)
    processes, is_main, device = accelerator.num_processes, accelerator.is_main_process, accelerator.device
    shares = [batches[start : start + processes] for start in range(0, len(batches), processes)]
    mine = iter([dict(enumerate(share)).get(accelerator.process_index, []) for share in shares])
    cores = torch.get_num_threads()
    workers = WORKERS if device.type == "cuda" else min(WORKERS, cores)

    start = partial(start_worker, device, threads_per_worker(cores, workers))

    def do(share):
        return work(share) if share else []

    bar = tqdm(total=len(rows), initial=len(rows) - missing, disable=not is_main, dynamic_ncols=True, unit="image")
    with stop_signals() as stop, bar, ExitStack() as at_end:
        at_end.callback(torch.set_num_threads, cores)  # which is not of each thread alone, in all libraries
        pool = at_end.enter_context(ThreadPoolExecutor(workers, initializer=start))
        begun = deque(pool.submit(do, share) for share in islice(mine, workers))
        while begun:
            parts = gather_object([(row, len(stop)) for row in begun.popleft().result()])
            if any(stopping for _, stopping in parts):
                mine = iter(())
            begun.extend(pool.submit(do, share) for share in islice(mine, 1))
            new = [row for row, _ in parts]
            bar.update(sum(row["index"] not in done for row in new))
            done |= {row["index"]: row for row in new}
            if is_main:
                table.add(new)
            scored = [row for row in done.values() if "problem" not in row]
            for_all = {name: sum(row[name] for row in scored) / max(1, len(scored)) for name in table.scores}
            bar.set_postfix_str(" ".join(f"{name} {mean:.4g}" for name, mean in for_all.items()))
    return all(row["index"] in done for row in rows)
