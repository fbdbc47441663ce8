"""Checkpoints of a run: its weights and the state to resume from, each file written completely or not at all.

In the output folder: <name>_e_<epoch>_iter_<step>.safetensors, the trained weights, and <name>.safetensors, a link to
the newest; <name>_best.safetensors; beside a LoRA, which has kohya's format, <name>_diffusers.safetensors; and
resume/step_<step>/, accelerate's state of optimizer, loss scale and random numbers, which belongs to the weights of the
same step. Weights have the names that transformers 4 and 5, diffusers and ComfyUI know, so a run can be resumed under
another version of these libraries.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list

from textcraftor.errors import UserError, first_line
from textcraftor.files import free_bytes, write_whole
from textcraftor.lora import load_lora, save_diffusers_lora, save_lora
from textcraftor.recorded import record
from textcraftor.run_folder import RESTART
from textcraftor.stream import samples_shown
from textcraftor.weight_files import load_text_encoder, load_unet, save_text_encoder, save_unet

SAVE = {"text_encoder": save_text_encoder, "unet": save_unet}  # (state dict, path, metadata)
LOAD = {"text_encoder": load_text_encoder, "unet": load_unet}  # (network, path), strictly, in place
MARGIN = 2**20  # bytes for pictures, metrics and the rest


class Trained(NamedTuple):
    """A network in training."""

    part: str  # "text_encoder" or "unet"
    network: torch.nn.Module  # as accelerator.prepare returned it
    learning_rate: float
    lora: bool = False  # train and save a LoRA instead of all weights
    settings: Mapping = MappingProxyType({})  # how the run samples, for the metadata of its files

    @property
    def name(self) -> str:
        """The name of its files: tc_text, tc_unet, tc_text_lora or tc_unet_lora."""
        return {"text_encoder": "tc_text", "unet": "tc_unet"}[self.part] + ("_lora" if self.lora else "")

    def weights(self) -> list[torch.nn.Parameter]:
        """Those in training."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]


def all_weights(trained: list[Trained]) -> list[torch.nn.Parameter]:
    """The weights in training, in one order for clipping and averaging."""
    return [weight for part in trained for weight in part.weights()]


def checkpoint_bytes(trained: list[Trained], averages: bool = False) -> tuple[int, int]:
    """Bytes of one checkpoint's (weights, state): fp32 weights in training, and AdamW's two moments per weight.

    averages: whether a moving average of the weights is kept, in the state and in a file of its own.
    """
    parameters = all_weights(trained)
    weights = 4 * sum(parameter.numel() for parameter in parameters)
    sharded = any(hasattr(parameter, "full_tensor") for parameter in parameters)  # FSDP's state holds the weights too
    return weights, (2 + averages + sharded) * weights


def check_disk(folder: Path, trained: list[Trained], keep: int, averages: bool = False) -> None:
    """Raise UserError unless `folder` has room for a run that keeps `keep` checkpoints (0: room for at least one)."""
    weights, state = checkpoint_bytes(trained, averages)
    # `keep` checkpoints, the best one, and a new one that is written before the oldest is deleted; the state and the
    # average likewise.
    needed = (max(keep, 1) + 2 + 2 * averages) * weights + 2 * state + MARGIN
    if (free := free_bytes(folder)) < needed:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB free, and this run writes up to {needed / 1e9:.2f} GB of checkpoints; free "
            "some space, keep fewer with --keep_checkpoints 1, or choose another --output-path"
        )


def has_room(accelerator, folder: Path, trained: list[Trained], averages: bool = False) -> bool:
    """Whether the disk has room for one more checkpoint; the main process answers for all, so that they act alike."""
    weights, state = checkpoint_bytes(trained, averages)
    needed = weights * (1 + averages) + state + MARGIN
    answer = [accelerator.is_main_process and free_bytes(folder) >= needed]
    return broadcast_object_list(answer)[0]


def save_weights(accelerator, trained: list[Trained], folder: Path, suffix: str) -> None:
    """Write <name><suffix>.safetensors for every trained network. All processes must call this."""
    for part in trained:
        path = Path(folder) / f"{part.name}{suffix}.safetensors"
        if not part.lora:
            state = accelerator.get_state_dict(part.network)
            if accelerator.is_main_process:
                SAVE[part.part](state, path, record(part.settings))
        elif accelerator.is_main_process:
            save_lora(accelerator.unwrap_model(part.network), part.part, path, record(part.settings))


