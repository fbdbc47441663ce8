"""A trajectory bank: the first sampling steps of a prompt and its noise, computed once.

While only the text encoder trains, these steps depend on frozen networks alone. A bank keeps the latents after them, in
a folder that runs with the same model and sampling settings share, or in memory. It is a wrapper around a sampler (see
sampling.py), so whatever samples can use one.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import find_executable_batch_size
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from textcraftor.embeddings import embed_prompts
from textcraftor.errors import UserError
from textcraftor.files import free_bytes
from textcraftor.hashes import weights_hash
from textcraftor.models import latent_shape, make_networks
from textcraftor.sampling import predict_noise, sample_prefix
from textcraftor.stream import samples_shown
from textcraftor.weights import save_tensors

FILL_BATCH = 64  # images at once when a bank is filled beforehand; fewer if they do not fit


class Bank(NamedTuple):
    """Latents by prompt and noise: (S, C, h, w) each, S = len(stops)."""

    stops: tuple[int, ...]  # indices of the sampling steps before which latents are kept
    dtype: torch.dtype  # in which they are kept
    folder: Path | None  # None: in memory
    memory: dict[str, torch.Tensor]
    say: Callable[[str], None]  # tells the user what could not be kept
    problems: list[str]  # why nothing can be kept any more, if so


def bank_stops(gradient: str, steps: int, most_graded: int, driven: int) -> tuple[int, ...]:
    """Before which of `steps` steps a training run needs latents: before the first one that can have gradient.

    gradient: as --gradient names it; most_graded: the largest K; driven: --driven. refl starts at any driven step.
    """
    if gradient == "last_k":
        return (steps - most_graded,)
    return tuple(range(steps - driven, steps)) if gradient == "refl" else (steps - driven,)


def memory_bank(stops: tuple[int, ...]) -> Bank:
    """An empty bank in memory, fp32."""
    return Bank(stops, torch.float32, None, {}, print, [])


def open_bank(folder, model, scheduler, guidance: float, stops: tuple[int, ...], dtype: torch.dtype, say=print) -> Bank:
    """The bank in `folder` for these settings; each combination of them has a folder of its own inside.

    model: a models.Model as it is used; dtype: of the entries. In fp16 one takes 32 kB for 512 x 512 pixels; in fp32
    twice as much, and no bit of the results changes as long as entries are computed in a run's own batches: in others,
    such as those of --fill, a matrix product may round otherwise.
    """
    settings = {
        "original text encoder": weights_hash(model.text_encoder),
        "unet": weights_hash(model.unet),
        "unet type": str(model.unet.dtype),
        "entries": str(dtype),
        "guidance": guidance,
        "stops": stops,
        "time steps": scheduler.timesteps.tolist(),
        "noise schedule": hashlib.sha256(scheduler.alphas_cumprod.numpy().tobytes()).hexdigest(),
        "prediction type": scheduler.config.prediction_type,
    }
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return Bank(stops, dtype, Path(folder) / name, {}, say, [])


def with_bank(bank: Bank, sampler, prompts: Sequence[str], noise: torch.Tensor):
    """`sampler` (sampling.py), with the first steps of these prompts and their noise (B, C, h, w) from the bank.

    What is missing is computed, all of it as one batch, and kept.
    """

    def sample(predict, scheduler, z, original, tuned, tuned_steps, checkpoint=False, generators=None):
        latents = banked_latents(bank, predict, scheduler, z, original, prompts, noise)
        place = getattr(sampler, "keywords", {}).get("index", 0)  # of the step where refl predicts
        start = latents[:, place].to(z.device)
        return sampler(
            predict, scheduler, start, original, tuned, tuned_steps, checkpoint, generators, start=bank.stops[place]
        )

    return sample


def banked_latents(bank, predict, scheduler, z, original, prompts, noise) -> torch.Tensor:
    """Latents (B, S, C, h, w), fp32, of the first steps, from the bank or computed now and kept there.

    z: noise as the scheduler starts from it, on the device; original: Conditions of 2B rows; noise: on the CPU.
    """
    keys = [entry_key(prompt, row) for prompt, row in zip(prompts, noise, strict=True)]
    shape = (len(bank.stops), *noise.shape[1:])
    found = [read_entry(bank, key, shape) for key in keys]
    missing = [i for i, entry in enumerate(found) if entry is None]
    if missing:
        rows = torch.tensor([*missing, *(len(keys) + i for i in missing)], device=z.device)
        conditions = {name: value[rows] for name, value in original.items()}
        with torch.inference_mode():
            made = sample_prefix(predict, scheduler, z[rows[: len(missing)]], conditions, bank.stops)
            made = made.to("cpu", bank.dtype)
        for i, entry in zip(missing, made.clone(), strict=True):
            write_entry(bank, keys[i], entry)
            found[i] = entry
    return torch.stack(found).float()


def entry_key(prompt: str, noise: torch.Tensor) -> str:
    """The content address of a prompt and its noise."""
    return hashlib.sha256(prompt.encode() + b"\0" + noise.numpy().tobytes()).hexdigest()[:32]


def read_entry(bank: Bank, key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The latents, or None if the bank has none or they are damaged."""
    if bank.folder is None:
        return bank.memory.get(key)
    try:
        tensors = load_file(_path(bank, key))
    except (OSError, SafetensorError):
        return None
    latents = tensors.get("latents")
    whole = latents is not None and latents.shape == shape and latents.dtype == bank.dtype
    return latents if whole and _digest(latents) == bytes(tensors.get("sha256", torch.empty(0)).tolist()) else None


