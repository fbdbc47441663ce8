"""From noise and prompts to images, differentiable in the last sampling steps (TextCraftor, section 4.2).

Training, validation and the benchmarks all make images with `make_images`. It calls a sampler, a function of tensors
that decides which steps use the tuned conditions and where gradient flows:

    sampler(predict, scheduler, z_T, original, tuned, tuned_steps, checkpoint, generators, start=0) -> z_0

where predict(z_t, t, conditions) -> guided noise prediction. With start > 0 that many steps of the scheduler are done
already, and z is what they led to: bank.py keeps such latents. To add a way to sample or to differentiate, add a
sampler; `training_sampler` chooses the one that --gradient names.
Latents and the scheduler's arithmetic are fp32 everywhere; each network computes in the type of its weights.
"""

import copy
import inspect
from functools import partial

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from textcraftor.embeddings import embed_prompts
from textcraftor.errors import UserError
from textcraftor.options import SCHEDULERS

# The part of a model's scheduler config that describes the noise on which the model was trained.
NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip


def make_images(
    networks, scheduler, prompts, noise, *, tuned_steps, guidance, weighting=1.0, checkpoint=False,
    vae_checkpointing=False, generators=None, conditions=None, sampler=None,
):  # fmt: skip
    """B prompts and their noise z_T (B, C, h, w) -> images (B, 3, H, W) in [0, 1], with gradient.

    networks: a models.Networks; scheduler: of make_scheduler; the last `tuned_steps` steps are driven by weighting *
    tuned + (1 - weighting) * original text embeddings, those before by the original ones. checkpoint,
    vae_checkpointing: recompute the activations of the tuned steps or of the VAE in the backward pass. generators: one
    per image, for schedulers that add noise in each step. conditions: the result of embed_prompts for these prompts, if
    the caller already has it. sampler: by default sample_last_k.
    """
    original, tuned = conditions or embed_prompts(networks, prompts, weighting)
    predict = partial(predict_noise, networks.unet, guidance, split=not networks.tune_unconditional)
    z = noise.to(networks.device) * scheduler.init_noise_sigma
    sampler = sampler or sample_last_k
    z = sampler(predict, scheduler, z, original, tuned, tuned_steps, checkpoint, generators)
    return decode(networks.vae, z, vae_checkpointing)


def predict_noise(unet, guidance, z, t, conditions, split=False):
    """Classifier-free guidance: z_t (B, C, h, w), conditions of 2B rows, unconditional ones first -> (B, C, h, w).

    t: one time step for all, or (B,). The UNet computes in the type of its weights, guidance in the type of z.
    split: the unconditional rows have no gradient. Where z_t and the UNet have none either, the UNet runs on them apart
    and keeps nothing for the backward pass, which costs half as much.
    """
    t = torch.as_tensor(t).to(z.device, non_blocking=True)  # the UNet itself would wait for the copy
    if split and torch.is_grad_enabled() and not (z.requires_grad or any(w.requires_grad for w in unet.parameters())):
        halves = [{name: value.chunk(2)[i] for name, value in conditions.items()} for i in (0, 1)]
        dtype = next(unet.parameters()).dtype
        halves = [{name: value.to(dtype) for name, value in half.items()} for half in halves]
        with torch.no_grad():
            unconditional = unet(z.to(dtype), t, **halves[0]).sample.to(z.dtype)
        conditional = unet(z.to(dtype), t, **halves[1]).sample.to(z.dtype)
        return unconditional + guidance * (conditional - unconditional)
    t = torch.cat([t, t]) if t.ndim else t
    dtype = next(unet.parameters()).dtype  # a wrapped network does not know its own
    conditions = {name: value.to(dtype) for name, value in conditions.items()}
    prediction = unet(torch.cat([z, z]).to(dtype), t, **conditions).sample.to(z.dtype)
    unconditional, conditional = prediction.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def sample_last_k(predict, scheduler, z, original, tuned, tuned_steps, checkpoint=False, generators=None, *, start=0):
    """Run all T steps of `scheduler`, the last K = tuned_steps with `tuned` and gradient (the paper's; DRaFT-K).

    z: (B, C, h, w), z_T. The first T − K steps use `original` and carry no gradient. With checkpoint=True each of the
    last K steps stores only its input latents and is recomputed in the backward pass, so memory does not grow with T,
    and with K only by those latents. Returns z_0, (B, C, h, w).
    """
    scheduler = copy.deepcopy(scheduler)  # some schedulers count steps and store predictions
    first = first_tuned(scheduler, tuned_steps)

    def step(z, t, conditions):
        prediction = predict(scheduler.scale_model_input(z, t), t, conditions)
        return scheduler.step(prediction, t, z, **step_noise(scheduler, generators)).prev_sample

    with torch.no_grad():
        for t in scheduler.timesteps[start:first]:
            z = step(z, t, original)
    for t in scheduler.timesteps[first:]:
        z = recomputed(step, checkpoint)(z, t, tuned)
    return z


