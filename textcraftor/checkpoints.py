"""Weights and states of a run on disk, each written whole or not at all.

Weights carry the names that transformers 4 and 5, diffusers and ComfyUI know.
"""

import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

from textcraftor.errors import UserError
from textcraftor.weights import load_strictly, read_weights


def save_text_encoder(state, path):
    """Write a CLIPTextModel's state dict as fp32 safetensors, keys `text_model.…` (gone from transformers 5 itself)."""
    save_tensors({f"text_model.{_bare(key)}": value.float() for key, value in state.items()}, path)


def load_text_encoder(text_encoder, path):
    """Fill a CLIPTextModel from a safetensors or pickled state dict, strictly, in place.

    Keys may carry `module.` and `text_model.` in front (the paper's file has both) and include `position_ids`, a
    constant of old transformers. Raises UserError with the first missing, unexpected or misshapen names.
    """
    fill_text_encoder(text_encoder, _read(path), path)


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
    load_strictly(unet, {key.removeprefix("module."): value for key, value in _read(path).items()}, path)


def check_weights(path):
    """Raise UserError unless there is a file `path`."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file")


def save_tensors(tensors, path):
    """Write a dict of tensors as safetensors, first beside its place, then renamed: nobody ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(tensors, unfinished, metadata={"format": "pt"})  # transformers 4 reads no file without it
    os.replace(unfinished, path)


def save_state(accelerator, folder, step):
    """Write all that continuing after `step` needs to folder/step_<step>, whole or not at all; drop the one before."""
    folder, unfinished = Path(folder), Path(folder) / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = list(folder.glob("step_*"))
        unfinished.rename(folder / f"step_{step:06d}")
        for state in older:
            shutil.rmtree(state)
    accelerator.wait_for_everyone()


def last_state(folder):
    """The newest whole state written by save_state and its step, or (None, 0)."""
    states = sorted(Path(folder).glob("step_*"), key=_step)
    return (states[-1], _step(states[-1])) if states else (None, 0)


def _step(state):
    return int(state.name.removeprefix("step_"))


def _bare(key):
    return key.removeprefix("module.").removeprefix("text_model.")


def _read(path):
    check_weights(path)
    return read_weights(path)
