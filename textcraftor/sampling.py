"""DDIM sampling with classifier-free guidance, differentiable in its last steps (TextCraftor, section 4.2)."""

from functools import partial

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch.utils.checkpoint import checkpoint as recompute_in_backward


def make_scheduler(config, steps):
    """The method's sampler: DDIM with `steps` trailing time steps, whatever sampler the model's folder names.

    config: the folder's scheduler config (a dict; its noise schedule and prediction type are kept), or the model's
    folder or hub id. For steps=25 and 1000 training steps, timesteps are 999, 959, …, 39.
    """
    if not isinstance(config, dict):
        config = DDIMScheduler.load_config(config, subfolder="scheduler")
    keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    scheduler = DDIMScheduler(
        **{name: config[name] for name in keep if name in config},
        timestep_spacing="trailing",
        set_alpha_to_one=False,
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    scheduler.timesteps = scheduler.timesteps[:steps]  # rounding adds t = -1 for 61 steps and some others
    return scheduler


def prompt_noise(seed, indices, shape):
    """Standard normal noise (B, *shape) on the CPU, row i a function of (seed, indices[i]) only.

    Not torch's generator: its CPU state keeps only 32 bits of a seed, too few for a pair.
    """
    rows = [np.random.default_rng([seed, int(index)]).standard_normal(shape, dtype=np.float32) for index in indices]
    return torch.from_numpy(np.stack(rows))


def ddim_step(unet, scheduler, z, t, embeddings, guidance):
    """One guided DDIM step: z_t (B, C, h, w), embeddings (2B, L, D), unconditional rows first -> z_{t-1}.

    The UNet computes in the type its weights have, guidance and the step itself in that of z.
    """
    dtype = next(unet.parameters()).dtype  # a wrapped network does not know its own
    epsilon = unet(torch.cat([z, z]).to(dtype), t, encoder_hidden_states=embeddings.to(dtype)).sample.to(z.dtype)
    unconditional, conditional = epsilon.chunk(2)
    epsilon = unconditional + guidance * (conditional - unconditional)
    return scheduler.step(epsilon, t, z).prev_sample


def sample_latents(unet, scheduler, latents, original, tuned, guidance, grad_steps, checkpoint=True):
    """Run all T steps of `scheduler`: the last K = grad_steps with `tuned`, those before with `original`.

    latents: (B, C, h, w) noise z_T; original, tuned: (2B, L, D) text embeddings, unconditional rows first.
    The first T−K steps carry no gradient. With checkpoint=True each of the last K keeps its input latents only and is
    computed again in the backward pass, so memory neither grows with T nor, but for those latents, with K.
    Returns z_0, (B, C, h, w).
    """
    first_tuned = len(scheduler.timesteps) - grad_steps
    z = latents * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps[:first_tuned]:
            z = ddim_step(unet, scheduler, z, t, original, guidance)
    for t in scheduler.timesteps[first_tuned:]:
        if checkpoint:
            z = recompute_in_backward(
                ddim_step, unet, scheduler, z, t, tuned, guidance, use_reentrant=False, preserve_rng_state=False
            )
        else:
            z = ddim_step(unet, scheduler, z, t, tuned, guidance)
    return z


def decode(vae, latents, checkpoint=False):
    """Latents z_0 (B, C, h, w) -> images (B, 3, H, W) clamped to [0, 1], in the type of z_0.

    With checkpoint=True image by image, each computed again in the backward pass: memory holds the activations of one.
    """

    def image(z):
        decoded = vae.decode((z / vae.config.scaling_factor).to(vae.dtype)).sample
        return (decoded.to(z.dtype) / 2 + 0.5).clamp(0, 1)

    if checkpoint:
        again = partial(recompute_in_backward, image, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(z) for z in latents.split(1)])
    return image(latents)
