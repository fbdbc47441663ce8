"""Scores and pictures of held-out prompts from fixed noise, made as at test time."""

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from textcraftor.bank import memory_bank, with_bank
from textcraftor.checkpoints import has_room, save_weights
from textcraftor.errors import UserError
from textcraftor.files import write_whole
from textcraftor.options import TEST_SEED
from textcraftor.pictures import before_after_grid, reward_curves, sample_grid
from textcraftor.pictures import save as save_picture
from textcraftor.sampling import prompt_noise, sample_last_k, to_uint8
from textcraftor.statistics import paired_table
from textcraftor.trackers import log_picture
from textcraftor.training_options import tested_steps

PICTURES = 8  # held-out prompts in a grid of samples
PAIRS, KEPT = 16, 64  # pairs in before_after.png, and the images that they are chosen from: 50 MB at 512 × 512


def look(run, step, count, check_stop):
    """Sample the first `count` held-out prompts as at test time, draw the first few -> (scores, images), see validate.

    run: the training script's Run. With all held-out prompts this is a validation: the scores join the last row of
    metrics.csv, and the best weights are kept.
    """

    def sample(prompts, indices):
        noise = validation_noise(indices, run.shape)
        sampler = with_bank(run.held_out_bank, sample_last_k, prompts, noise) if run.held_out_bank else sample_last_k
        return run.sample(prompts, noise, tuned_steps=tested_steps(run.args), sampler=sampler)

    held_out, is_main = run.data.held_out[:count], run.accelerator.is_main_process
    if step == 0:
        run.say(f"first, {count} held-out prompts as they are before training")
    with run.averaged():
        scores, images = validate(
            run.accelerator, sample, run.rewards, run.monitors, held_out, run.args.batch_size, KEPT, check_stop
        )
    if count == len(run.data.held_out) and "val_total" not in run.record.rows[-1]:
        means = {f"val_{name}": score.mean().item() for name, score in scores.items()}
        if means["val_total"] > run.record.best("val_total"):
            if has_room(run.accelerator, run.output, run.trained):
                with run.averaged():
                    save_weights(run.accelerator, run.trained, run.output, "_best")
            else:
                run.say(f"step {step}: the best weights so far, NOT SAVED: the disk of {run.output} is full")
        if is_main and step == 0:
            save_look(scores, images, step, run.output / "resume" / "before.safetensors")
        run.record.amend(means)
        run.say(f"step {step}, held out: " + ", ".join(f"{name} {s.mean():.4g}" for name, s in scores.items()))
    if is_main and run.args.sample_every:
        picture = sample_grid(images[:PICTURES], held_out, scores, step)
        try:
            save_picture(picture, run.output / "samples" / f"step_{step:06d}.png")
        except UserError as problem:  # a full disk, say: training goes on
            run.say(f"step {step}: sample pictures NOT SAVED: {problem}")
        log_picture(run.accelerator, "held-out prompts", picture, step)
    return scores, images


def held_out_bank(args):
    """A bank for the first steps of held-out prompts, which are the same in every validation unless the UNet trains."""
    stop = args.step - tested_steps(args)
    return memory_bank((stop,)) if stop and not args.lr_unet else None


@torch.no_grad()
def validate(accelerator, make, rewards, monitors, prompts, batch_size, keep, between=lambda: None):
    """Score the images of held-out prompts, each from its own fixed noise.

    make: (prompts, indices) -> images (B, 3, H, W) in [0, 1]; rewards: a RewardSum; monitors: rewards to score only.
    The processes share the batches and each runs the same number of them, as networks split among processes require.
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
        pixels = to_uint8(images[: max(0, keep - start)]).cpu()
        # To the CPU first: Apple's GPUs have no float64.
        parts.append((start, {name: score.cpu().double() for name, score in scores.items()}, pixels))
    by_start = {start: (scores, pixels) for start, scores, pixels in gather_object(parts)}
    parts = [by_start[start] for start in sorted(by_start)]
    scores = {name: torch.cat([scores[name] for scores, _ in parts]) for name in parts[0][0]}
    return scores, torch.cat([pixels for _, pixels in parts])


def validation_noise(indices, shape):
    """The fixed noise of held-out prompts (B, *shape): the same for every --seed, so runs compare."""
    return prompt_noise(TEST_SEED, indices, shape)


def save_look(scores, images, step, path):
    """Save the result of validate after `step`."""
    with write_whole(path) as unfinished:
        tensors = {"images": images.contiguous(), **{f"score {name}": score for name, score in scores.items()}}
        save_file(tensors, unfinished, {"step": str(step)})


def load_look(path):
    """Load what save_look saved -> (scores, images)."""
    tensors = load_file(path)
    images = tensors.pop("images")
    return {name.removeprefix("score "): score for name, score in tensors.items()}, images


def show_results(run, last_step, after):
    """Draw before and after and the curves, and print what the run changed and where its files are."""
    before = load_look(run.output / "resume" / "before.safetensors")
    save_look(*after, last_step, run.output / "resume" / "after.safetensors")  # a model card gives intervals
    picture = run.output / "before_after.png"
    before_after_grid(before, after, run.data.held_out, f"{last_step} steps", picture, ranked=PAIRS)
    monitor_names = [monitor.name for monitor in run.monitors]
    reward_curves(run.record.rows, run.names, monitor_names, run.output / "curves.png")
    print(paired_table(before[0], after[0]))
    skipped, cut = (sum(row.get(name, 0) for row in run.record.rows) for name in ("skipped", "cut"))
    print(f"{skipped:.0f} updates skipped; {cut:.0f} prompts cut to the length that the text encoder reads")
    weights = [f"{part.name}.safetensors" for part in run.trained]
    weights += [f"{part.name}_ema.safetensors" for part in run.trained if run.average]
    for name in (*weights, "before_after.png", "curves.png", "metrics.csv"):
        print(run.output / name)
