"""Trained weights on disk, under names that transformers 4 and 5, diffusers and ComfyUI know."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from textcraftor.errors import UserError


def save_text_encoder(text_encoder, path):
    """Write a CLIPTextModel as fp32 safetensors with keys `text_model.…` (gone from transformers 5 itself)."""
    _save({f"text_model.{_bare(key)}": value for key, value in text_encoder.state_dict().items()}, path)


def load_text_encoder(text_encoder, path):
    """Fill a CLIPTextModel from a safetensors or pickled state dict, strictly, in place.

    Keys may carry `module.` and `text_model.` in front (the paper's file has both) and include `position_ids`, a
    constant of old transformers. Raises UserError with the first missing, unexpected or misshapen names.
    """
    _load(text_encoder, path, _bare)


def save_unet(unet, path):
    """Write a UNet2DConditionModel as fp32 safetensors with diffusers' own keys."""
    _save(unet.state_dict(), path)


def load_unet(unet, path):
    """Fill a UNet2DConditionModel as load_text_encoder does; keys may carry `module.` in front."""
    _load(unet, path, lambda key: key.removeprefix("module."))


def _bare(key):
    return key.removeprefix("module.").removeprefix("text_model.")


def _save(state, path):
    # Written whole beside its place, then renamed: a reader or a crash never sees half a file.
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    save_file({key: value.detach().float().cpu().contiguous() for key, value in state.items()}, unfinished)
    os.replace(unfinished, path)


def _load(network, path, rename):
    state = {rename(key): value for key, value in _read(path).items() if not key.endswith("position_ids")}
    own = {rename(key): (key, value) for key, value in network.state_dict().items()}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, (_, value) in own.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{kind}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if keys
    ]
    if problems:
        raise UserError(f"{path}: not the weights of this {type(network).__name__}; {'; '.join(problems)}")
    network.load_state_dict({own[key][0]: value for key, value in state.items()})


def _read(path):
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as problem:
        raise UserError(f"{path}: not a readable checkpoint ({str(problem).splitlines()[0]})") from problem
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state dict (names to tensors), found {type(state).__name__}")
    return state
