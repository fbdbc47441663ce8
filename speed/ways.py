"""What each way of --gradient costs beside the published loop's step.

FLOPs and peak memory with SD v1.5 and the four real rewards, counted as speed.full_size does; the seconds of a model of
medium size, whose steps are timed in turn in one process, in fp32. A bank's entries are shared out among their uses:
$ python -m speed.ways
$ python -m speed.ways --rounds 0          counts only
"""

import contextlib
import copy
import time
from argparse import Namespace
from collections import Counter
from functools import partial

import torch
from diffusers import DDIMScheduler
from tqdm import tqdm

from speed.full_size import OPTIONS as FULL_SIZE
from speed.full_size import count, make_inputs, parted_step
from speed.networks import LEARNING_RATE, build, middle_size
from speed.step import plain_step
from textcraftor.errors import run_program
from textcraftor.models import SD_V1_CONFIGS, clip_tokenizer, quiet_libraries
from textcraftor.options import make_parser, require
from textcraftor.sampling import make_scheduler

OPTIONS = (("--rounds", 3, "timed steps of each way, after an untimed one; 0 = only count"),)
REFL = {"gradient": "refl", "grad_steps": 1}
OFF = {"tune_unconditional": "off"}
WAYS = {
    "the published loop": {"plain": True},
    "last_k, K = 5 (the default)": {},
    "last_k, K = 5, used 4 times": {"reuse": 4},
    "last_k, K = 10": {"grad_steps": 10},
    "last_k, K = 15": {"grad_steps": 15},
    "last_k, K = 1-5": {"grad_steps": 3},  # the FLOPs are linear in K; the memory is that of K = 5
    "drtune, 3 of the last 15": {"gradient": "drtune", "grad_steps": 3},
    "refl, last 15": REFL,
    "refl, last 5": {**REFL, "driven": 5},
    "refl, last 5, empty prompt left alone": {**REFL, "driven": 5, **OFF},
    "the same, used 4 times": {**REFL, "driven": 5, **OFF, "reuse": 4},
    "the same, used 10 times": {**REFL, "driven": 5, **OFF, "reuse": 10},
}


def main(argv=None):
    args = make_parser(__doc__, OPTIONS).parse_args(argv)
    require(args, {"rounds": 0})
    quiet_libraries()
    scheduler = make_scheduler(DDIMScheduler.load_config(SD_V1_CONFIGS, subfolder="scheduler"), 25)
    defaults = vars(make_parser(None, FULL_SIZE).parse_args([])) | {"count": True}
    counted = {}
    for name, way in tqdm(WAYS.items(), desc="counting"):
        for checkpointing in ("full",) if "plain" in way else ("full", "none"):
            precision = "no" if "plain" in way else "bf16"
            settings = {"mixed_precision": precision, "gradient_checkpointing": checkpointing}
            counted[name, checkpointing] = count(Namespace(**defaults | settings | way), scheduler)
    for checkpointing in ("full", "none"):
        flops, _ = counted["last_k, K = 1-5", checkpointing]
        counted["last_k, K = 1-5", checkpointing] = flops, counted["last_k, K = 5 (the default)", checkpointing][1]
    seconds = measure(args.rounds, defaults, scheduler) if args.rounds else {}
    heads = ["way", *("recomputed: TFLOP", "ratio", "peak, GiB"), *("kept: TFLOP", "ratio", "peak, GiB")]
    heads += ["seconds, medium", "ratio"] if seconds else []
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    plain = sum(counted["the published loop", "full"][0].values())
    for name in WAYS:
        cells = [name]
        for checkpointing in ("full", "none"):
            if (name, checkpointing) in counted:
                flops, peak = counted[name, checkpointing]
                total = sum(flops.values())
                cells += [f"{total / 1e12:.2f}", f"{total / plain:.3f}", f"{peak / 2**30:.1f}"]
            else:
                cells += ["", "", ""]
        if seconds:
            cells += [f"{seconds[name]:.2f}", f"{seconds[name] / seconds['the published loop']:.3f}"]
        print("| " + " | ".join(cells) + " |")


def measure(rounds, defaults, scheduler):
    """{way: least seconds of a step of the medium-sized model, without recomputation}."""
    torch.manual_seed(0)
    networks = build(middle_size(), "text_encoder", torch.float32)
    plain = copy.deepcopy(networks)
    for network in (plain[1], plain[2], *plain[4]):
        network.requires_grad_()
    networks[1].requires_grad_()
    for network in networks[1:4]:
        network.to(memory_format=torch.channels_last)
    seconds = {}
    for repeat in tqdm(range(rounds + 1), desc="timing"):
        for name, way in WAYS.items():
            args = Namespace(**defaults | {"mixed_precision": "no", "gradient_checkpointing": "none"} | way)
            used = plain if args.plain else networks
            optimizer = torch.optim.AdamW(used[1].parameters(), lr=LEARNING_RATE)
            parts = Counter()
            if args.plain:
                with timed("all", parts, args.reuse):
                    prompts, noise = make_inputs(args, used[2].config.sample_size)
                    (-plain_step(used, clip_tokenizer(), scheduler, prompts, noise, args.grad_steps).mean()).backward()
                    optimizer.step()
            else:
                part = partial(timed, parts=parts, reuse=args.reuse)
                parted_step(args, part, used, scheduler, optimizer, "cpu")
            if repeat:  # the first is a warm-up
                seconds[name] = min(seconds.get(name, float("inf")), sum(parts.values()))
    return seconds


@contextlib.contextmanager
def timed(name, parts, reuse):
    """Add the seconds of a part of a step to parts[name], those of the bank's steps divided by its uses."""
    began = time.perf_counter()
    yield
    elapsed = time.perf_counter() - began
    parts[name] += elapsed / (reuse if name == "first steps, no gradient" else 1)


if __name__ == "__main__":
    run_program(main)