def sample_detached(
    predict, scheduler, z, original, tuned, tuned_steps, checkpoint=False, generators=None, *, graded, start=0
):  # fmt: skip
    """As sample_last_k, but gradient flows through some predictions only, each with its input latents detached.

    graded: indices, 0 to tuned_steps - 1, of the tuned steps whose predictions have gradient. Latents are linear in the
    predictions, z_0 = a z_T + sum of b_i ε_i, so no gradient passes through a chain of UNet evaluations: early steps
    can be trained, each costs one evaluation backward, and memory is that of len(graded) evaluations (of one with
    checkpoint=True). Source: DRTune (arXiv 2405.00760); also LongAlign. For DDIM, whose steps are linear.
    """
    first = first_tuned(scheduler, tuned_steps)
    for index, t in enumerate(scheduler.timesteps[start:], start - first):
        if index in graded:
            prediction = recomputed(predict, checkpoint)(z.detach(), t, tuned)
        else:
            with torch.no_grad():
                prediction = predict(z.detach(), t, tuned if index >= 0 else original)
        z = scheduler.step(prediction, t, z).prev_sample
    return z


def sample_one_prediction(
    predict, scheduler, z, original, tuned, tuned_steps, checkpoint=False, generators=None, *, index, start=0
):  # fmt: skip
    """The image that one guided prediction with `tuned` foresees: x̂_0 = (z_t - σ_t ε̂) / α_t, the rest is never run.

    index: of the step, 0 to tuned_steps - 1 among the last tuned_steps; all steps before it use `original`, without
    gradient. Source: ReFL (ImageReward, arXiv 2304.05977). For DDIM; prediction types as diffusers has them.
    """
    stop = first_tuned(scheduler, tuned_steps) + index
    with torch.no_grad():
        for t in scheduler.timesteps[start:stop]:
            z = scheduler.step(predict(z, t, original), t, z).prev_sample
    t = scheduler.timesteps[stop]
    prediction = recomputed(predict, checkpoint)(z, t, tuned)
    return scheduler.step(prediction, t, z).pred_original_sample


def sample_prefix(predict, scheduler, z, original, stops):
    """The latents (B, S, C, h, w) before each of the S steps with indices `stops`, in ascending order; T means z_0.

    z: (B, C, h, w), z_T. All steps use `original`. For DDIM, whose steps need nothing of those before.
    """
    kept = []
    for index, t in enumerate(scheduler.timesteps[: stops[-1]]):
        if index in stops:
            kept.append(z)
        z = scheduler.step(predict(z, t, original), t, z).prev_sample
    return torch.stack([*kept, z], dim=1)


def training_sampler(gradient, grad_steps, driven, seed, step):
    """How training step `step` samples -> (sampler, tuned_steps), as make_images takes them.

    gradient: "last_k", "drtune" or "refl". grad_steps: (lowest, highest) K, drawn anew in each step: for last_k the
    last K steps are tuned and carry gradient; for drtune K of the last `driven` steps, drawn at random, carry it; for
    refl K is 1, one of the last `driven`. What is drawn depends on (seed, step) alone: all processes draw the same.
    """
    draw = np.random.default_rng([seed, step, 2])  # no generator of prompts, noise or pictures
    count = int(draw.integers(grad_steps[0], grad_steps[1] + 1))
    if gradient == "drtune":
        graded = frozenset(draw.choice(driven, count, replace=False).tolist())
        return partial(sample_detached, graded=graded), driven
    if gradient == "refl":
        return partial(sample_one_prediction, index=int(draw.integers(driven))), driven
    return sample_last_k, count


