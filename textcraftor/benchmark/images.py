"""A benchmark's images: generated as in training, saved, and checked; and the switch of embeddings for stock
diffusers pipelines."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from textcraftor.errors import UserError
from textcraftor.files import free_bytes, write_whole
from textcraftor.models import Model, latent_shape, load_model, make_networks
from textcraftor.sampling import make_images, make_scheduler, prompt_noise, step_generators
from textcraftor.weight_files import load_text_encoder, load_unet

# Last bytes of a complete file, and the bytes per pixel that a file rarely exceeds: PNG as the raw pixels, JPEG at
# Pillow's quality of 75.
END = {".png": b"IEND\xaeB`\x82", ".jpg": b"\xff\xd9"}
BYTES_PER_PIXEL = {".png": 3, ".jpg": 0.5}
DISK_BLOCK = 4096  # bytes; files take whole blocks


def load_pipeline(model, scheduler, steps, text_path="", unet_path=""):
    """(StableDiffusionPipeline of `model`, tuned text encoder), all networks in fp32, frozen, on the CPU.

    model: see load_model; text_path, unet_path: tuned weights, see textcraftor.weight_files. Without text_path, the
    second is the pipeline's own text encoder.
    """
    tokenizer, text_encoder, unet, vae, config = load_model(model)
    tuned = text_encoder
    if text_path:
        tuned = copy.deepcopy(text_encoder)
        load_text_encoder(tuned, text_path)
    if unet_path:
        load_unet(unet, unet_path)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.register_modules(scheduler=make_scheduler(config, steps, scheduler))  # the constructor would change it
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, tuned


def switch_embeddings(embeddings, grad_steps):
    """A callback_on_step_end by which the last `grad_steps` steps use other `embeddings`, in any pipeline of diffusers.

    embeddings: as the pipeline holds them in its loop, with guidance (2B, L, D), unconditional rows first. Counted from
    the end, in steps: second-order schedulers evaluate the network twice in each step but the last, and PNDM twice in
    the first. To have them in all steps, start the pipeline with them.
    """

    def switch(pipeline, evaluation, t, tensors):
        left = pipeline.num_timesteps - 1 - evaluation
        return {"prompt_embeds": embeddings} if left <= pipeline.scheduler.order * (grad_steps - 1) + 1 else {}

    return switch


@torch.inference_mode()
def generate(pipeline, tuned, prompts, indices, *, seed, grad_steps, guidance, weighting=1.0):
    """B prompts -> images (B, 3, H, W) in [0, 1], fp32, on the pipeline's device, made as in training.

    Latents and scheduler are fp32; each network computes in the type of its weights. The last grad_steps steps use
    weighting * tuned + (1 - weighting) * original text embeddings in both branches of guidance, the steps before the
    original ones. All random numbers of image i derive from (seed, indices[i]). Threads may share the pipeline.
    """
    model = _model(pipeline)
    noise = prompt_noise(seed, indices, latent_shape(model))
    return make_images(
        make_networks(model, tuned), pipeline.scheduler, prompts, noise,
        tuned_steps=grad_steps, guidance=guidance, weighting=weighting, generators=step_generators(seed, indices),
    )  # fmt: skip


def _model(pipeline):
    return Model(pipeline.tokenizer, pipeline.text_encoder, pipeline.unet, pipeline.vae, {})


def image_size(pipeline):
    """(width, height) in pixels of the images that `generate` makes."""
    _, height, width = latent_shape(_model(pipeline))
    return width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor


def save_image(image, path):
    """Write an image (3, H, W) in [0, 1] whole or not at all, with Pillow's defaults, as HPS v2's instructions do."""
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    content = io.BytesIO()  # Pillow's own writing hides why a disk refuses
    Image.fromarray(pixels).save(content, Image.registered_extensions()[Path(path).suffix])
    with write_whole(path) as unfinished:
        unfinished.write_bytes(content.getvalue())


def damaged_images(paths, size):
    """Those of the image files that are missing, incomplete or damaged, or not RGB of `size` (width, height)."""
    with ThreadPoolExecutor() as pool:
        whole = pool.map(partial(_is_whole, size), paths)
        return [path for path, is_whole in zip(paths, whole, strict=True) if not is_whole]


def _is_whole(size, path):
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            return (picture.mode, picture.size) == ("RGB", size) and content.endswith(END[path.suffix])
    except Exception:  # each image format's decoder raises its own kinds
        return False


def check_space(folder, files, size):
    """Raise UserError if the disk of `folder` lacks room for image `files` of `size` (width, height)."""
    width, height = size
    needed = sum(width * height * BYTES_PER_PIXEL[Path(file).suffix] + DISK_BLOCK for file in files)
    free = free_bytes(folder)
    if free < needed:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB free, but the {len(files)} images to generate need about "
            f"{needed / 1e9:.2f} GB; free some space, or choose another disk with --output_path"
        )
