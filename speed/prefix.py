"""The first 20 steps, in inference mode, with and without torch.compile, on the model of medium size.

$ python -m speed.prefix

Compiled is what --compile compiles, the UNet's transformer blocks; the shapes never change. Seconds are the least of
some rounds, in turn; the first round, which compiles, is apart.
"""

import copy
import time
from functools import partial

import torch
from diffusers import DDIMScheduler

from speed.networks import build, in_use, middle_size
from speed.step import GUIDANCE, K, T
from textcraftor.embeddings import embed_prompts
from textcraftor.errors import run_program
from textcraftor.models import SD_V1_CONFIGS, clip_tokenizer, quiet_libraries
from textcraftor.options import make_parser, require
from textcraftor.sampling import make_scheduler, predict_noise, prompt_noise, sample_prefix

OPTIONS = (
    ("--batch-size", 4, "images at once"),
    ("--rounds", 3, "timed rounds after the one that compiles"),
)


def main(argv=None):
    args = make_parser(__doc__, OPTIONS).parse_args(argv)
    require(args, {"batch_size rounds": 1})
    quiet_libraries()
    scheduler = make_scheduler(DDIMScheduler.load_config(SD_V1_CONFIGS, subfolder="scheduler"), T)
    torch.manual_seed(0)
    networks = build(middle_size(), "", torch.float32)
    conditions, _ = embed_prompts(in_use(networks, clip_tokenizer()), ["a lighthouse at dawn"] * args.batch_size)
    unet = networks[2].to(memory_format=torch.channels_last)
    noise = prompt_noise(0, range(args.batch_size), (4, unet.config.sample_size, unet.config.sample_size))
    unets = {"fp32": unet, "bf16": copy.deepcopy(unet).to(torch.bfloat16)}
    for name, network in list(unets.items()):
        unets[f"{name}, compiled"] = copy.deepcopy(network)
        unets[f"{name}, compiled"].compile_repeated_blocks()
    torch._dynamo.config.recompile_limit = 64
    seconds = {name: [] for name in unets}
    for _ in range(1 + args.rounds):
        for name, network in unets.items():
            began = time.perf_counter()
            with torch.inference_mode():
                sample_prefix(partial(predict_noise, network, GUIDANCE), scheduler, noise, conditions, (T - K,))
            seconds[name].append(time.perf_counter() - began)
    for name, (first, *others) in seconds.items():
        print(f"{name:<16} first round {first:6.1f} s, others {min(others):6.2f} s")


if __name__ == "__main__":
    run_program(main)
