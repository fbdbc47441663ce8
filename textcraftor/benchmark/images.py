"""A benchmark's images, made by the sampler of training."""

import copy

import torch
from diffusers import StableDiffusionPipeline

from textcraftor.models import Model, latent_shape, load_model, make_networks
from textcraftor.sampling import make_images, make_scheduler, prompt_noise, step_generators
from textcraftor.weight_files import load_text_encoder, load_unet


def load_pipeline(model, scheduler, steps, text_path="", unet_path=""):
    """A StableDiffusionPipeline of `model`, see load_model -> (pipeline, tuned text encoder or the original again).

    text_path, unet_path: tuned weights, see textcraftor.weight_files. All networks are fp32, frozen, on the CPU.
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


@torch.inference_mode()
def generate(pipeline, tuned, prompts, indices, *, seed, grad_steps, guidance, weighting=1.0):
    """Images (B, 3, H, W) in [0, 1] of B prompts, fp32, on the pipeline's device, made as in training.

    Latents and the scheduler compute in fp32, networks in the type of their weights. The original text encoder drives
    the steps before the last grad_steps, weighting * tuned + (1 - weighting) * original the rest, in both branches of
    guidance. Everything random in image i derives from (seed, indices[i]). Threads may share the pipeline.
    """
    model = Model(pipeline.tokenizer, pipeline.text_encoder, pipeline.unet, pipeline.vae, {})
    noise = prompt_noise(seed, indices, latent_shape(model))
    return make_images(
        make_networks(model, tuned), pipeline.scheduler, prompts, noise,
        tuned_steps=grad_steps, guidance=guidance, weighting=weighting, generators=step_generators(seed, indices),
    )  # fmt: skip
