"""Rewards by name, a user's own from a file, and their weighted sum.

A new reward is a module with `missing(root) -> list[str]` and `load(root, device, dtype) -> Reward`, a line
here, and one for its weight among the options of train_textcraftor.py.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rewards.base import Reward, check_inputs, share_towers
from textcraftor.errors import UserError

MODULES = {
    "clip": "rewards.clip",
    "aesthetic": "aesthetic",
    "pickscore": "pickscore",
    "hpsv2": "hpsv2",
}
NAMES = tuple(MODULES)


def load_reward(name: str, root: Path | str, device: torch.device | str, dtype=torch.float32) -> Reward:
    """The reward `name` (of NAMES) from the weights below the folder `root`, frozen, its tower in `dtype`.

    dtype is fp32, bf16 or fp16; features are normalised and compared in fp32 in any case. Raises UserError if files are
    missing or do not fit.
    """
    check_files([name], root)
    return importlib.import_module(MODULES[name]).load(Path(root), device, dtype)


def check_files(names: list[str], root: Path | str) -> None:
    """Raise UserError naming every file below `root` that these rewards need and lack, with how to get each."""
    if unknown := [name for name in names if name not in MODULES]:
        raise UserError(f"no reward is called {unknown[0]}; there are {', '.join(NAMES)}")
    lines = [f"{name}: {line}" for name in names for line in importlib.import_module(MODULES[name]).missing(Path(root))]
    if lines:
        raise UserError("\n  ".join(["reward weights are missing:", *lines]))


class FunctionReward(nn.Module):
    """A user's function (images (B, 3, H, W) in [0, 1], prompts) -> (B,) as a reward of scale 1."""

    scale = 1.0

    def __init__(self, name: str, function: Callable[[Tensor, list[str]], Tensor]):
        super().__init__()
        self.name, self.function = name, function

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        check_inputs(images, prompts)
        scores = self.function(images, prompts)
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(f"reward {self.name} returned {found} for {len(images)} images, expected ({len(images)},)")
        return scores.to(images)


def load_function(spec: str) -> FunctionReward:
    """The reward in `spec`, "path/to/file.py:function"; UserError if there is none."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not name:
        raise UserError(f"--reward {spec}: expected path/to/file.py:function")
    if not path.is_file():
        raise UserError(f"--reward {spec}: no such file: {path}")
    module_spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if module_spec is None:
        raise UserError(f"--reward {spec}: {path} is no Python file (.py)")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickles in the user's file look it up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"--reward {spec}: {path} fails on import ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--reward {spec}: {path} has no function {name}")
    return FunctionReward(name, function)


class RewardSum(nn.Module):
    """total = sum of weight * scale * r over (reward, weight) pairs; their names must differ.

    Equal image towers, as of the aesthetic reward and of a CLIP reward with ViT-L/14, become one and run once.
    """

    def __init__(self, weighted: list[tuple[nn.Module, float]]):
        super().__init__()
        self.rewards = nn.ModuleList(reward for reward, _ in weighted)
        self.weights = [weight for _, weight in weighted]
        names = [reward.name for reward in self.rewards]
        if not names:
            raise UserError("no reward has a weight; give at least one, such as --clip 0.5")
        if len(set(names)) < len(names):
            raise UserError(f"two rewards have the same name ({', '.join(names)}); rename the function")
        share_towers([reward for reward in self.rewards if isinstance(reward, Reward)])

    def forward(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, H, W) in [0, 1], B prompts -> (total (B,) with gradient, {name: r (B,)} unscaled, detached)."""
        check_inputs(images, prompts)
        features, scores = {}, {}
        for reward in self.rewards:
            if not isinstance(reward, Reward):
                scores[reward.name] = reward(images, prompts)
                continue
            if reward.visual not in features:
                features[reward.visual] = reward.image_features(images)
            scores[reward.name] = reward.score(features[reward.visual], prompts)
        terms = [
            weight * reward.scale * scores[reward.name]
            for reward, weight in zip(self.rewards, self.weights, strict=True)
        ]
        return torch.stack(terms).sum(dim=0), {name: score.detach() for name, score in scores.items()}
