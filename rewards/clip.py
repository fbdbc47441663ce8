"""The CLIP reward: cos(image, text) of open_clip's ViT-g-14, or of the model in the folder clip/ if there is one."""

from pathlib import Path

import torch

from rewards.base import Reward
from rewards.towers import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_FILES,
    TRANSFORMERS_FILES,
    TransformersReward,
    find_tower,
    find_weights,
    load_open_clip,
    load_transformers,
    missing_tower,
    missing_weights,
)
from textcraftor.downloads import command

TOWER = ("ViT-g-14", "laion2b_s34b_b88k")
SCALE = 100.0


def missing(root: Path) -> list[str]:
    """One line for each file that is not there."""
    folder, how = root / "clip", command("clip", root)
    if is_transformers(folder):
        return missing_weights(folder, TRANSFORMERS_FILES, how)
    return missing_tower(folder, *TOWER, how)


def load(root: Path, device: torch.device | str, dtype: torch.dtype) -> Reward:
    """The CLIP reward, about 0.3 for a matching pair. Raises UserError if the weights do not fit."""
    folder = root / "clip"
    if is_transformers(folder):
        reward = TransformersReward("clip", SCALE, *load_transformers(folder))
    else:
        reward = load_open_clip("clip", SCALE, *find_tower(folder, *TOWER))
    return reward.frozen(device, dtype)


def is_transformers(folder: Path) -> bool:
    """Whether the folder holds a transformers CLIPModel; if it holds an open_clip model as well, that one is used."""
    own = (folder / OPEN_CLIP_CONFIG).is_file() or find_weights(folder, OPEN_CLIP_FILES)
    return (folder / "config.json").is_file() and not own
