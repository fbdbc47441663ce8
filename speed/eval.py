"""
Speed of evaluation: images per second of test_parti.py and of a plain loop over batches of 4.

$ python -m speed.eval                                   the miniature, some minutes on a CPU
$ python -m speed.eval --limit 64 --batch-size 32        takes the options of test_parti.py that both have

The plain loop works like the published script: a stock pipeline makes four images with both text encoders, saves them,
and scores them with one reward after another, computing the text features of one prompt at a time; then the next four.
Both make the same images from the same noise: if any pixel differs by more than one grey level, the program fails. They
are timed alternately after a warm-up, without the loading of models, and once more with a clock around each part.
"""

import copy
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from rewards.base import Reward
from textcraftor.benchmark.batches import work_through
from textcraftor.benchmark.options import parse_options
from textcraftor.benchmark.prompt_lists import PARTI
from textcraftor.benchmark.results import Table
from textcraftor.benchmark.scores import load_scorers
from textcraftor.benchmark.sources import Generator
from textcraftor.errors import UserError, run_program
from textcraftor.mixing import Weighted
from textcraftor.models import load_model, quiet_libraries
from textcraftor.sampling import make_scheduler, prompt_noise
from textcraftor.weight_files import load_text_encoder, save_text_encoder

ROUNDS = 2
PARTS = (
    (UNet2DConditionModel, "forward", "UNet"),
    (AutoencoderKL, "decode", "VAE"),
    (CLIPTextModel, "forward", "text encoders"),
    (Reward, "image_features", "rewards: images"),
    (Reward, "text_features", "rewards: prompts"),
    (Image.Image, "save", "saving"),
)


def check_plain(args):
    """Raise UserError for options that the plain loop does not have: the two would make different images."""
    others = {
        "unet_path": "",
        "score_only": "",
        "prompt_eng": "",
        "scheduler": "DDIM",
        "prompt_weighting": 1,
        "bank": "",
    }
    for name, only in others.items():
        if getattr(args, name) != only:
            raise UserError(f"--{name} {getattr(args, name)}: the plain loop does not support this; leave it out")
    if args.encoders and (len(args.encoders) > 1 or args.encoders[0].weight != 1):
        raise UserError(f"--text_path {args.text_path}: the plain loop cannot mix; name one encoder without a weight")
    if args.grad_steps == args.step:
        raise UserError(f"--grad_steps {args.grad_steps} --step {args.step}: the plain loop needs grad_steps < step")


def plain_way(args, scorers, output, device):
    """The plain loop as a function rows -> {index: {column: score}}, which saves the images in `output`."""
    dtype = torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None)
    pipeline.register_modules(scheduler=make_scheduler(dict(pipeline.scheduler.config), args.step))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device, dtype)
    original, tuned = pipeline.text_encoder, copy.deepcopy(pipeline.text_encoder).float()
    load_text_encoder(tuned, args.encoders[0].encoder)
    tuned.to(device, dtype)
    shape = (pipeline.unet.config.in_channels, pipeline.unet.config.sample_size, pipeline.unet.config.sample_size)

    def encode(encoder, prompts):
        pipeline.text_encoder = encoder
        return pipeline.encode_prompt(prompts, device, 1, True)  # conditional, unconditional

    def draw(prompts, indices):
        tuned_conditional, tuned_unconditional = encode(tuned, prompts)
        conditional, unconditional = encode(original, prompts)
        late = torch.cat([tuned_unconditional if args.tune_unconditional == "on" else unconditional, tuned_conditional])

        def switch(pipeline, step, t, tensors):
            return {"prompt_embeds": late} if step == args.step - args.grad_steps - 1 else {}

        return pipeline(
            prompt_embeds=conditional, negative_prompt_embeds=unconditional,
            latents=prompt_noise(args.seed, indices, shape).to(device, dtype), num_inference_steps=args.step,
            guidance_scale=args.guidance, output_type="pt", callback_on_step_end=switch,
        ).images  # fmt: skip

    @torch.no_grad()
    def run(rows):
        scores = {row["index"]: {} for row in rows}
        for start in range(0, len(rows), 4):
            batch = rows[start : start + 4]
            images = draw([row["prompt"] for row in batch], [row["index"] for row in batch])
            pictures = pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(images))
            for picture, row in zip(pictures, batch, strict=True):
                picture.save(output / row["file"])
            for column, scorer in scorers.items():
                features = scorer.image_features(images.float())
                for i, row in enumerate(batch):
                    scores[row["index"]][column] = scorer.score(features[i : i + 1], [row["prompt"]]).item()
        return scores

    return run


