"""Table 1 on the miniature: each reward alone, all, direct fine-tuning, the UNet, and text then UNet; one seed.

    python -m experiments.table1

Draws experiments/table1.png, and prints mean scores and the judge's rates on held-out prompts, then their changes with
paired 95 % intervals: after as many updates as the default run has, and after as many FLOPs in the rows whose updates
cost more or less. Needs the font Noto Color Emoji, to draw pictures for direct fine-tuning: of 2,000 that the world
makes, the half with the higher aesthetic score, as the paper takes pictures above 5.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from experiments.runs import FOLDER, UPDATES, changes, draw, experiment, flops, header, mean, means, measure, train
from miniature import world
from miniature.measure import HERE, WORDS
from rewards import load_reward

SEEDS = (0,)
DRAWN, SEED = 2000, 7  # pictures
LR_UNET = "1e-4"  # on held-out prompts 256 to 319, 15 updates gave a total of +2.70, with 3e-5 +1.24
UNET = ("--lr_text", "0", "--lr_unet", LR_UNET)
ALONE = {  # beside CLIP, which section 3 always has
    "aesthetic": ("--pickscore", "0", "--hpsv2", "0"),
    "PickScore": ("--aesthetic", "0", "--hpsv2", "0"),
    "HPS v2": ("--aesthetic", "0", "--pickscore", "0"),
}
NO_CLIP = ("--clip", "0")


def main() -> None:
    direct = ("--method", "direct", "--images", str(pictures()))
    cost = {"text": flops(), "direct": flops(*direct), "unet": flops(*UNET)}
    print({name: f"{value / 1e9:.1f} GFLOP an image of an update" for name, value in cost.items()})
    fair = {name: round(UPDATES * cost["text"] / value) for name, value in cost.items()}

    def text(name, *flags, updates=UPDATES):
        return [measure(train(name, *flags, seed=seed, updates=updates)) for seed in SEEDS]

    def unet(name, updates, text_updates=0):
        looks = []
        for seed in SEEDS:
            encoder = train("default", seed=seed, updates=text_updates) if text_updates else None
            flags = (*UNET, *(("--text_path", str(encoder)) if encoder else ()))
            looks.append(measure(encoder, unet=train(name, *flags, seed=seed, updates=updates, part="tc_unet")))
        return looks

    half = UPDATES // 2
    rows = {
        "original": [base := measure()],
        "prompt engineering, all steps": [measure(words=WORDS, steps=25)],
        "prompt engineering, last 15": [measure(words=WORDS)],
        f"direct, all; {UPDATES} updates": text("direct", *direct),
        f"direct, all; {fair['direct']} updates, as many FLOPs": text("direct", *direct, updates=fair["direct"]),
        **{name: [measure(alone(name, seed=seed)) for seed in SEEDS] for name in ALONE},
        "text, all": text("default"),
        f"UNet, all; {fair['unet']} updates, as many FLOPs": unet("unet", fair["unet"]),
        f"UNet, all; {UPDATES} updates": unet("unet", UPDATES),
        f"text then UNet; {half} + {half} updates": unet("text_then_unet_half", half, half),
        f"text then UNet; {UPDATES} + {UPDATES} updates": unet("text_then_unet", UPDATES, UPDATES),
    }
    print(header(""))
    for name, looks in rows.items():
        print(means(name, look=mean(looks)))
    print(header("change"))
    for name, looks in rows.items():
        print(changes(name, look=mean(looks), before=base))
    tuned = {"tuned": str(train("default"))}
    second = {"unet": str(train("text_then_unet", *UNET, "--text_path", tuned["tuned"], part="tc_unet"))}
    unet_alone = {"unet": str(train("unet", *UNET, part="tc_unet"))}
    shown = {"original": {}, "text": tuned, "UNet": unet_alone, "text then UNet": tuned | second}
    draw(shown, Path("experiments/table1.png"))


def alone(reward: str, *more: str, seed: int = 0, updates: int = UPDATES) -> Path:
    """The weights of a run with one reward of ALONE, beside CLIP unless NO_CLIP is given."""
    return train(f"{reward.replace(' ', '')}_alone", *ALONE[reward], *more, seed=seed, updates=updates)


def pictures():
    """The folder with pictures and captions to fine-tune directly on, drawn now unless it is there."""
    folder = FOLDER / "pictures"
    if not (folder / "metadata.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        scenes = [world.random_scene(np.random.default_rng([SEED, i])) for i in range(DRAWN)]
        drawn = [world.render(scene, np.random.default_rng([SEED, i, 1])) for i, scene in enumerate(scenes)]
        images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            reward = load_reward("aesthetic", HERE, "cpu")
            scores = torch.cat([reward(part, [""] * len(part)) for part in images.split(100)])
        lines = []
        for i in scores.argsort(descending=True)[: DRAWN // 2].sort().values.tolist():
            Image.fromarray(drawn[i]).save(folder / f"{i}.png")
            caption = world.write_caption(scenes[i], np.random.default_rng([SEED, i, 2]))
            lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


if __name__ == "__main__":
    experiment(main, __doc__)
