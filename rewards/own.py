"""A user's own reward: a Python function in a file, given as path/to/file.py:function."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from rewards.base import check_inputs
from textcraftor.errors import UserError

WEIGHT_FOLDERS = ("hpsv2", "pickscore", "aesthetic")


class FunctionReward(nn.Module):
    """A user's function (images (B, 3, H, W) in [0, 1], B prompts) -> (B,) as a reward of scale 1."""

    scale = 1.0

    def __init__(self, name: str, function: Callable[[Tensor, list[str]], Tensor]):
        super().__init__()
        self.name, self.function, self.checked = name, function, False

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The function's scores in the images' dtype. Raises UserError if their shape is not (B,)."""
        check_inputs(images, prompts, values=not self.checked)
        self.checked = True
        try:
            scores = self.function(images, prompts)
        except (ImportError, AttributeError) as error:
            if not (hint := _missing_package()):
                raise
            raise UserError(f"reward {self.name} fails ({type(error).__name__}: {error}); {hint}") from error
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(f"reward {self.name} returned {found} for {len(images)} images, expected ({len(images)},)")
        return scores.to(images)


def load_function(spec: str) -> FunctionReward:
    """The reward that `spec`, "path/to/file.py:function", names. Raises UserError if there is none."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not name:
        raise UserError(f"--reward {spec}: expected path/to/file.py:function")
    if not path.is_file():
        raise UserError(f"--reward {spec}: no such file: {path}")
    module_spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if module_spec is None:
        raise UserError(f"--reward {spec}: {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickles in the user's file look it up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        hint = f"; {hint}" if (hint := _missing_package()) else ""
        message = f"--reward {spec}: {path} fails on import ({type(error).__name__}: {error})"
        raise UserError(message + hint) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--reward {spec}: {path} has no function {name}")
    return FunctionReward(name, function)


def _missing_package():
    """A hint if the user's file imported one of this repository's weight folders in place of a package, else "".

    Python imports a folder without __init__.py as an empty package unless a package of that name is installed.
    """
    for name in WEIGHT_FOLDERS:
        if name in sys.modules and getattr(sys.modules[name], "__file__", None) is None:
            return (
                f"the package {name} is not installed, and Python imported this repository's folder of weights "
                f"instead; try: pip install {name}"
            )
    return ""