def first_tuned(scheduler, tuned_steps):
    """Index among scheduler.timesteps of the first evaluation in the last `tuned_steps` steps.

    Second-order schedulers evaluate the network twice in every step but the last; PNDM does so in the first step.
    """
    if tuned_steps == scheduler.num_inference_steps:
        return 0
    evaluations = scheduler.order * (tuned_steps - 1) + 1 if tuned_steps else 0
    return len(scheduler.timesteps) - evaluations


def decode(vae, latents, checkpoint=False):
    """Latents z_0 (B, C, h, w) -> images (B, 3, H, W) clamped to [0, 1], in the type of z_0.

    With checkpoint=True, images are decoded one at a time and recomputed in the backward pass, so memory holds the
    activations of a single image.
    """

    def image(z):
        decoded = vae.decode((z / vae.config.scaling_factor).to(vae.dtype)).sample
        return (decoded.to(z.dtype) / 2 + 0.5).clamp(0, 1)

    if checkpoint:
        return torch.cat([recomputed(image)(z) for z in latents.split(1)])
    return image(latents)


def to_uint8(images):
    """Images in [0, 1], of any shape -> the same as 8-bit numbers, rounded."""
    return (images * 255).round().to(torch.uint8)


def recomputed(function, checkpoint=True):
    """`function` with its activations recomputed in the backward pass; `function` itself if checkpoint is False."""
    if not checkpoint:
        return function
    return partial(recompute_in_backward, function, use_reentrant=False, preserve_rng_state=False)


def make_scheduler(config, steps, name="DDIM"):
    """A scheduler of `steps` steps with the model's own noise schedule and prediction type.

    config: the model's scheduler config, a dict. name: of options.SCHEDULERS. "DDIM" is always the method's sampler,
    whatever the model's config names: η = 0, trailing time steps (999, 959, …, 39 for 25), ᾱ₀ after the last; the other
    schedulers are configured as in diffusers. Raises UserError for noise schedules that sampling cannot start from.
    """
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(
            "the model's scheduler has rescale_betas_zero_snr and prediction_type epsilon, but epsilon says nothing "
            "about the image at zero SNR; set prediction_type to v_prediction in scheduler_config.json"
        )
    if name != "DDIM":
        own = {"skip_prk_steps": True} if name == "PNDM" else {}  # as in SD v1.5: no Runge-Kutta steps of 4 evaluations
        scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(config, **own)
        scheduler.set_timesteps(steps)
        return scheduler
    scheduler = DDIMScheduler(
        **{key: config[key] for key in NOISE_SCHEDULE if key in config},
        timestep_spacing="trailing",
        set_alpha_to_one=False,
        clip_sample=False,
        steps_offset=1,  # unused with trailing spacing; diffusers warns about other values
    )
    scheduler.set_timesteps(steps)
    scheduler.timesteps = scheduler.timesteps[:steps]  # rounding adds t = -1 for 61 steps and some others
    return scheduler


def prompt_noise(seed, indices, shape):
    """Standard normal noise (B, *shape) on the CPU, row i depends on (seed, indices[i]) only.

    Not with torch's generator: on the CPU it uses only 32 bits of a seed, too few for a pair.
    """
    rows = [np.random.default_rng([seed, int(index)]).standard_normal(shape, dtype=np.float32) for index in indices]
    return torch.from_numpy(np.stack(rows))


def step_noise(scheduler, generators):
    """The generator as a keyword argument for schedulers that add noise in each step, else no argument."""
    takes_it = generators and "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generators} if takes_it else {}


def step_generators(seed, indices):
    """One generator per image, for the noise that some schedulers add in every step."""
    return [torch.Generator().manual_seed(index_seed(seed, index)) for index in indices]


def index_seed(seed, index):
    """A 32-bit seed for everything random about prompt `index` except its initial noise."""
    return int(np.random.SeedSequence([seed, int(index)]).generate_state(1)[0])
