"""The prompts and noise of every training step: an endless stream of samples, fixed by the seed alone."""

import functools
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from textcraftor.errors import UserError
from textcraftor.prompts import PromptFile, checksum, read_training_prompts
from textcraftor.sampling import prompt_noise

POOL = 4  # --reuse shows the samples of so many updates again and again before new ones take their place


def share_prompts(
    accelerator: Accelerator, path: Path | str, val_path: Path | str | None, val_count: int
) -> tuple[PromptFile, list[str], dict[str, dict]]:
    """Read the prompts as read_training_prompts does, in one process per node; the others map the file it writes.

    The file is in the node's temporary folder (TMPDIR) and is deleted once all processes have mapped it. All processes
    must call this together. Raises the same UserError in every process if the prompts cannot be read on one node, or if
    two nodes read different prompts.
    """
    reads = accelerator.is_local_main_process
    with TemporaryDirectory(prefix="textcraftor-", ignore_cleanup_errors=True) if reads else nullcontext() as folder:
        mine = None
        if reads:
            file = os.path.join(folder, "prompts")
            try:
                prompts, held_out, reports = read_training_prompts(path, val_path, val_count, file)
                mine = file, checksum(prompts), held_out, reports
            except UserError as problem:
                mine = problem
            except OSError as problem:
                mine = UserError(
                    f"{folder}: no room for the prompts ({problem.strerror}); set TMPDIR to another folder"
                )
        answers = gather_object([mine])
        if problem := next((answer for answer in answers if isinstance(answer, UserError)), None):
            raise problem
        if len({answer[1] for answer in answers if answer}) > 1:
            raise UserError(f"{path}: the nodes read different prompts from it; give every node the same file")
        file, _, held_out, reports = answers[accelerator.process_index - accelerator.local_process_index]
        prompts = PromptFile(file)
        accelerator.wait_for_everyone()
    return prompts, held_out, reports


def training_batch(
    prompts: Sequence[str], seed: int, shape: tuple[int, ...], numbers: Sequence[int]
) -> tuple[list[str], torch.Tensor]:
    """Training samples by number (any n >= 0) -> B prompts and their noise (B, *shape), fp32, on the CPU.

    Every epoch visits each prompt once, in a new random order. Sample n depends only on (prompts, seed, n), not on
    batch size, number of processes or resuming.
    """
    return [prompts[index] for index in shuffled(len(prompts), seed, numbers)], prompt_noise(seed, numbers, shape)


def shuffled(count: int, seed: int, numbers: Sequence[int]) -> list[int]:
    """Which of `count` items the training samples with these numbers show: all of them once an epoch, shuffled."""
    places = [divmod(n, count) for n in numbers]
    return [int(_order(count, seed, epoch)[position]) for epoch, position in places]


def batch_numbers(micro_batch: int, batch_size: int, process: int, processes: int) -> range:
    """Numbers of the samples that `process` takes in a micro-batch; micro-batches count from 0 over the whole run.

    With gradient accumulation over A micro-batches, step s (counted from 1) has the micro-batches (s - 1) * A + 0 ...
    A - 1. Together the processes take the samples that one process would take with batch_size * processes.
    """
    start = (micro_batch * processes + process) * batch_size
    return range(start, start + batch_size)


def reused(numbers: Sequence[int], images: int, reuse: int, seed: int) -> list[int]:
    """Which samples the training samples with these numbers show if each is shown `reuse` times.

    images: per update. The samples of POOL updates are shown `reuse` times before new ones take their place: first in
    order, then shuffled anew each time. With reuse = 1 the numbers themselves.
    """
    shown, pool = [], POOL * images
    for n in numbers:
        number, place = divmod(n, pool * reuse)
        time, place = divmod(place, pool)
        if time:
            place = int(np.random.default_rng([seed, number, time, 3]).permutation(pool)[place])
        shown.append(number * pool + place)
    return shown


def samples_shown(updates: int, images: int, reuse: int) -> int:
    """How many different samples `reused` shows in the first `updates` of a run with `images` each."""
    pool = POOL * images
    pools, rest = divmod(updates * images, pool * reuse)
    return pools * pool + min(rest, pool)


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _order(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)
