"""Runs of the miniature, each trained once and measured once, whichever experiments need it.

They lie in output_experiments/, in a folder for each miniature and its defaults, where each run's folder has its name,
a hash of its flags, and its seed. Stop an experiment and start it again, and it goes on where it was. After a change of
the training code, delete output_experiments/. All runs compute in fp32 and share a trajectory bank
(textcraftor/bank.py).
"""

import functools
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file

from miniature.evaluate import Evaluation
from miniature.measure import HERE
from speed.networks import flop_counter
from textcraftor.errors import UserError, run_program
from textcraftor.hashes import file_hash
from textcraftor.options import TEST_TUNED_STEPS, make_parser, miniature_defaults
from textcraftor.prompts import read_prompts
from textcraftor.sampling import to_uint8
from textcraftor.statistics import paired_interval
from textcraftor.training_options import parse_options
from textcraftor.weights import save_tensors
from train_textcraftor import check_inputs, set_up, train_step


def short_hash(content) -> str:
    """Eight digits that tell apart what json can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


MINIATURE = [f for f in sorted(HERE.rglob("*")) if f.is_file() and f.suffix not in (".py", ".pyc")]
FOLDER = Path("output_experiments", short_hash([file_hash(f) for f in MINIATURE if f.name != "build.json"]))
DEFAULTS = miniature_defaults()
UPDATES = DEFAULTS["max_steps"]
SEEDS = (0, 1, 2)
PROMPTS = 96  # the first of the held-out prompts
SHOWN = 8  # of them in pictures
EVERY = UPDATES // 2  # updates between checkpoints
DIVERSITY = 16, 4  # prompts, noises of each
SCORES = ("total", "clip", "aesthetic", "pickscore", "hpsv2", "right", "clean", "right_and_clean")
# What a column is called, what its numbers are multiplied by, and how they are written.
COLUMNS = {
    "total": ("total", 1, ".2f"), "clip": ("CLIP", 1, ".4f"), "aesthetic": ("aesthetic", 1, ".3f"),
    "pickscore": ("PickScore", 1, ".3f"), "hpsv2": ("HPS v2", 1, ".4f"), "right": ("right", 100, ".1f"),
    "clean": ("clean", 100, ".1f"), "right_and_clean": ("both", 100, ".1f"), "diversity": ("diversity", 1, ".2f"),
    "without_clip": ("total without CLIP", 1, ".2f"),
}  # fmt: skip


def train(name: str, *flags: str, seed: int = 0, updates: int = UPDATES, part: str = "tc_text") -> Path:
    """Train the miniature with these flags, or go on with it, unless that is done -> its weights after `updates`.

    part: "tc_text" or "tc_unet", whose weights are meant.
    """
    folder = FOLDER / f"{name}_{short_hash(flags)}_seed{seed}"
    weights = f"{part}_e_*_iter_{updates}.safetensors"
    if not list(folder.glob(weights)):
        command = [sys.executable, "train_textcraftor.py", "--model", "miniature", "--output-path", str(folder)]
        command += ["--mixed_precision", "no", "--seed", str(seed), "--max_steps", str(updates)]
        command += ["--val_count", "2", "--val_every", "0", "--sample_every", "0"]  # they are measured here
        command += ["--save_every", str(EVERY), "--keep_checkpoints", "0"]
        if part == "tc_text" and "direct" not in flags:
            command += ["--bank", str(FOLDER / "bank")]
        resume = ["--resume"] if (folder / "options.json").exists() else []
        run_training([*command, *flags, *resume])
    found = next(folder.glob(weights), None)
    if found is None:
        raise UserError(
            f"{folder}: has no weights of update {updates}; run this experiment again to continue training, or, if the "
            "run is past that update, delete the folder first"
        )
    return found


def run_training(command: list[str]) -> None:
    """Run a training to its end. Ctrl-C reaches it, too: it then saves a checkpoint, and is waited for."""
    with subprocess.Popen(command) as training:
        try:
            training.wait()
        except KeyboardInterrupt:
            training.wait()
            raise
    if training.returncode:
        raise UserError(f"training failed, see above: {shlex.join(command)}")


@functools.cache
def evaluation() -> Evaluation:
    """What measures, on the first PROMPTS held-out prompts."""
    return Evaluation(read_prompts(str(HERE / "heldout.csv"))[0][:PROMPTS], 0, DEFAULTS["guidance"])


def measure(text: Path | None = None, steps: int = TEST_TUNED_STEPS, unet: Path | None = None, words: str = "") -> dict:
    """{score: (N,)} of the held-out prompts; text, unet: tuned weights, see Evaluation.sampler for the rest."""
    options = {"tuned": text and str(text), "steps": steps, "unet": unet and str(unet), "words": words}
    return kept(["scores", PROMPTS, steps, words, *hashes(text, unet)], lambda: evaluation()(**options)[0])


def diversity(text: Path | None = None, steps: int = TEST_TUNED_STEPS, unet: Path | None = None) -> dict:
    """{"diversity": (prompts,)}: mean distance, root mean square over pixels, between pictures of one prompt."""
    prompts, noises = DIVERSITY

    def compute():
        sample = evaluation().sampler(tuned=text and str(text), steps=steps, unet=unet and str(unet))
        pictures = [sample(evaluation().prompts[:prompts], range(1000 * k, 1000 * k + prompts)) for k in range(noises)]
        pairs = [(one - other).square().mean((1, 2, 3)).sqrt() for one, other in combinations(pictures, 2)]
        return {"diversity": torch.stack(pairs).mean(0)}

    return kept(["diversity", DIVERSITY, steps, *hashes(text, unet)], compute)


def flops(*flags: str, updates: int = 1, banked: bool = False) -> float:
    """FLOPs of one image of an update with these flags: all that the training step computes.

    updates: to average over, for ways that draw at random which steps have gradient. banked: count the step of an image
    whose first steps the run's bank has already.
    """

    def compute():
        with TemporaryDirectory() as folder:
            options = ["--model", "miniature", "--mixed_precision", "no", "--batch-size", "1", "--val_count", "2"]
            options += ["--output-path", f"{folder}/run", *(["--bank", f"{folder}/bank"] if banked else [])]
            args = parse_options([*options, *flags])
            run, *_ = set_up(args, check_inputs(args))

            def count(step):
                with flop_counter() as counter:
                    train_step(run, step, lambda: None)
                return counter.get_total_flops()

            if banked:
                count(1)  # fills it
            total = sum(count(1 if banked else step) for step in range(1, updates + 1)) / updates
        return {"flops": torch.tensor(total, dtype=torch.float64)}

    return kept(["flops", updates, banked, flags], compute)["flops"].item()


def hashes(*paths: Path | None) -> list[str | None]:
    """What tells weights apart, whatever their files are called; None is the original."""
    return [path and file_hash(path) for path in paths]


def kept(key: list, compute: Callable[[], dict]) -> dict[str, torch.Tensor]:
    """compute(), or what it gave for this key before."""
    path = FOLDER / "scores" / f"{short_hash(key)}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(compute(), path)
    return load_file(path)


def mean(looks: Sequence[dict]) -> dict:
    """Scores of several seeds' runs, averaged for each prompt."""
    return {name: torch.stack([look[name] for look in looks]).mean(0) for name in looks[0]}


