"""Measure tuned text encoders of the miniature on its held-out prompts: rewards, judge, looks, and 95 % intervals.

    python -m miniature.evaluate output/tc_text.safetensors
    python -m miniature.evaluate seed0/tc_text.safetensors seed1/tc_text.safetensors --words --picture after.png

Same prompts and noise before and after; the tuned encoder drives the last 15 of 25 steps, as in every test. Several
encoders, of several seeds, say, are averaged for each prompt before the prompts are compared; each one's means are
listed, too. --words puts prompt engineering beside them: quality words in all steps, and in the last 15.
"""

import argparse
import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import CLIPTextModel

from miniature.measure import HERE, WORDS, make
from miniature.world import LOOKS
from rewards import REWARDS, load_reward
from rewards.own import load_function
from rewards.sum import RewardSum
from textcraftor.bank import Bank, memory_bank
from textcraftor.errors import UserError, run_program
from textcraftor.files import check_picture_name
from textcraftor.models import load_model, quiet_libraries
from textcraftor.options import TEST_STEPS, TEST_TUNED_STEPS, check_all, miniature_defaults
from textcraftor.pictures import before_after_grid
from textcraftor.prompts import read_prompts
from textcraftor.recorded import tunes_unconditional
from textcraftor.statistics import paired_table
from textcraftor.validation import validate
from textcraftor.weight_files import check_text_encoder, load_text_encoder, load_unet

JUDGED = ("right", "clean", "right_and_clean", *LOOKS)
PICTURES = 16  # the first prompts' pictures are shown: a rule, not a choice


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text_path", nargs="+", help="tuned text encoders, safetensors or .pth")
    parser.add_argument("--prompts", default=str(HERE / "heldout.csv"))
    parser.add_argument("--start", type=int, default=0, help="first prompt, counted from 0")
    parser.add_argument("--count", type=int, default=256, help="how many prompts")
    parser.add_argument("--guidance", type=float, default=miniature_defaults()["guidance"])
    parser.add_argument("--grad_steps", type=int, default=TEST_TUNED_STEPS, help="steps that the tuned encoder drives")
    parser.add_argument("--words", action="store_true", help=f"also measure prompt engineering: '{WORDS}'")
    parser.add_argument("--picture", help="write a before/after picture of the first 16 prompts here")
    args = parser.parse_args(argv)

    prompts = read_prompts(args.prompts)[0][args.start : args.start + args.count]
    if not 0 <= args.grad_steps <= TEST_STEPS or args.start < 0:
        raise UserError(
            f"--start {args.start} --grad_steps {args.grad_steps}: expected start >= 0, grad_steps 0 to {TEST_STEPS}"
        )
    if len(prompts) < 2:
        raise UserError(
            f"--start {args.start} --count {args.count}: leaves {len(prompts)} of the prompts in "
            f"{args.prompts}, and an interval needs two"
        )
    check_all([(check_text_encoder, path) for path in args.text_path])
    if args.picture:
        check_picture_name(Path(args.picture), "--picture")
    evaluate = Evaluation(prompts, args.start, args.guidance)
    print(f"{len(prompts)} prompts, guidance {args.guidance}, last {args.grad_steps} of {TEST_STEPS} steps tuned")
    before = evaluate(steps=args.grad_steps)
    looks = [evaluate(tuned=path, steps=args.grad_steps) for path in args.text_path]
    after = {name: torch.stack([scores[name] for scores, _ in looks]).mean(0) for name in before[0]}
    print(paired_table(before[0], after))
    for path, (scores, _) in zip(args.text_path, looks, strict=True):
        print(f"{path}: " + ", ".join(f"{name} {score.mean():.4g}" for name, score in scores.items()))
    for steps in (TEST_STEPS, TEST_TUNED_STEPS) if args.words else ():
        print(f"prompts with '{WORDS}' in the last {steps} of {TEST_STEPS} steps, scored with the plain prompts")
        print(paired_table(before[0], evaluate(words=WORDS, steps=steps)[0]))
    if args.picture:
        before_after_grid(before, looks[0], prompts, "tuning", Path(args.picture))


class Evaluation:
    """Scores of the miniature's pictures of some held-out prompts under tuned encoders and added words."""

    def __init__(self, prompts: list[str], start: int, guidance: float):
        """prompts: those from number `start` of their file on; the numbers decide the noise."""
        quiet_libraries()
        self.prompts, self.start, self.guidance = prompts, start, guidance
        self.model = load_model(HERE / "stable-diffusion")
        weights = {name: weight for name, (weight, _) in REWARDS.items()}  # training's defaults
        self.rewards = RewardSum([(load_reward(name, HERE, "cpu"), weights[name]) for name in REWARDS])
        self.banks: dict[int, Bank] = {}  # {steps that the tuned encoder drives: the first steps of each prompt}
        self.judge = [load_function(f"{HERE / 'judge.py'}:{name}") for name in JUDGED]

    def __call__(self, **options):
        """({score: (N,)}, the first pictures); options: those of sampler()."""
        processes = Accelerator(cpu=True, mixed_precision="no")
        sample = self.sampler(**options)
        scores, images = validate(processes, sample, self.rewards, self.judge, self.prompts, 32, PICTURES)
        # A judge's name is that of its function: path/to/judge.py:clean.
        return {name.rpartition(":")[2]: score for name, score in scores.items()}, images

    def sampler(
        self, tuned: str | None = None, words: str = "", steps: int = TEST_TUNED_STEPS, unet: str | None = None
    ):
        """(prompts, indices counted from `start`) -> images, with the last `steps` steps driven by the encoder in file
        `tuned`, or the original, that reads the prompts with `words` after them; all steps by the UNet in file `unet`,
        if any."""
        encoder, both = (self.encoder(tuned), tunes_unconditional([tuned])) if tuned else (None, True)
        model, bank = self.model, self.banks.setdefault(steps, memory_bank((TEST_STEPS - steps,)))
        if unet:
            model, bank = self.model._replace(unet=copy.deepcopy(self.model.unet)), None
            load_unet(model.unet, unet)

        def sample(prompts, indices):
            indices = [self.start + i for i in indices]
            return make(model, prompts, indices, self.guidance, encoder, words, steps, both, bank)

        return sample

    def encoder(self, path: str) -> CLIPTextModel:
        """The tuned text encoder in a file."""
        encoder = copy.deepcopy(self.model.text_encoder)
        load_text_encoder(encoder, path)
        return encoder


if __name__ == "__main__":
    run_program(main)
