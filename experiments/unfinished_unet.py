"""How far an unfinished build's UNet is: the judge on plain prompts and with quality words, at several guidance scales.

python -m experiments.unfinished_unet --guidance 2 2.5 3       needs the stages vae, latents, judge and clip_L
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from miniature import judge
from miniature.build import (
    NOISE_SCHEDULE,
    latents_of,
    new_unet,
    new_vae,
    scaling_factor,
    text_encoder_of,
    trained,
    trained_clip,
)
from miniature.clips import new_tokenizer
from miniature.measure import HERE, measure_words, report
from textcraftor.models import Model
from textcraftor.prompts import read_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".miniature_build"))
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.5])
    parser.add_argument("--count", type=int, default=64, help="how many of the last held-out prompts")
    args = parser.parse_args()
    vae = trained(args.work, "vae", new_vae())
    vae.register_to_config(scaling_factor=scaling_factor(latents_of(args.work)))
    state, unet = torch.load(args.work / "unet.pt", weights_only=True), new_unet()
    for parameter, average in zip(unet.parameters(), state["average"], strict=True):
        parameter.data.copy_(average)
    unet.eval().requires_grad_(False)
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, set_alpha_to_one=False, clip_sample=False, steps_offset=1)
    text_encoder = text_encoder_of(trained_clip(args.work, "L"))
    model = Model(new_tokenizer(), text_encoder, unet, vae, dict(scheduler.config))
    network = trained(args.work, "judge", judge.Judge())
    judge.load_judge = lambda: network  # the one that ships may be an older build's
    prompts = read_prompts(str(HERE / "heldout.csv"))[0][-128:][: args.count]
    for guidance in args.guidance:
        report(f"step {state['step']}, guidance {guidance}", measure_words(model, prompts, guidance))


if __name__ == "__main__":
    main()
