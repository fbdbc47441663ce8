"""The pictures of direct fine-tuning: captions and latents that a node's processes share, and each step's samples."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from textcraftor.errors import UserError
from textcraftor.files import write_whole
from textcraftor.image_formats import describe_skipped, nothing_usable, read_pairs
from textcraftor.latent_cache import Latents, encode_pictures
from textcraftor.prompts import PromptFile, read_prompts
from textcraftor.sampling import prompt_noise
from textcraftor.stream import shuffled


class Pictures(NamedTuple):
    """The pairs to train on: caption i belongs to latents i."""

    captions: Sequence[str]
    latents: Latents
    content: str  # sha256 of all pictures and captions in their order


def share_pictures(
    accelerator: Accelerator, path: Path | str, val_path: Path | str | None, val_count: int, vae, size: tuple[int, int]
) -> tuple[Pictures, list[str], list[str], list[tuple[str, str]]]:
    """Read pictures with captions and encode them, in one process per node; the others map the files it writes.

    path: see image_formats.read_pairs. vae: an AutoencoderKL on this process's device, in fp32; size: (height, width)
    of the pictures, in pixels. Held out are the first `val_count` prompts of `val_path`, or else distinct captions of
    the first pictures, at most half of them; no picture with such a caption is trained on.

    Returns (pictures, held-out prompts, lines for the user, what is left out as (name, reason)). Every process must
    call this. The others wait for as long as encoding takes, however long, without a collective operation, since these
    time out after minutes; nodes still wait for each other at the end. Raises the same UserError in every process if
    something cannot be used on one node, or if two nodes have different pictures.
    """
    reads = accelerator.is_local_main_process
    with TemporaryDirectory(prefix="textcraftor-", ignore_cleanup_errors=True) if reads else nullcontext() as mine:
        folders = gather_object([mine])
        folder = Path(folders[accelerator.process_index - accelerator.local_process_index])
        if reads:
            answer = _prepare(path, val_path, val_count, vae, size, folder)
            with write_whole(folder / "answer.json") as unfinished:
                unfinished.write_text(json.dumps(answer))
        while not (folder / "answer.json").is_file():
            if not folder.is_dir():
                raise UserError(f"{path}: the process that encodes the pictures has ended")
            time.sleep(0.2)
        answer = json.loads((folder / "answer.json").read_text())
        if "content" in answer:
            latents = Latents(answer["files"], np.load(folder / "places.npy", mmap_mode="r"))
            pictures = Pictures(PromptFile(folder / "captions"), latents, answer["content"])
        # Also waits until all have mapped the files.
        outcomes = gather_object([(answer.get("problem"), answer.get("content"))])
    if problem := next((problem for problem, _ in outcomes if problem), None):
        raise UserError(problem)
    if len({content for _, content in outcomes}) > 1:
        raise UserError(f"{path}: the nodes read different pictures from it; give every node the same files")
    return pictures, answer["held out"], answer["lines"], [tuple(pair) for pair in answer["skipped"]]


def _prepare(path, val_path, val_count, vae, size, folder):
    """Do the work of share_pictures -> what to tell the other processes: a dict, with "problem" if there is one."""
    try:
        pairs, skipped = read_pairs(path)
        held_out = read_prompts(val_path)[0][:val_count] if val_path else None
        encoded = encode_pictures(vae, pairs, *size)
        skipped += encoded.skipped
        captions = [pairs[number].caption for number in encoded.kept]
        if not captions:
            raise UserError(nothing_usable(path, skipped))
        if held_out is None:
            first = list(dict.fromkeys(captions))[: 2 * val_count]
            held_out = first[: len(first) // 2]
        apart = set(held_out)
        training = [number for number, caption in enumerate(captions) if caption not in apart]
        if not training or not held_out:
            raise UserError(
                f"{path}: {len(training)} pictures to train on and {len(held_out)} captions held out; both need at "
                "least one: use more pictures with other captions, or hold out others with --val_prompts"
            )
        content = hashlib.sha256()
        for number in training:
            content.update(encoded.digests[number] + captions[number].encode() + b"\0")
        PromptFile.write(folder / "captions", (captions[number] for number in training))
        np.save(folder / "places.npy", encoded.places[training])
    except UserError as problem:
        return {"problem": str(problem)}
    except OSError as problem:
        place = problem.filename or folder  # np.save and memory maps do not always name the file
        return {"problem": f"{place}: {problem.strerror or problem}; if its disk is full, set TMPDIR to another folder"}
    lines = [describe_skipped(path, skipped)] if skipped else []
    lines += [
        f"{path}: {len(training)} pictures with captions to train on, {len(held_out)} prompts held out.",
        f"latents in {encoded.folder} ({encoded.bytes / 1e6:.1f} MB): {encoded.new} pictures encoded now, the rest "
        "reused.",
    ]
    answer = {"files": encoded.files, "content": content.hexdigest(), "held out": held_out}
    return answer | {"lines": lines, "skipped": skipped}


def direct_batch(
    pictures: Pictures, seed: int, t_range: tuple[int, int], numbers: Sequence[int]
) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training samples by their numbers (any n >= 0), on the CPU: what one step of direct fine-tuning needs.

    Returns (B captions, latents (B, C, h, w), noise (B, C, h, w), time steps (B,)). Latents are drawn from the VAE's
    posterior and not yet multiplied by its scaling factor; t is uniform in t_range, both ends included. Every epoch
    shows each picture once, in a new random order. Sample n depends on (pictures, seed, n) alone, so batch size, number
    of processes and resuming never change it.
    """
    captions, latents, times = [], [], []
    for n, index in zip(numbers, shuffled(len(pictures.captions), seed, numbers), strict=True):
        generator = np.random.default_rng([seed, int(n), 1])  # not the one of the noise, [seed, n]
        mean, std = pictures.latents[index]
        times.append(generator.integers(t_range[0], t_range[1], endpoint=True))
        latents.append(mean + std * torch.from_numpy(generator.standard_normal(mean.shape, dtype=np.float32)))
        captions.append(pictures.captions[index])
    noise = prompt_noise(seed, numbers, tuple(latents[0].shape))
    return captions, torch.stack(latents), noise, torch.tensor(np.array(times))
