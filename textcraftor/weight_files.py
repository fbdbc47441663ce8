"""Weights of the text encoder and the UNet on disk.

Files are written with the names that transformers 4 and 5, diffusers and ComfyUI know.
"""

import os
from pathlib import Path

from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel

from textcraftor.errors import UserError, first_line
from textcraftor.weights import load_strictly, read_weights


def save_text_encoder(state, path):
    """Write a CLIPTextModel's state dict as fp32 safetensors, keys `text_model.…` (gone from transformers 5 itself)."""
    save_tensors({f"text_model.{_bare(key)}": value.float() for key, value in state.items()}, path)


def load_text_encoder(text_encoder, path):
    """Fill a CLIPTextModel from a weight file, a folder or a hub id, strictly, in place.

    Keys may carry `module.` and `text_model.` in front (the paper's file has both) and include `position_ids`, a
    constant of old transformers. Raises UserError with the first missing, unexpected or misshapen names.
    """
    if Path(path).is_file():
        fill_text_encoder(text_encoder, read_weights(path), path)
    else:
        _load_tuned(text_encoder, path, CLIPTextModel, "text_encoder")


def fill_text_encoder(text_encoder, state, path):
    """load_text_encoder for a state dict that was read from `path`."""
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    own = {_bare(key): key for key in text_encoder.state_dict()}
    load_strictly(text_encoder, {own.get(_bare(key), key): value for key, value in state.items()}, path)


def save_unet(state, path):
    """Write the state dict of a UNet2DConditionModel as fp32 safetensors with diffusers' own keys."""
    save_tensors({key: value.float() for key, value in state.items()}, path)


def load_unet(unet, path):
    """Fill a UNet2DConditionModel as load_text_encoder does; keys may carry `module.` in front."""
    if Path(path).is_file():
        load_strictly(unet, {key.removeprefix("module."): value for key, value in read_weights(path).items()}, path)
    else:
        _load_tuned(unet, path, UNet2DConditionModel, "unet")


def save_tensors(tensors, path):
    """Write a dict of tensors as safetensors, first beside its place, then renamed: nobody ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(tensors, unfinished, metadata={"format": "pt"})  # transformers 4 reads no file without it
    os.replace(unfinished, path)


def _load_tuned(network, path, kind, part):
    """Fill `network`, of class `kind`, with tuned weights, strictly, in place, and return it.

    path: a file for load_file(network, path) (our safetensors, the paper's .pth), or the folder or hub id of a whole
    model that has them in its `part`/, or of a `kind` alone. Raises UserError if it cannot be loaded or does not fit.
    """
    is_folder = Path(path).is_dir()
    subfolders = [part if (Path(path) / part).is_dir() else ""] if is_folder else [part, ""]
    problems = []
    for subfolder in subfolders:
        try:
            found, info = kind.from_pretrained(
                path, subfolder=subfolder, local_files_only=is_folder, output_loading_info=True
            )
        except Exception as problem:  # of the hub's client, safetensors, json, and configurations
            problems.append(first_line(problem))
            continue
        if info["missing_keys"]:  # which the library fills at random
            raise UserError(f"{path}: its {part} lacks {sorted(info['missing_keys'])[0]} and perhaps more")
        load_strictly(network, found.float().state_dict(), path)
        return network
    raise UserError(
        f"{path}: expected a weight file, a folder or a hub id with a {kind.__name__} ({'; '.join(problems)})"
    )


def check_text_encoder(path):
    """Raise UserError if load_text_encoder could not load `path`, as far as names of files and weights tell."""
    _check_path(path)


def check_unet(path):
    """check_text_encoder for load_unet."""
    _check_path(path)


def _check_path(path):
    """Raise UserError if `path` is no file, no folder, and no name that could be a hub id."""
    where = Path(path)
    if not where.exists() and (where.suffix or str(path).startswith((".", "/")) or str(path).count("/") != 1):
        raise UserError(f"{path}: no such weights; expected a .safetensors or .pth file, a folder, or a hub id")


def _bare(key):
    return key.removeprefix("module.").removeprefix("text_model.")
