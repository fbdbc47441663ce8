"""The rewards by name. To add one, copy rewards/clip.py to rewards/NAME.py and add NAME to REWARDS below.

That is all: the training script then takes --NAME for its weight, and NAME for --monitor.

Each reward is a module here with `missing(root) -> list[str]`, one line per weight file that is not there, and
`load(root, device, dtype) -> Reward`. Nothing in this file imports torch, so that --help and the checks of options
stay fast.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from textcraftor.errors import UserError

if TYPE_CHECKING:
    import torch

    from rewards.base import Reward

# Name: (default weight in training, its line in --help).
REWARDS = {
    "clip": (0.5, "weight of the CLIP score; a reward of weight 0 is not loaded"),
    "aesthetic": (1.0, "weight of the LAION aesthetic score"),
    "pickscore": (1.0, "weight of PickScore"),
    "hpsv2": (1.0, "weight of HPS v2"),
}


def load_reward(name: str, root: Path | str, device: torch.device | str, dtype: torch.dtype | None = None) -> Reward:
    """Load the reward `name` (a key of REWARDS) from its folder below `root`, frozen.

    dtype: of its tower: fp32 (the default), bf16 or fp16; features are normalised and compared in fp32 in any case.
    Raises UserError if files are missing or do not fit.
    """
    import torch

    check_files([name], root)
    return importlib.import_module(f"rewards.{name}").load(Path(root), device, dtype or torch.float32)


def check_files(names: list[str], root: Path | str) -> None:
    """Raise UserError if files of these rewards are missing below `root`: names each, and how to get it."""
    if unknown := [name for name in names if name not in REWARDS]:
        raise UserError(f"no reward is called {unknown[0]}; choose from {', '.join(REWARDS)}")
    modules = {name: importlib.import_module(f"rewards.{name}") for name in names}
    lines = [f"{name}: {line}" for name, module in modules.items() for line in module.missing(Path(root))]
    if lines:
        raise UserError("\n  ".join(["reward weights are missing:", *lines]))