def write_entry(bank: Bank, key: str, latents: torch.Tensor) -> None:
    """Keep latents (S, C, h, w). On a full disk the run says so once, and goes on without keeping any more."""
    if bank.folder is None:
        bank.memory[key] = latents
    if bank.folder is None or bank.problems:
        return
    path = _path(bank, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({"latents": latents, "sha256": torch.tensor([*_digest(latents)], dtype=torch.uint8)}, path)
    except (UserError, OSError) as problem:
        bank.problems.append(str(problem))
        bank.say(f"the bank is NOT KEPT from here on: {problem}")


def _digest(latents):
    return hashlib.sha256(latents.numpy().tobytes()).digest()


def _path(bank, key):
    return bank.folder / key[:2] / f"{key}.safetensors"


def check_room(bank: Bank, entries: int, shape: tuple[int, ...]) -> str:
    """A line for the user about a bank for `entries` entries of latents of `shape`, some of which it may have.

    Raises UserError if its disk has no room for the others, as many as its files are fewer.
    """
    each = torch.Size((len(bank.stops), *shape)).numel() * bank.dtype.itemsize + 4096
    kept = sum(1 for _ in bank.folder.glob("*/*.safetensors"))
    new = max(0, entries - kept)
    if free_bytes(bank.folder) < new * each:
        raise UserError(
            f"--bank {bank.folder.parent}: {free_bytes(bank.folder) / 1e9:.2f} GB free, and this run adds up to "
            f"{new * each / 1e9:.2f} GB; free some space or choose another folder"
        )
    return f"bank {bank.folder}: {kept} entries, {entries} for this run, {each / 1e3:.0f} kB each"


def start_bank(args, accelerator, model, scheduler, data, updates: int, images: int, say) -> Bank:
    """The bank of a training run with the options `args`, of so many updates with so many images; --fill fills it now.

    data: a data.Data. Every process must call this. Raises UserError if the disk has no room.
    """
    stops, shape = bank_stops(args.gradient, args.step, args.grad_range[1], args.driven), latent_shape(model)
    samples = samples_shown(updates, images, args.reuse)
    dtype = torch.float32 if model.unet.dtype == torch.float32 else torch.float16
    bank = open_bank(args.bank, model, scheduler, args.guidance, stops, dtype, say)
    say(check_room(bank, samples, shape))
    accelerator.wait_for_everyone()  # before any of them fills the disk
    if args.fill:
        fill_bank(bank, accelerator, make_networks(model), scheduler, args.guidance, data.batch, samples, shape)
    return bank


def fill_bank(bank, accelerator, networks, scheduler, guidance, batch, entries: int, shape) -> None:
    """Compute all entries from 0 to entries - 1 that the bank lacks, shared among the processes.

    networks: a models.Networks; batch: (shape, numbers) -> (prompts, noise), see stream.training_batch. Raises
    UserError when the disk is full.
    """
    mine = range(accelerator.process_index, entries, accelerator.num_processes)
    bar = tqdm(total=len(mine), desc="bank", disable=not accelerator.is_main_process, dynamic_ncols=True)
    done = 0

    @find_executable_batch_size(starting_batch_size=FILL_BATCH)
    def fill(size):
        nonlocal done
        while done < len(mine):
            numbers = mine[done : done + size]
            prompts, noise = batch(shape, numbers)
            original, _ = embed_prompts(networks, prompts)
            z = noise.to(networks.device) * scheduler.init_noise_sigma

            predict = partial(predict_noise, networks.unet, guidance)
            banked_latents(bank, predict, scheduler, z, original, prompts, noise)
            if bank.problems:
                raise UserError(f"--fill: {bank.problems[0]}; free some space and repeat the command to continue")
            done += len(numbers)
            bar.update(len(numbers))

    with bar:
        try:
            fill()
        except KeyboardInterrupt:
            raise UserError("--fill: stopped; finished entries are kept; repeat the command to continue") from None
