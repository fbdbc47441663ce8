"""Reading weight files and loading them strictly: either everything fits, or the user learns what does not."""

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from textcraftor.errors import UserError


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors, .pt, .pth or .bin file, on the CPU; `{'state_dict': ...}` is unwrapped.

    Raises UserError if the file cannot be read or holds no state dict.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each raise their own kinds for a damaged file
        # Not the library's own words: torch's advise to switch its safe loading off.
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}): expected safetensors, or a .pt, .pth or .bin "
            "that holds nothing but tensors; fetch it again or name another file"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict (names and tensors); fetch it again")
    return state


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load `state`, read from `path`, into `module` in the module's own dtype; every name and shape must fit.

    Raises UserError that names the first missing, unexpected and misshapen weights.
    """
    own = module.state_dict()
    misshapen = [
        f"{name} {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    check_fit(
        path,
        type(module).__name__,
        missing=[name for name in own if name not in state],
        unexpected=[name for name in state if name not in own],
        misshapen=misshapen,
    )
    module.load_state_dict(state)


def check_fit(path: Path, model: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    """Raise UserError that names the first of each list of misfits, unless all are empty."""
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    found = [
        f"{kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for kind, names in lists.items()
        if names
    ]
    if found:
        raise UserError(f"{path}: not the weights of the {model} expected here; {'; '.join(found)}")
