"""Scores and pictures of held-out prompts from fixed noise, made as at test time."""

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from textcraftor.files import write_whole
from textcraftor.options import TEST_SEED
from textcraftor.sampling import prompt_noise


@torch.no_grad()
def validate(accelerator, make, rewards, monitors, prompts, batch_size, keep, between=lambda: None):
    """Score the images of held-out prompts, each from its own fixed noise.

    make: (prompts, indices) -> images (B, 3, H, W) in [0, 1]; rewards: a RewardSum; monitors: rewards to score only.
    The processes share the batches, and each makes equally many, for networks that are split among processes.
    between() is called before each batch and may raise. Returns ({name: (N,) float64 scores, unscaled; "total": their
    weighted sum}, the first `keep` images, uint8 on the CPU).
    """
    starts = list(range(0, len(prompts), batch_size))
    starts += starts[-1:] * (-len(starts) % accelerator.num_processes)
    parts = []
    for start in starts[accelerator.process_index :: accelerator.num_processes]:
        between()
        batch = prompts[start : start + batch_size]
        images = make(batch, range(start, start + len(batch)))
        total, scores = rewards(images, batch)
        scores = {"total": total, **scores, **{monitor.name: monitor(images, batch) for monitor in monitors}}
        pixels = (images[: max(0, keep - start)] * 255).round().to(torch.uint8).cpu()
        # To the CPU first: Apple's GPUs have no float64.
        parts.append((start, {name: score.cpu().double() for name, score in scores.items()}, pixels))
    by_start = {start: (scores, pixels) for start, scores, pixels in gather_object(parts)}
    parts = [by_start[start] for start in sorted(by_start)]
    scores = {name: torch.cat([scores[name] for scores, _ in parts]) for name in parts[0][0]}
    return scores, torch.cat([pixels for _, pixels in parts])


def validation_noise(indices, shape):
    """The fixed noise of held-out prompts (B, *shape): the same for every --seed, so runs compare."""
    return prompt_noise(TEST_SEED, indices, shape)


def save_look(scores, images, path):
    """Keep what validate returned."""
    with write_whole(path) as unfinished:
        tensors = {"images": images.contiguous(), **{f"score {name}": score for name, score in scores.items()}}
        save_file(tensors, unfinished)


def load_look(path):
    """What save_look kept: (scores, images)."""
    tensors = load_file(path)
    images = tensors.pop("images")
    return {name.removeprefix("score "): score for name, score in tensors.items()}, images
