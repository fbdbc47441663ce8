"""What a run trains on: prompts (--method prompts), or pictures with captions (--method direct)."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from textcraftor.image_data import direct_batch, share_pictures
from textcraftor.image_formats import check_images, write_skipped
from textcraftor.latent_cache import picture_size
from textcraftor.models import latent_shape
from textcraftor.prompts import check_prompts, checksum, describe, write_bad_rows
from textcraftor.stream import share_prompts, training_batch


class Data(NamedTuple):
    """The samples of a run and its held-out prompts."""

    prompts: Sequence[str]  # or captions: one for each sample of an epoch
    held_out: list[str]
    batch: Callable  # (shape of latents, numbers of samples) -> (B prompts, tensors from which the images start ...)
    content: dict  # checksums, by which a resumed run knows its data again
    lines: list[str]  # what to tell the user
    write_skipped: Callable  # output folder: write there which rows or pictures were left out, if any


def data_checks(args) -> list[tuple]:
    """The (check, *arguments) of the data's files; quick enough to run before any model is loaded."""
    checks = [(check_prompts, args.prompts)] if args.method == "prompts" else [(check_images, args.images)]
    return checks + ([(check_prompts, args.val_prompts)] if args.val_prompts else [])


def read_prompt_data(accelerator, args) -> Data:
    """Read the prompts that the options name. Every process must call this; one on each node reads.

    Raises the same UserError in every process if they cannot be used.
    """
    prompts, held_out, reports = share_prompts(accelerator, args.prompts, args.val_prompts, args.val_count)
    content = {"training prompts": checksum(prompts), "held-out prompts": checksum(held_out)}
    lines = [describe(path, report) for path, report in reports.items()]
    lines.append(f"{len(prompts)} prompts to train on, {len(held_out)} held out.")
    batch = partial(training_batch, prompts, args.seed)
    return Data(prompts, held_out, batch, content, lines, partial(_write_rows, reports))


def read_picture_data(accelerator, args, model) -> Data:
    """Read the pictures that the options name and encode them, unless the cache has their latents.

    model: a models.Model with its VAE on the accelerator's device, in fp32. Every process must call this; one on each
    node works. Raises the same UserError in every process if the pictures cannot be used.
    """
    size = picture_size(model.vae, latent_shape(model))
    pictures, held_out, lines, skipped = share_pictures(
        accelerator, args.images, args.val_prompts, args.val_count, model.vae, size
    )
    content = {"training pictures": pictures.content, "held-out prompts": checksum(held_out)}

    def batch(shape, numbers):
        return direct_batch(pictures, args.seed, (args.t_min, args.t_max), numbers)

    return Data(pictures.captions, held_out, batch, content, lines, partial(_write_pictures, skipped))


def _write_pictures(skipped, folder: Path):
    write_skipped(skipped, folder / "bad_pictures.txt")


def _write_rows(reports, folder: Path):
    write_bad_rows(reports, folder / "bad_rows.txt")
