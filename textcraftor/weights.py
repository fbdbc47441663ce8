"""Read weight files and load them strictly: either every weight fits, or the error names the one that does not."""

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from textcraftor.errors import UserError, first_line
from textcraftor.files import write_whole
from textcraftor.unpickle import read_pickle

# Wrappers (torch.compile, DistributedDataParallel, FSDP, activation checkpointing) put these into weights' names.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# fmt: off
# What a file looks like, by the names in it: (pattern, what the file is). The first match counts.
OTHER_MODELS = (
    (r"hada_w|lokr_w|dora_scale",                           "a LoHa, LoKr or DoRA; merge it into its model first"),
    (r"lora_|\.lora\.|_lora\.",                             "a LoRA; give it as --text_path or --unet_path"),
    (r"^string_to_param|^emb_params$|^clip_[lg]$",          "a textual-inversion embedding"),
    (r"conditioner\.embedders\.0\.model\.",                 "a Stable Diffusion XL refiner"),
    (r"conditioner\.embedders\.",                           "a Stable Diffusion XL model (support is planned)"),
    (r"joint_blocks\.",                                     "a Stable Diffusion 3 model"),
    (r"double_blocks\.|single_transformer_blocks\.",        "a Flux model"),
    (r"control_model\.|controlnet_|zero_convs\.",           "a ControlNet"),
    (r"cond_stage_model\.model\.",                          "a Stable Diffusion 2.x model (support is planned)"),
    (r"motion_modules\.",                                   "an AnimateDiff motion module"),
    (r"label_emb\.|add_embedding\.",                        "a UNet of Stable Diffusion XL"),
)
PARTS = (
    (r"cond_stage_model\.",                                 "a whole Stable Diffusion model in one file"),
    (r"input_blocks\.|down_blocks\..*attentions\.|time_embed", "a UNet"),
    (r"decoder\..*conv_in\.|post_quant_conv\.",             "a VAE"),
    (r"resblocks\.",                                        "a CLIP model under open_clip's or OpenAI's names"),
    (r"token_embedding\.",                                  "a CLIP text encoder"),
    (r"vision_model\.",                                     "an image encoder"),
    (r"shared\.weight$|layer\.\d+\.SelfAttention\.",        "a T5 text encoder"),
)
# fmt: on


class State(NamedTuple):
    """One dict of names and tensors in a file, and the keys that lead to it."""

    keys: tuple[str, ...]
    tensors: dict[str, torch.Tensor]


def read_weights(path: Path | str) -> dict[str, torch.Tensor]:
    """The state dict in a safetensors file or PyTorch pickle, on the CPU. Content decides, not the file's name.

    Where trainers nest it ({"state_dict": …} beside optimizer states), the dict with the most tensors is taken.
    Raises UserError if the file cannot be read or holds no state dict.
    """
    return max(read_states(path), key=lambda state: len(state.tensors)).tensors


def read_states(path: Path | str, meta: bool = False) -> list[State]:
    """All dicts of names and tensors in a safetensors file or PyTorch pickle, however deep they are nested.

    No code in a pickle ever runs. meta: read names and shapes only; the tensors are on the device "meta".
    Raises UserError if the file cannot be read or holds no such dict.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        if start[8:] == b"{":  # after the length of the header, which is JSON
            content = _read_safetensors(path, meta)
        else:
            content = _read_torch(path, meta)
    except Exception as error:  # pickle, zipfile, torch and safetensors each raise their own kinds for damaged files
        # torch's own message would advise switching safe loading off, so it is not shown.
        raise UserError(f"{path}: {_explain(path, start, error)}") from error
    states = list(_find_states(content, ()))
    if not states:
        raise UserError(f"{path}: holds no weights (names with tensors)")
    return states


def _read_safetensors(path, meta):
    if not meta:
        return safetensors.torch.load_file(path)
    with safe_open(path, "pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}


def _read_torch(path, meta):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols that read_pickle knows
            return torch.load(path, map_location="meta" if meta else "cpu", weights_only=True)
    except Exception:  # something beside the tensors that PyTorch does not allow, or a damaged file
        return read_pickle(path, meta)


def _explain(path, start, error):
    """What is wrong with a file that could not be read."""
    if start.startswith(b"version "):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from"
    if start.lstrip().startswith(b"<"):
        return "is a web page, not weights; fetch it again"
    if not start:
        return "is empty; fetch it again"
    if start[8:] == b"{" or start.startswith((b"PK", b"\x80")):
        return f"is damaged or incomplete ({type(error).__name__}); fetch it again"
    return "is not a weight file; expected safetensors, or a .ckpt, .pt, .pth or .bin written by PyTorch"


def _find_states(content, keys) -> Iterator[State]:
    if isinstance(content, dict):
        tensors = {name: value for name, value in content.items() if isinstance(name, str) and _is_tensor(value)}
        if tensors:
            yield State(keys, tensors)
        for key, value in content.items():
            yield from _find_states(value, (*keys, str(key)))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _find_states(value, (*keys, str(index)))


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


def without_wrappers(name: str) -> str:
    """A weight's name without what torch.compile, DistributedDataParallel and the like put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def pick_network(found: dict[str, dict], states: list[State], path: Path | str, wanted: str) -> dict[str, torch.Tensor]:
    """The one network in `found`, which find_networks returned for `states`.

    Where a file holds the network both as trained and averaged (EMA), the averaged one is returned. wanted: what the
    network is, for the message. Raises UserError if there is no such network or there are several.
    """
    averaged = {place: state for place, state in found.items() if re.search(r"(^|[._])ema([._]|$)", place)}
    found = averaged if len(averaged) == 1 else found
    if not found:
        raise UserError(f"{path}: no {wanted} in it; it looks like {describe(states)}")
    (first, state), *others = found.items()
    for place, other in others:
        if state.keys() != other.keys() or not all(_equal(state[name], other[name]) for name in state):
            raise UserError(
                f"{path}: more than one {wanted} in it ({first}, {place}); save the one you want in a file of its own"
            )
    return state


