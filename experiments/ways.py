"""Where the gradient goes and what it costs: each way of --gradient, with and without a trajectory bank, three seeds.

    python -m experiments.ways                  trains into output_experiments/, what is there is not trained again
    python -m experiments.ways --count 64       on fewer held-out prompts

Prints, for each way, the change of every score over the base on held-out prompts, averaged over the seeds, with paired
95 % intervals, and the UNet evaluations that an image of an update needs: forward in all (reused ones divided by how
often they are used) and those of them with a backward pass.
"""

import argparse
import json

import torch

from experiments.default_run import FOLDER, SEEDS, train
from miniature.evaluate import Evaluation
from miniature.measure import HERE
from textcraftor.prompts import read_prompts
from textcraftor.statistics import paired_interval

DRIVEN = 15
# Name: (options, forward evaluations for an image of 25 steps, backward ones).
WAYS = {
    "last_k, K = 5": ((), 25, 5),
    "last_k, K = 15": (("--grad_steps", "15"), 25, 15),
    "last_k, K = 1-5": (("--grad_steps", "1-5"), 25, 3),
    "drtune, 3 of 15": (("--gradient", "drtune", "--grad_steps", "3"), 25, 3),
    "refl": (("--gradient", "refl", "--grad_steps", "1"), 18, 1),
    "refl, last 5": (("--gradient", "refl", "--grad_steps", "1", "--driven", "5"), 23, 1),
    "refl, last 5, original unconditional": (
        ("--gradient", "refl", "--grad_steps", "1", "--driven", "5", "--tune_unconditional", "off"), 23, 0.5,
    ),
    "refl, last 5, used 4 times": (
        ("--gradient", "refl", "--grad_steps", "1", "--driven", "5", "--bank", str(FOLDER / "bank"), "--reuse", "4"),
        24 / 4 + 1, 1,
    ),
    "last_k, K = 5, used 4 times": (("--bank", str(FOLDER / "bank"), "--reuse", "4"), 20 / 4 + 5, 5),
}  # fmt: skip
SCORES = ("total", "clip", "aesthetic", "pickscore", "hpsv2", "right", "clean", "right_and_clean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=128, help="held-out prompts to measure on")
    args = parser.parse_args()
    guidance = json.loads((HERE / "defaults.json").read_text())["guidance"]
    evaluate = Evaluation(read_prompts(str(HERE / "heldout.csv"))[0][: args.count], 0, guidance)
    base, _ = evaluate(steps=0)
    print(
        "| way | forward / backward | " + " | ".join(SCORES) + " |\n| --- | --- |" + " --- |" * len(SCORES), flush=True
    )
    for name, (flags, forward, backward) in WAYS.items():
        folder = name.replace(" ", "_").replace(",", "").replace("=", "")
        runs = [train(f"{folder}_seed{seed}", "--seed", str(seed), "--val_every", "0", *flags) for seed in SEEDS]
        looks = [evaluate(tuned=str(run / "tc_text.safetensors"), steps=DRIVEN)[0] for run in runs]
        cells = []
        for score in SCORES:
            after = torch.stack([look[score] for look in looks]).mean(0)
            change, low, high = paired_interval(base[score], after)
            cells.append(f"{change:+.3g} [{low:+.3g}, {high:+.3g}]")
        print(f"| {name} | {forward:g} / {backward:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
