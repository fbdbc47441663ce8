"""
Check the four released reward models: score four simple drawings and compare the scores with golden.json.
$ python -m rewards.check

A score that golden.json does not have yet is recorded there. Please contribute it, so that others can compare theirs.
"""

import json
import platform
from pathlib import Path

import numpy as np
import torch

from rewards import check_files, load_reward
from textcraftor.errors import UserError, run_program
from textcraftor.files import read_json_object, write_json
from textcraftor.options import REPOSITORY, make_parser

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = {"clip": 1e-3, "aesthetic": 1e-2, "pickscore": 2e-2, "hpsv2": 1e-3}  # fp32 on different devices
SIZE = 512
OPTIONS = (
    ("--weights", str(REPOSITORY), "folder that holds hpsv2/, pickscore/ and aesthetic/"),
    ("--golden", str(GOLDEN), "expected scores; other weights need another file"),
)


def pictures():
    """{prompt: picture (3, SIZE, SIZE) in [0, 1]}, drawn in integers, hence the same to the bit on every machine."""
    y, x = np.mgrid[:SIZE, :SIZE]
    disc = (x - 256) ** 2 + (y - 256) ** 2 < 140**2
    square = (abs(x - 256) < 120) & (abs(y - 256) < 120)
    sun = (x - 256) ** 2 + (y - 300) ** 2 < 90**2
    sky = np.stack([60 + y // 2, 30 + y // 3, 120 - y // 8], axis=-1)
    sunset = _paint(_paint(sky, sun, (255, 220, 90)), y > 330, (25, 35, 70))
    drawn = {
        "a red circle on a white background": _paint(_plain(255, 255, 255), disc, (220, 20, 20)),
        "a blue square on a yellow background": _paint(_plain(250, 220, 30), square, (20, 40, 200)),
        "a black and white checkerboard": _paint(_plain(255, 255, 255), (x // 64 + y // 64) % 2 == 1, (0, 0, 0)),
        "a sunset over the sea": sunset,
    }
    return {prompt: torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 for prompt, pixels in drawn.items()}


def _plain(*colour):
    return np.broadcast_to(colour, (SIZE, SIZE, 3))


def _paint(pixels, mask, colour):
    return np.where(mask[..., None], colour, pixels)


@torch.inference_mode()
def measure(reward):
    """({prompt: score}, number of pictures whose own prompt is the closest, or None if the reward ignores prompts).

    The number needs no reference: unless it is four of four, the model cannot tell a circle from the sea.
    """
    prompts, images = list(pictures()), torch.stack(list(pictures().values()))
    scores = dict(zip(prompts, reward(images, prompts).tolist(), strict=True))
    if reward.name == "aesthetic":
        return scores, None
    cosines = reward.image_features(images) @ reward.text_features(prompts).T
    return scores, (cosines.argmax(dim=1).cpu() == torch.arange(len(prompts))).sum().item()


def compare(name, scores, golden):
    """Compare scores of the reward `name` with `golden` -> (one line per score, how many differ).

    golden: {prompt: {"reference": published value or None, "recorded": first measured value or None}}. A score that
    has neither yet is recorded in it.
    """
    lines, wrong = [], 0
    for prompt, score in scores.items():
        entry = golden[prompt]
        kind = next((kind for kind in ("reference", "recorded") if entry[kind] is not None), None)
        if kind is None:
            entry["recorded"] = round(score, 6)
            verdict = "nothing to compare with yet"
        else:
            good = abs(score - entry[kind]) <= TOLERANCE[name]
            wrong += not good
            verdict = f"{'agrees with' if good else 'DIFFERS from'} {kind} {entry[kind]:.5f}"
        lines.append(f"{name:10} {score:9.5f}  {verdict:32}  {prompt}")
    return lines, wrong


def read_golden(path):
    """The expected scores in a file, as `compare` takes them. Raises UserError if it holds something else."""
    golden = read_json_object(path, f"expected scores as in {GOLDEN}")
    kinds = {"reference", "recorded"}
    if not all(
        name in golden and all(kinds <= golden[name].get(prompt, {}).keys() for prompt in pictures())
        for name in TOLERANCE
    ):
        raise UserError(f"{path}: expected scores of {', '.join(TOLERANCE)} for each picture, as in {GOLDEN}")
    return golden


def main(argv=None):
    args = make_parser(__doc__, OPTIONS).parse_args(argv)
    args.golden = Path(args.golden)
    check_files(list(TOLERANCE), args.weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    golden, wrong, confused = read_golden(args.golden), 0, 0
    before, released = json.dumps(golden), args.golden.resolve() == GOLDEN.resolve()
    for name in TOLERANCE:
        reward = load_reward(name, args.weights, device)
        if released and reward.image_size != (224, 224):
            raise UserError(
                f"{name} takes {reward.image_size[0]} x {reward.image_size[1]} pixels, the released model 224 x 224; "
                f"{GOLDEN.name} is for the released models; give another file with --golden"
            )
        scores, nearest = measure(reward)
        lines, differ = compare(name, scores, golden[name])
        wrong += differ
        print(*lines, sep="\n")
        if nearest is not None:
            print(f"{name:10} {nearest} of {len(scores)} pictures are closest to their own prompt")
            confused += nearest < len(scores)
    if confused and released:
        raise UserError(f"{confused} of the models match pictures with the wrong prompts; nothing was recorded")
    if wrong:
        raise UserError(f"{wrong} scores differ: the weights are not the released ones, or a library has changed")
    if json.dumps(golden) != before:
        machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
        golden["recorded on"] = f"{machine}, torch {torch.__version__}"
        write_json(args.golden, golden)
        print(f"recorded in {args.golden}")


if __name__ == "__main__":
    run_program(main)