def _equal(tensor, other):
    return tensor.is_meta or torch.equal(tensor, other)


def find_networks(states: list[State], anchors: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """{place in the file, such as "state_dict.text_encoder": state dict} of each network that has all the anchors."""
    found = {}
    for keys, tensors in states:
        tensors = {without_wrappers(name): value for name, value in tensors.items()}
        for name in tensors:
            prefix = name.removesuffix(anchors[0])
            is_prefix = name.endswith(anchors[0]) and (not prefix or prefix.endswith("."))
            if is_prefix and all(prefix + anchor in tensors for anchor in anchors):
                label = ".".join([*keys, prefix.removesuffix(".")]).strip(".") or "top level"
                found[label] = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
    return found


def describe(states: list[State]) -> str:
    """What kind of file this looks like, judging by the names of its weights."""
    return (
        _first_kind(states, OTHER_MODELS + PARTS) or f"weights of another kind, such as {next(iter(states[0].tensors))}"
    )


def check_model_family(states: list[State], path: Path | str, wanted: str) -> None:
    """Raise UserError if the file is a LoRA or belongs to a model of another family than Stable Diffusion v1."""
    if kind := _first_kind(states, OTHER_MODELS):
        raise UserError(f"{path}: looks like {kind}; expected the {wanted} of a Stable Diffusion v1")


def _first_kind(states, kinds):
    names = [name for state in states for name in state.tensors]
    matching = (kind for pattern, kind in kinds if any(re.search(pattern, name) for name in names))
    return next(matching, "")


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], path: Path | str, assign: bool = False) -> None:
    """Load `state`, read from `path`, into `module` in the module's own dtype; every name and shape must fit.

    With assign=True the module takes the tensors themselves, dtype and all: for modules on the meta device.

    Raises UserError that names the first missing, unexpected and misshapen weights, or one with NaN or infinity.
    """
    check_fit(path, type(module).__name__, state, module.state_dict())
    check_finite(state, path)
    module.load_state_dict(state, assign=assign)


def check_fit(path: Path | str, model: str, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise UserError that names the first missing, unexpected and misshapen weights of `state`, read from `path`."""
    lists = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, not {tuple(expected[name].shape)}"
            for name in expected
            if name in state and state[name].shape != expected[name].shape
        ],
    }
    found = [
        f"{kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for kind, names in lists.items()
        if names
    ]
    if found:
        raise UserError(f"{path}: not the weights of the {model} expected here; {'; '.join(found)}")


def check_finite(state: dict[str, torch.Tensor], path: Path | str) -> None:
    """Raise UserError that names the first weight with NaN or infinity."""
    for name, value in state.items():
        if value.is_floating_point() and value.numel() and not value.is_meta:
            if value.dtype.itemsize == 1:  # PyTorch finds no extremes of 8-bit floats
                value = value.float()
            if not torch.isfinite(torch.stack(value.aminmax())).all():
                raise UserError(f"{path}: {name} holds NaN or infinity; use an earlier checkpoint or another file")


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path | str, metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write tensors as safetensors, whole or not at all. Raises UserError if the disk refuses."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {"format": "pt", **metadata}  # transformers 4 needs the format
    with write_whole(path) as unfinished:
        try:
            safetensors.torch.save_file(tensors, unfinished, metadata=metadata)
        except safetensors.SafetensorError as problem:  # raised when the disk is full
            raise UserError(f"{path}: cannot be written ({first_line(problem)})") from problem
