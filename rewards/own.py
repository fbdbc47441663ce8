"""A user's own reward: a Python function in a file, named path/to/file.py:function."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from rewards.base import check_inputs
from textcraftor.errors import UserError


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
