"""The CLIP reward: cos(image, text) of open_clip's ViT-g-14, or of the open_clip folder clip/ if there is one."""

from pathlib import Path

import torch

from rewards.towers import OpenClipReward, find_tower, load_open_clip, load_tokenizer, missing_tower
from textcraftor.downloads import command

TOWER = ("ViT-g-14", "laion2b_s34b_b88k")


def missing(root: Path) -> list[str]:
    """One line for each file that is not there."""
    return missing_tower(root / "clip", *TOWER, command("clip", root))


def load(root: Path, device: torch.device | str, dtype: torch.dtype) -> OpenClipReward:
    """The CLIP reward, about 0.3 for a matching pair; UserError if the weights do not fit."""
    architecture, weights = find_tower(root / "clip", *TOWER)
    model = load_open_clip(architecture, weights)
    return OpenClipReward("clip", 100.0, model, load_tokenizer(architecture, model)).frozen(device, dtype)