def save_run(run, step, needed=True):
    """Write a checkpoint after `step`: the weights, their moving average if any, and the state needed to resume.

    run: the training script's Run; needed: whether a full disk is a UserError; otherwise the run says so and goes on.
    """
    if not has_room(run.accelerator, run.output, run.trained, bool(run.average)):
        problem = f"step {step}: NOT SAVED: the disk of {run.output} is full; free some space"
        if needed:
            raise UserError(f"{problem}, and --resume goes on from the newest checkpoint")
        return run.say(problem)
    epoch = max(0, samples_shown(step, run.global_batch, run.args.reuse) - 1) // len(run.data.prompts)
    save_checkpoint(run.accelerator, run.trained, run.output, step, epoch, run.args.keep_checkpoints)
    if run.average:
        with run.averaged():
            save_weights(run.accelerator, run.trained, run.output, "_ema")


def save_checkpoint(accelerator, trained: list[Trained], folder: Path, step: int, epoch: int, keep: int) -> None:
    """Write the weights and the state after `step`; then link the newest weights, and keep only `keep`."""
    folder, states, suffix = Path(folder), Path(folder) / "resume", f"_e_{epoch}_iter_{step}"
    unfinished = states / "unfinished"
    save_weights(accelerator, trained, folder, suffix)
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = [state for state in states.glob("step_*") if _step(state) != step]
        shutil.rmtree(states / f"step_{step:06d}", ignore_errors=True)
        unfinished.rename(states / f"step_{step:06d}")
        for state in older:
            shutil.rmtree(state)
        for part in trained:
            link(folder / f"{part.name}{suffix}.safetensors", folder / f"{part.name}.safetensors")
            if part.lora:
                path = folder / f"{part.name}_diffusers.safetensors"
                save_diffusers_lora(accelerator.unwrap_model(part.network), part.part, path, record(part.settings))
            weights = sorted(folder.glob(f"{part.name}_e_*_iter_*.safetensors"), key=_step)
            weights = [path for path in weights if _step(path) <= step]  # a killed run may have left later ones
            for path in weights[:-keep] if keep else []:
                path.unlink()
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator, trained: list[Trained], folder: Path) -> int:
    """Restore weights and state of the newest checkpoint in place -> its step, or 0 if there is none.

    Raises UserError if files of it are missing or damaged.
    """
    folder = Path(folder)
    states = sorted((folder / "resume").glob("step_*"), key=_step)
    if not states:
        return 0
    step = _step(states[-1])
    if not accelerator.is_fsdp2:  # FSDP keeps its sharded weights in the state
        for part in trained:
            found = list(folder.glob(f"{part.name}_e_*_iter_{step}.safetensors"))
            if not found:
                raise UserError(
                    f"--resume: {states[-1]} belongs to {part.name}_e_…_iter_{step}.safetensors, which is not in "
                    f"{folder}; put it back, or start another run elsewhere (--output-path)"
                )
            network = accelerator.unwrap_model(part.network)
            if part.lora:
                load_lora(network, part.part, found[0])
            else:
                LOAD[part.part](network, found[0])
    try:
        accelerator.load_state(str(states[-1]))
    except Exception as problem:  # pickle, zip and accelerate each raise their own kinds for a damaged file
        raise UserError(
            f"--resume: {states[-1]} is damaged or incomplete ({type(problem).__name__}: {first_line(problem)}); "
            f"{RESTART.format(folder=folder)}"
        ) from problem
    return step


def keep_weights_out_of_state(accelerator) -> None:
    """Keep weights out of accelerate's state: the checkpoint already has them, in a format that all tools read.

    Under FSDP, accelerate writes sharded weights in any case, and they stay.
    """
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def link(target: Path, path: Path) -> None:
    """Make `path` a relative link to `target`, in the same folder; a copy on file systems without links."""
    with write_whole(path) as unfinished:
        try:
            os.symlink(target.name, unfinished)
        except OSError:
            shutil.copyfile(target, unfinished)


def _step(path):
    return int(re.search(r"(\d+)(?:\.safetensors)?$", path.name)[1])
