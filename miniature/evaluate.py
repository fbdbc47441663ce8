"""Measure tuned text encoders of the miniature on its held-out prompts: rewards, judge, and paired 95 % intervals.

    python -m miniature.evaluate output/tc_text.safetensors
    python -m miniature.evaluate output/tc_text.safetensors --start 256 --guidance 3 --picture after.png

Same prompts and noise before and after; the tuned encoder drives the last 15 of 25 steps, as in every test.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from accelerate import Accelerator

from rewards import REWARDS, load_reward
from rewards.own import load_function
from rewards.sum import RewardSum
from textcraftor.errors import UserError, run_program
from textcraftor.models import latent_shape, load_model, make_networks, quiet_libraries
from textcraftor.options import TEST_TUNED_STEPS
from textcraftor.pictures import before_after_grid
from textcraftor.precision import PRECISIONS, choose_precision
from textcraftor.prompts import read_prompts
from textcraftor.recorded import tunes_unconditional
from textcraftor.sampling import make_images, make_scheduler
from textcraftor.statistics import paired_table
from textcraftor.validation import validate, validation_noise
from textcraftor.weight_files import load_text_encoder

HERE = Path(__file__).parent
STEPS = 25


def main() -> None:
    defaults = json.loads((HERE / "defaults.json").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text_path", help="tuned text encoder, safetensors or .pth")
    parser.add_argument("--prompts", default=str(HERE / "heldout.csv"))
    parser.add_argument("--start", type=int, default=0, help="first prompt, counted from 0")
    parser.add_argument("--count", type=int, default=512, help="how many prompts")
    parser.add_argument("--guidance", type=float, default=defaults.get("guidance", 7.5))
    parser.add_argument("--grad_steps", type=int, default=TEST_TUNED_STEPS, help="steps that the tuned encoder drives")
    parser.add_argument("--picture", help="also write a before/after picture here")
    args = parser.parse_args()

    quiet_libraries()
    torch.manual_seed(0)
    prompts = read_prompts(args.prompts)[0][args.start : args.start + args.count]
    if len(prompts) < 2:
        raise UserError(
            f"--start {args.start} --count {args.count}: leaves {len(prompts)} of the prompts in "
            f"{args.prompts}, and an interval needs two"
        )
    model = load_model(HERE / "stable-diffusion")
    tuned = copy.deepcopy(model.text_encoder)
    load_text_encoder(tuned, args.text_path)
    dtype = PRECISIONS[choose_precision("auto", "cpu")[0]]
    for network in (*model[1:4], tuned):
        network.to(dtype)
    scheduler, shape = make_scheduler(model.scheduler_config, STEPS), latent_shape(model)
    weights = {"clip": 0.5, "aesthetic": 1.0, "pickscore": 1.0, "hpsv2": 1.0} | defaults  # as in training
    rewards = RewardSum([(load_reward(name, HERE, "cpu"), weights[name]) for name in REWARDS])
    judge = [load_function(f"{HERE / 'judge.py'}:{name}") for name in ("right", "clean", "right_and_clean")]

    def look(encoder):
        networks = make_networks(model, encoder, tunes_unconditional([args.text_path]))

        def sample(batch, indices):
            noise = validation_noise([args.start + i for i in indices], shape)
            return make_images(networks, scheduler, batch, noise, tuned_steps=args.grad_steps, guidance=args.guidance)

        return validate(Accelerator(cpu=True, mixed_precision="no"), sample, rewards, judge, prompts, 32, 16)

    before, after = look(None), look(tuned)
    print(f"{len(prompts)} prompts, guidance {args.guidance}, last {args.grad_steps} of {STEPS} steps tuned")
    print(paired_table(before[0], after[0]))
    if args.picture:
        before_after_grid(before, after, prompts, "tuning", Path(args.picture))


if __name__ == "__main__":
    run_program(main)