def header(*columns: str, scores: Sequence[str] = SCORES) -> str:
    """The first two lines of a table with some columns before those of the scores."""
    names = [*columns, *(COLUMNS[name][0] for name in scores)]
    return "| " + " | ".join(names) + " |\n|" + " --- |" * len(names)


def means(*cells: str, look: dict, scores: Sequence[str] = SCORES) -> str:
    """A row of mean scores."""
    return row(*cells, *(f"{COLUMNS[name][1] * look[name].mean():{COLUMNS[name][2]}}" for name in scores))


def changes(*cells: str, look: dict, before: dict, scores: Sequence[str] = SCORES) -> str:
    """A row of how mean scores changed, with paired 95 % intervals."""
    written = []
    for name in scores:
        _, scale, form = COLUMNS[name]
        written.append("{:+{f}} [{:+{f}}, {:+{f}}]".format(
            *(scale * value for value in paired_interval(before[name], look[name])), f=form
        ))  # fmt: skip
    return row(*cells, *written)


def draw(shown: dict[str, dict], to: Path) -> None:
    """One row of pictures of the first held-out prompts for each {label: options of Evaluation.sampler}."""
    prompts = evaluation().prompts[:SHOWN]
    rows = [evaluation().sampler(**options)(prompts, range(SHOWN)) for options in shown.values()]
    page = torch.cat([torch.cat([*row], dim=2) for row in to_uint8(torch.stack(rows))], dim=1).permute(1, 2, 0)
    height = rows[0].shape[2]
    figure, panel = plt.subplots(figsize=(11, 1.25 * len(shown)), layout="constrained")
    panel.imshow(page, interpolation="lanczos")
    panel.set_yticks([height * (number + 0.5) for number in range(len(shown))], list(shown), fontsize=11)
    panel.set_xticks([])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    figure.savefig(to, dpi=90, bbox_inches="tight")


def experiment(main: Callable[[], None], description: str) -> None:
    """Run main() as a program that has no options but --help."""

    def program():
        make_parser(description, ()).parse_args()
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # so that all machines compute alike
        try:
            main()
        except KeyboardInterrupt:
            raise UserError("stopped; repeat the command to continue from here") from None

    run_program(program)


def row(*cells: str) -> str:
    return ("| " + " | ".join(cells) + " |").replace("[-", "[−").replace(" -", " −")
