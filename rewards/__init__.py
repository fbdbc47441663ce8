"""The rewards by name. A new one: copy rewards/clip.py to rewards/NAME.py, and add NAME to REWARDS below.

The training script then has --NAME for its weight and takes it as a --monitor, too. A module of this folder has
`missing(root) -> list[str]`, a line for each weight file that is not there, and `load(root, device, dtype) -> Reward`.
Nothing here imports torch until a reward is loaded: the command lines read REWARDS.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from textcraftor.errors import UserError

if TYPE_CHECKING:
    import torch

    from rewards.base import Reward

# Name: default weight in training, and what --help says.
REWARDS = {
    "clip": (0.5, "weight of the CLIP score; a reward of weight 0 is not loaded"),
    "aesthetic": (1.0, "weight of the LAION aesthetic score"),
    "pickscore": (1.0, "weight of PickScore"),
    "hpsv2": (1.0, "weight of HPS v2"),
}


def load_reward(name: str, root: Path | str, device: torch.device | str, dtype: torch.dtype | None = None) -> Reward:
    """The reward `name` (of REWARDS) from the weights below the folder `root`, frozen, its tower in `dtype`.

    dtype: fp32 (the default), bf16 or fp16; features are normalised and compared in fp32 in any case.
    Raises UserError if files are missing or do not fit.
    """
    import torch

    check_files([name], root)
    return importlib.import_module(f"rewards.{name}").load(Path(root), device, dtype or torch.float32)


def check_files(names: list[str], root: Path | str) -> None:
    """Raise UserError naming every file below `root` that these rewards need and lack, with how to get each."""
    if unknown := [name for name in names if name not in REWARDS]:
        raise UserError(f"no reward is called {unknown[0]}; there are {', '.join(REWARDS)}")
    modules = {name: importlib.import_module(f"rewards.{name}") for name in names}
    lines = [f"{name}: {line}" for name, module in modules.items() for line in module.missing(Path(root))]
    if lines:
        raise UserError("\n  ".join(["reward weights are missing:", *lines]))
