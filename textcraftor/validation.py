"""Scores and pictures on fixed held-out prompts and noise, made as at test time."""

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file

from textcraftor.sampling import prompt_noise
from textcraftor.weight_files import save_tensors

TEST_GRAD_STEPS = 15  # at test time the tuned encoder drives this many last steps (of 25)
NOISE_SEED = 2023  # fixed, so that runs with different --seed are compared on the same noise


@torch.no_grad()
def validate(accelerator, generate, rewards, monitors, prompts, batch_size, keep):
    """Score the images of held-out prompts, each from its own fixed noise.

    generate: (prompts, indices) -> images (B, 3, H, W) in [0, 1]; rewards: a RewardSum; monitors: rewards that are
    scored only. The batches are shared among the processes, and each makes as many, for those that share a network.
    Returns ({name: (N,) float64 scores, unscaled; "total": their weighted sum}, first `keep` images, uint8 on the CPU).
    """
    starts = list(range(0, len(prompts), batch_size))
    starts += starts[-1:] * (-len(starts) % accelerator.num_processes)
    parts = []
    for start in starts[accelerator.process_index :: accelerator.num_processes]:
        batch = prompts[start : start + batch_size]
        images = generate(batch, range(start, start + len(batch)))
        total, scores = rewards(images, batch)
        scores = {"total": total, **scores, **{monitor.name: monitor(images, batch) for monitor in monitors}}
        pixels = (images[: max(0, keep - start)] * 255).round().to(torch.uint8).cpu()
        parts.append((start, {name: score.double().cpu() for name, score in scores.items()}, pixels))
    by_start = {start: (scores, pixels) for start, scores, pixels in gather_object(parts)}
    parts = [by_start[start] for start in sorted(by_start)]
    scores = {name: torch.cat([scores[name] for scores, _ in parts]) for name in parts[0][0]}
    return scores, torch.cat([pixels for _, pixels in parts])


def validation_noise(indices, shape):
    """The fixed noise of held-out prompts (B, *shape)."""
    return prompt_noise(NOISE_SEED, indices, shape)


def save_look(scores, images, path):
    """Keep what validate returned."""
    save_tensors({"images": images, **{f"score {name}": score for name, score in scores.items()}}, path)


def load_look(path):
    """What save_look kept, (scores, images)."""
    tensors = load_file(path)
    images = tensors.pop("images")
    return {name.removeprefix("score "): score for name, score in tensors.items()}, images


def comparison(before, after):
    """A table of mean scores before and after, both {name: (N,)} of the same prompts and noise, and of the mean change
    with its 95 % interval (of paired differences, by the normal approximation: 1.96 standard errors)."""
    lines = [f"{'held out':<16}{'before':>10}{'after':>10}{'change':>10}   95 % interval"]
    for name in after:
        change = after[name] - before[name]
        error = 1.96 * change.std().item() / len(change) ** 0.5
        first, second, mean = (scores.mean().item() for scores in (before[name], after[name], change))
        interval = f"[{mean - error:+.4f}, {mean + error:+.4f}]"
        lines.append(f"{name:<16}{first:>10.4f}{second:>10.4f}{mean:>+10.4f}   {interval}")
    return "\n".join(lines)
