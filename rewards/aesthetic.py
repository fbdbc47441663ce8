"""The LAION aesthetic score, about 0-10: five linear layers on the unit-length image embedding of a CLIP ViT-L/14."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from rewards.base import Reward, at_least_fp32
from rewards.towers import (
    OPENAI,
    build_empty,
    fill,
    find_tower,
    load_open_clip_visual,
    missing_file,
    missing_tower,
    open_clip_normalization,
    read_clip,
    size_of,
)
from textcraftor.downloads import command
from textcraftor.errors import UserError

HEAD = "sac+logos+ava1-l14-linearMSE.pth"
TOWER = ("ViT-L-14-quickgelu", "openai")
LAYERS = ("0", "2", "4", "6", "7")  # the numbers between belong to dropouts, which do nothing at test time


class Aesthetic(Reward):
    """An aesthetic score. It ignores the prompts and has no text tower."""

    name = "aesthetic"
    scale = 3.0

    def __init__(self, visual: nn.Module, head: nn.Module, normalization=OPENAI):
        super().__init__()
        self.tower, self.head = visual, head
        self.mean, self.std = normalization
        self.image_size = size_of(visual)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels)

    def score(self, image_features: Tensor, prompts: list[str]) -> Tensor:
        with torch.autocast(image_features.device.type, enabled=False):
            return self.head(image_features).squeeze(-1)


def missing(root: Path) -> list[str]:
    """One line for each file that is not there."""
    folder, how = root / "aesthetic", command("aesthetic", root)
    return missing_file(folder / HEAD, how) + missing_tower(folder / "clip", *TOWER, how)


def load(root: Path, device: torch.device | str, dtype: torch.dtype) -> Aesthetic:
    """The aesthetic reward. Raises UserError if weights do not fit, also if the head does not fit the tower."""
    path = root / "aesthetic" / HEAD
    head = load_head(path)  # first, since it loads in no time
    architecture, weights = find_tower(root / "aesthetic" / "clip", *TOWER)
    visual = load_open_clip_visual(architecture, weights)
    if head[0].in_features != visual.output_dim:
        raise UserError(
            f"{path} takes image embeddings of {head[0].in_features} numbers, the tower gives {visual.output_dim}; "
            "use the head and the tower of the same model"
        )
    reward = Aesthetic(visual, head.to(at_least_fp32(dtype)), open_clip_normalization(architecture))
    return reward.frozen(device, dtype)


def load_head(path: Path) -> nn.Sequential:
    """The linear layers in the file, in fp32, as wide as they are there (768-1024-128-64-16-1 in the released one)."""
    state = read_clip(path, "layers.0.weight", "aesthetic head (layers.0.weight, …)")
    weights = [state.get(f"layers.{layer}.weight") for layer in LAYERS]
    if any(weight is None or weight.ndim != 2 for weight in weights):
        expected = ", ".join(f"layers.{layer}.weight" for layer in LAYERS)
        raise UserError(f"{path}: expected the matrices {expected} of an aesthetic head, found {', '.join(state)}")

    def build():
        layers = [nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights]
        return nn.Sequential(OrderedDict(zip(LAYERS, layers, strict=True)))

    return fill(build_empty(build), {name.removeprefix("layers."): value for name, value in state.items()}, path)
