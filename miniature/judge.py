"""The judge: an independent recogniser of what a picture of the miniature's world shows, its look and its condition.

It is trained apart from everything else and never a reward. As monitors of the training script:

    --monitor miniature/judge.py:right,miniature/judge.py:clean,miniature/judge.py:right_and_clean
"""

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from miniature import world
from textcraftor.errors import UserError

WEIGHTS = Path(__file__).parent / "judge.safetensors"
PLACES, SIZES, LOOKS, CONDITIONS = (list(d) for d in (world.PLACES, world.SIZES, world.LOOKS, world.CONDITIONS))
THINGS = [
    (name, colour) for name in world.NAMES for colour in (world.OBJECT_COLOURS if name in world.COLOURED else [None])
]  # every object in every colour that it has
QUESTIONS = {
    "object": (len(PLACES), len(THINGS) + 1),
    "size": (len(PLACES), len(SIZES)),
    "background": (1, len(world.COLOURS)),
    "look": (1, len(LOOKS)),
    "condition": (1, len(CONDITIONS)),
}  # (how often asked, answers)


class Judge(torch.nn.Module):
    """A small convolutional network: images (B, 3, 64, 64) in [0, 1] -> {question: logits (B, times, answers)}.

    At each place: which object in which colour (the last answer is none) and which size; for the whole: background,
    look and condition.
    """

    def __init__(self):
        super().__init__()
        widths, blocks = (3, 32, 64, 96, 128), []
        for i, o in pairwise(widths):
            blocks += [
                torch.nn.Conv2d(i, o, 4 if i == 3 else 3, stride=2, padding=1),
                torch.nn.BatchNorm2d(o),
                torch.nn.ReLU(),
            ]
            if i > 3:
                blocks += [torch.nn.Conv2d(o, o, 3, padding=1), torch.nn.BatchNorm2d(o), torch.nn.ReLU()]
        self.body = torch.nn.Sequential(
            *blocks, torch.nn.Flatten(), torch.nn.Linear(widths[-1] * 16, 256), torch.nn.ReLU()
        )
        self.heads = torch.nn.ModuleDict({k: torch.nn.Linear(256, n * m) for k, (n, m) in QUESTIONS.items()})

    def forward(self, images):
        features = self.body(images * 2 - 1)
        return {k: head(features).unflatten(1, QUESTIONS[k]) for k, head in self.heads.items()}


def answers(scene: dict) -> dict[str, torch.Tensor]:
    """The right answers for a scene, {question: (times,)}; -100 where there is no object to have a size."""
    there = {o["place"]: o for o in scene["objects"]}
    return {
        "object": torch.tensor(
            [THINGS.index((there[p]["name"], there[p]["colour"])) if p in there else len(THINGS) for p in PLACES]
        ),
        "size": torch.tensor([SIZES.index(there[p]["size"]) if p in there else -100 for p in PLACES]),
        "background": torch.tensor([world.COLOURS.index(scene["background"])]),
        "look": torch.tensor([LOOKS.index(scene["look"])]),
        "condition": torch.tensor([CONDITIONS.index(scene["condition"])]),
    }


def judge_loss(judge: Judge, images: torch.Tensor, scenes: list[dict]) -> torch.Tensor:
    logits, truth = judge(images), [answers(scene) for scene in scenes]
    return sum(F.cross_entropy(logits[k].flatten(0, 1), torch.cat([t[k] for t in truth])) for k in QUESTIONS)


@lru_cache(1)
def load_judge() -> Judge:
    judge = Judge()
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(WEIGHTS).items()})
    return judge.eval().requires_grad_(False)


@torch.inference_mode()
def see(images: torch.Tensor, judge: Judge | None = None) -> list[dict]:
    """Images (B, 3, 64, 64) in [0, 1] -> the scenes that the judge sees in them."""
    seen = {k: v.argmax(-1).tolist() for k, v in (judge or load_judge())(images.float().cpu()).items()}
    scenes = []
    for i in range(len(images)):
        objects = [
            {"name": THINGS[thing][0], "colour": THINGS[thing][1], "size": SIZES[size], "place": place}
            for thing, size, place in zip(seen["object"][i], seen["size"][i], PLACES, strict=True)
            if thing < len(THINGS)
        ]
        scenes.append(
            {
                "objects": objects,
                "background": world.COLOURS[seen["background"][i][0]],
                "look": LOOKS[seen["look"][i][0]],
                "condition": CONDITIONS[seen["condition"][i][0]],
            }
        )
    return scenes


seen = lru_cache(1)(see)  # all monitors are asked about the same pictures, one after the other


def right(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """(B,) 1.0 where the picture shows all that its prompt asks for, else 0.0."""
    try:
        asked = [world.parse(prompt) for prompt in prompts]
    except ValueError as problem:
        raise UserError(
            f"the miniature's judge: {problem}; it can only read prompts like those in miniature/validation.csv; for "
            "others, replace it with --monitor clip"
        ) from problem
    rightness = [all(world.content_right(*pair).values()) for pair in zip(seen(images), asked, strict=True)]
    return torch.tensor(rightness, dtype=torch.float32, device=images.device)


def clean(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """(B,) 1.0 where the picture has none of the flaws, else 0.0."""
    return torch.tensor([float(scene["condition"] == "clean") for scene in seen(images)], device=images.device)


def right_and_clean(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """(B,) 1.0 where the picture is both, else 0.0."""
    return right(images, prompts) * clean(images, prompts)


def look_share(look: str):
    """A monitor: (B,) 1.0 where the picture has this look, else 0.0."""

    def share(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([float(scene["look"] == look) for scene in seen(images)], device=images.device)

    share.__name__ = look
    return share


plain, sticker, shadow, dotted, ink = map(look_share, LOOKS)
