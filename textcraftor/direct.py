"""Direct fine-tuning with reward (TextCraftor, section 3.2.1): noise on a real picture, one prediction, an image.

Cheap: one evaluation of the UNet instead of T. But one prediction from much noise is a blurred mean of all images that
the caption allows, and its gradient is large: an error of the predicted noise is multiplied by σ_t / α_t, which is 0.03
at t = 0, 1 at t = 354 and 15 at t = 999 with Stable Diffusion's noise. The paper draws t from all of 0 ... 999, and so
does the default here; a smaller t_max gives rewards sharper images to score.
"""

from functools import partial

from textcraftor.embeddings import embed_prompts
from textcraftor.sampling import decode, predict_noise, recomputed


def make_direct_images(
    networks, scheduler, captions, latents, noise, t, *, guidance, weighting=1.0, checkpoint=False,
    vae_checkpointing=False, conditions=None,
):  # fmt: skip
    """B pictures' latents, with noise ε at time steps t -> images (B, 3, H, W) in [0, 1], from one prediction each.

    networks: a models.Networks; scheduler: of make_scheduler (any number of steps; its noise schedule counts); latents
    (B, C, h, w): of the VAE, not scaled; noise: the same shape, standard normal; t: (B,) integers. The prediction is
    driven by weighting * tuned + (1 - weighting) * original text embeddings of the captions. Differentiable in what
    trains; checkpoint, vae_checkpointing: recompute activations in the backward pass, of the UNet and of the VAE.
    conditions: what embed_prompts returned for these captions, from a caller that needs it, too.
    """
    _, tuned = conditions or embed_prompts(networks, captions, weighting)
    predict = partial(predict_noise, networks.unet, guidance, split=not networks.tune_unconditional)
    latents, noise, t = (value.to(networks.device) for value in (latents, noise, t))
    z = denoise_once(predict, scheduler, latents * networks.vae.config.scaling_factor, noise, t, tuned, checkpoint)
    return decode(networks.vae, z, vae_checkpointing)


def denoise_once(predict, scheduler, z, noise, t, conditions, checkpoint=False):
    """z_t = α_t z_0 + σ_t ε, then the z_0 that one guided prediction from it implies (equation 4), (B, C, h, w).

    predict(z_t, t, conditions) -> guided prediction; z: z_0, scaled as the UNet knows latents; t: (B,) on z's device.
    """

    def implied(z_t):
        return predicted_latents(scheduler, z_t, t, predict(z_t, t, conditions))

    z_t = scheduler.add_noise(z, noise, t)
    return recomputed(implied, checkpoint)(z_t)


def predicted_latents(scheduler, z_t, t, prediction):
    """z_0 (B, C, h, w) according to a prediction at time steps t (B,), by the scheduler's prediction_type.

    epsilon: (z_t − σ_t ε̂) / α_t; v_prediction: α_t z_t − σ_t v̂; sample: the prediction itself.
    """
    alpha_bar = scheduler.alphas_cumprod.to(z_t)[t].reshape(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    match scheduler.config.prediction_type:
        case "epsilon":
            return (z_t - sigma * prediction) / alpha
        case "v_prediction":
            return alpha * z_t - sigma * prediction
        case "sample":
            return prediction
