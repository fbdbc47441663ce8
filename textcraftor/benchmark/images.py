"""Images by the stock diffusers pipeline, its text embeddings switched from original to tuned in mid-run."""

import copy
from threading import Lock

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from textcraftor.errors import UserError
from textcraftor.models import load_model
from textcraftor.options import SCHEDULERS
from textcraftor.sampling import make_scheduler, prompt_noise
from textcraftor.weight_files import load_text_encoder, load_unet

_encoding = Lock()  # tokenizers keep settings of the call at work: one thread at a time


def check_steps(name, steps):
    """Raise UserError for a number of steps that the scheduler `name` cannot make."""
    if name == "DDIM":
        scheduler = make_scheduler(diffusers.DDIMScheduler().config, steps)
        scheduler.set_timesteps(steps)  # what the pipeline will do, without make_scheduler's cut
        if (made := len(scheduler.timesteps)) != steps:
            raise UserError(f"--step {steps}: diffusers' DDIM makes {made} of it; take another number")


def new_scheduler(name, config, steps):
    """The scheduler `name` with the model's noise schedule: "DDIM" is training's, the others are as diffusers has them.

    config: of the model's own scheduler, a dict.
    """
    if name == "DDIM":
        return make_scheduler(config, steps)
    own = {"skip_prk_steps": True} if name == "PNDM" else {}  # as SD v1.5: no steps of 4 evaluations
    return getattr(diffusers, SCHEDULERS[name]).from_config(config, **own)


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
    pipeline.register_modules(scheduler=new_scheduler(scheduler, config, steps))  # the constructor would change it
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
def generate(pipeline, tuned, prompts, indices, *, seed, steps, grad_steps, guidance, weighting=1.0):
    """Images (B, 3, H, W) in [0, 1] of B prompts, in the pipeline's dtype and on its device.

    The original text encoder drives the first steps - grad_steps steps, the mix weighting * tuned + (1 - weighting) *
    original the rest, in both branches of guidance. All that is random in image i comes from (seed, indices[i]).
    Threads may share the pipeline.
    """
    pipeline = copy.copy(pipeline)
    pipeline.scheduler = copy.deepcopy(pipeline.scheduler)  # it counts the steps of one run
    device, dtype, original = pipeline.device, pipeline.unet.dtype, pipeline.text_encoder
    unet = pipeline.unet.config
    noise = prompt_noise(seed, indices, (unet.in_channels, unet.sample_size, unet.sample_size))

    def encode(encoder):
        """(2, B, L, D), unconditional first."""
        pipeline.text_encoder = encoder
        conditional, unconditional = pipeline.encode_prompt(prompts, device, 1, True)
        pipeline.text_encoder = original
        return torch.stack([unconditional, conditional])

    with _encoding:
        early = encode(original)
        late = early if tuned is original else torch.lerp(early, encode(tuned), weighting)
    start = late if grad_steps == steps else early
    switched = late.flatten(0, 1) if guidance > 1 else late[1]  # without guidance there is one branch
    return pipeline(
        prompt_embeds=start[1], negative_prompt_embeds=start[0], latents=noise.to(device, dtype),
        generator=step_generators(seed, indices), num_inference_steps=steps, guidance_scale=guidance, output_type="pt",
        callback_on_step_end=switch_embeddings(switched, grad_steps),
    ).images  # fmt: skip


def step_generators(seed, indices):
    """A generator an image for the noise that some schedulers add in every step."""
    return [torch.Generator().manual_seed(index_seed(seed, index)) for index in indices]


def index_seed(seed, index):
    """A seed, 32 bits, of all that is drawn for prompt `index` beside its first noise."""
    return int(np.random.SeedSequence([seed, int(index)]).generate_state(1)[0])