def our_way(args, scorers, output, accelerator):
    """What test_parti.py does, as a function like that of plain_way."""
    generator = Generator(PARTI, args, scorers, accelerator.device, "no")
    table = Table(output / "scores.csv", ["index", "prompt", "file"], list(scorers))

    def run(rows):
        done = {}
        work_through(accelerator, rows, done, args.batch_size, generator, table)
        return {index: {column: row[column] for column in scorers} for index, row in done.items()}

    return run


@contextmanager
def clock(device):
    """A context that gives a Counter of the seconds spent in each part, summed over threads."""
    seconds, inside, real = Counter(), threading.local(), [vars(owner)[name] for owner, name, _ in PARTS]

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(function, part):
        @wraps(function)
        def call(*args, **options):
            if getattr(inside, "a_part", False):
                return function(*args, **options)
            inside.a_part, start = True, now()
            try:
                return function(*args, **options)
            finally:
                seconds[part] += now() - start
                inside.a_part = False

        return call

    for (owner, name, part), function in zip(PARTS, real, strict=True):
        setattr(owner, name, timed(function, part))
    try:
        yield seconds
    finally:
        for (owner, name, _), function in zip(PARTS, real, strict=True):
            setattr(owner, name, function)


def another_encoder(model, path):
    """Write a text encoder that differs from the model's own, so that both have to run."""
    encoder = load_model(model)[1]
    generator = torch.Generator().manual_seed(0)
    for weight in encoder.parameters():
        weight.data += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    save_text_encoder(encoder.state_dict(), path)


def table(*rows):
    """A markdown table as text; the first row is the header."""
    lines = ["| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.2f}" for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


def main(argv=None):
    quiet_libraries()
    accelerator = Accelerator()
    device = accelerator.device
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("plain", "ours")]
        for output in outputs:
            output.mkdir()
        argv = [
            "--output_path",
            str(outputs[1]),
            "--limit",
            "160",
            "--mixed_precision",
            "no",
            *(sys.argv[1:] if argv is None else argv),
        ]
        argv = argv if "--model" in argv else ["--model", "miniature", *argv]
        args = parse_options(PARTI, __doc__, argv)
        check_plain(args)
        if not args.encoders:
            args.encoders = [Weighted(f"{folder}/tc_text.safetensors")]
            another_encoder(args.model, args.encoders[0].encoder)
        rows = PARTI.read(Path(args.prompts))[: args.limit or None]
        scorers = load_scorers(PARTI.rewards, args.weights, device, args.hps_version)
        plain, ours = plain_way(args, scorers, outputs[0], device), our_way(args, scorers, outputs[1], accelerator)
        ways = {"plain loop of 4": plain, f"test_parti.py, batches of {args.batch_size}": ours}
        speeds, scores, parts = {name: [] for name in ways}, {}, {}
        for run in ways.values():
            run(rows[: 2 * args.batch_size])
        for _ in range(ROUNDS):
            for name, run in ways.items():
                start = time.perf_counter()
                scores[name] = run(rows)
                speeds[name].append(len(rows) / (time.perf_counter() - start))
        for name, run in ways.items():
            start = time.perf_counter()
            with clock(device) as seconds:
                run(rows)
            parts[name] = dict(seconds) | {"wall clock": time.perf_counter() - start}

        print(f"{len(rows)} images on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        rounds = [f"round {i + 1}" for i in range(ROUNDS)]
        means = {name: [*values, np.mean(values)] for name, values in speeds.items()}
        ratios = [fast / slow for slow, fast in zip(*means.values(), strict=True)]
        print(table(["images/s", *rounds, "mean"], *([name, *means[name]] for name in ways), ["ratio", *ratios]), "\n")
        labels = [*(part for *_, part in PARTS), "wall clock"]
        times = ([part, *(1e3 * parts[name].get(part, 0) / len(rows) for name in ways)] for part in labels)
        print(table(["ms per image, summed over threads", *ways], *times))
        first, second = (
            np.stack([np.asarray(Image.open(output / row["file"])).astype(int) for row in rows]) for output in outputs
        )
        largest = np.abs(first - second).max()
        print(f"\nlargest difference: {largest} of 255 grey levels", end="")
        for column in scorers:
            a, b = ([found[row["index"]][column] for row in rows] for found in scores.values())
            print(f", {column} {np.abs(np.subtract(a, b)).max():.1e}", end="")
        print()
        if largest > 1:
            sys.exit("error: the two make different images, so their speeds cannot be compared")


if __name__ == "__main__":
    run_program(main)
