"""One resumable training loop for every model of the miniature, and one resumable way to make a large array.

All in fp32, which every processor computes fast: networks of this size gain nothing from bf16 instructions, and a build
that is begun on a machine with them can be finished on one without.
"""

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

SAVE_EVERY = 120  # seconds


def core_seconds() -> float:
    """Processor seconds that this process and its finished children have used: pauses and other programs on the same
    cores do not count, and n busy threads count n times."""
    return sum(os.times()[:4])


def fit(
    name: str,
    model: torch.nn.Module,
    loss_of_step: Callable[[int], torch.Tensor],
    steps: int,
    lr: float,
    work: Path,
    ema: float = 0.0,
    weight_decay: float = 0.01,
) -> torch.nn.Module:
    """Train `model` by AdamW (5 % warm-up, cosine to zero), stopping and starting at will; return it in eval mode.

    loss_of_step(step) -> scalar loss; its data and noise must depend on `step` alone, so that a resumed run is the
    run that never stopped. Only parameters with requires_grad are trained. With ema > 0 the returned weights are their
    exponential moving average. Progress lies in `work/<name>.pt`, with the processor seconds spent; a finished stage
    leaves `work/<name>.safetensors` and is not trained again.
    """
    file, done = work / f"{name}.pt", work / f"{name}.safetensors"
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * min(s / steps, 1)))
    )
    average = [p.detach().clone() for p in parameters] if ema else []
    start, seconds = 0, 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average, start, seconds = state["average"], state["step"], state["seconds"]
    begun = core_seconds()

    def save(step):
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "schedule": schedule.state_dict(),
                "step": step,
                "seconds": seconds + core_seconds() - begun,
            },
            file.with_suffix(".tmp"),
        )
        os.replace(file.with_suffix(".tmp"), file)

    model.train()
    saved, window = time.time(), []
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=10, dynamic_ncols=True)
    for step in bar:
        loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if ema:
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(ema, (step + 1) / (step + 10)))
        window = [*window[-99:], loss.item()]
        bar.set_postfix(loss=f"{sum(window) / len(window):.4f}", refresh=False)
        if time.time() - saved > SAVE_EVERY:
            save(step + 1)
            saved = time.time()
    if start < steps:
        save(steps)
    if ema:
        for p, a in zip(parameters, average, strict=True):
            p.data.copy_(a)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, done)
    return model.eval().requires_grad_(False)


def in_parts(file: Path, count: int, size: int, make: Callable[[range], np.ndarray]) -> np.ndarray:
    """The array of `count` rows in `file` (.npy), memory-mapped; first made, if it is not there, `size` rows at a time.

    make(range of rows) -> those rows, which must depend on their numbers alone. Parts that are made lie in a folder
    beside the file until all are there, so that stopping loses one part at most.
    """
    if not file.exists():
        folder = file.with_suffix(".parts")
        folder.mkdir(exist_ok=True)
        parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
        for rows in tqdm(parts, desc=file.stem, mininterval=10):
            part = folder / f"{rows.start}.npy"
            if not part.exists():
                with open(part.with_suffix(".tmp"), "wb") as to:
                    np.save(to, make(rows))
                os.replace(part.with_suffix(".tmp"), part)
        first = np.load(folder / "0.npy", mmap_mode="r")
        whole = np.lib.format.open_memmap(file.with_suffix(".tmp"), "w+", first.dtype, (count, *first.shape[1:]))
        for rows in parts:
            whole[rows.start : rows.stop] = np.load(folder / f"{rows.start}.npy")
        whole.flush()
        os.replace(file.with_suffix(".tmp"), file)
        shutil.rmtree(folder)
    return np.load(file, mmap_mode="r")
