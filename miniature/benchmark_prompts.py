"""The miniature's own benchmarks, of held-out scenes, in PartiPrompts' form (a tsv file with categories and challenges)
and in the HPSv2 benchmark's (a list of prompts a style).

    python -m miniature.benchmark_prompts          writes them to miniature/benchmarks/
"""

import json
from itertools import islice
from pathlib import Path

import numpy as np

from miniature.world import parse, random_scene, write_caption

SEED = 2023
CATEGORIES = {
    "animals": ("bee", "butterfly", "fox", "frog", "octopus", "panda", "penguin", "whale"),
    "food": ("apple", "banana", "carrot", "donut", "pizza", "strawberry"),
    "plants": ("cactus", "mushroom", "sunflower"),
    "space": ("moon", "rocket", "star"),
    "things": ("ball", "balloon", "car", "gift"),
}
CATEGORY = {name: category for category, names in CATEGORIES.items() for name in names}
RELATIONS = (" above ", " below ", " to the left of ", " to the right of ")
OPENINGS = {"emoji": "emoji of ", "photo": "a photo of ", "picture": "a picture of "}  # the grammar's; else plain
PARTI_PROMPTS, STYLE_PROMPTS = 160, 80


def held_out_captions(seed: int):
    """Endless complete captions of held-out scenes, no two the same."""
    rng, seen = np.random.default_rng([SEED, seed]), set()
    while True:
        caption = write_caption(random_scene(rng, held_out=True), rng, complete=True)
        if caption not in seen:
            seen.add(caption)
            yield caption


def category(caption: str) -> str:
    """The kind of the object that is named first."""
    return CATEGORY[parse(caption)["objects"][0]["name"]]


def challenge(caption: str) -> str:
    """What makes it hard: one object, two of them, or two placed by a relation."""
    if any(relation in caption for relation in RELATIONS):
        return "relation"
    return "one object" if len(parse(caption)["objects"]) == 1 else "two objects"


def style(caption: str) -> str:
    """How the caption begins."""
    return next((name for name, opening in OPENINGS.items() if caption.startswith(opening)), "plain")


def write_benchmarks(to: Path) -> None:
    """Write PartiPrompts.tsv and HPDv2/STYLE.json into the folder `to`."""
    captions = held_out_captions(0)
    lines = ["Prompt\tCategory\tChallenge\tNote"]
    for caption in islice(captions, PARTI_PROMPTS):
        lines.append(f"{caption}\t{category(caption)}\t{challenge(caption)}\t")
    (to / "HPDv2").mkdir(parents=True, exist_ok=True)
    (to / "PartiPrompts.tsv").write_text("\n".join(lines) + "\n")
    styles = {name: [] for name in (*OPENINGS, "plain")}
    for caption in held_out_captions(1):
        if len(styles[style(caption)]) < STYLE_PROMPTS:
            styles[style(caption)].append(caption)
        if all(len(prompts) == STYLE_PROMPTS for prompts in styles.values()):
            break
    for name, prompts in styles.items():
        (to / "HPDv2" / f"{name}.json").write_text(json.dumps(prompts, indent=1) + "\n")


if __name__ == "__main__":
    write_benchmarks(Path(__file__).parent / "benchmarks")
