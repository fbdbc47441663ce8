"""Direct fine-tuning: the image of one prediction against the definition written out, in float64, and its gradient."""

import pytest
import torch

from textcraftor.direct import denoise_once, make_direct_images
from textcraftor.models import Model, make_networks
from textcraftor.sampling import make_scheduler, prompt_noise

CAPTIONS = ["a red fox", "two apples on a table", "an owl"]
TIMES = torch.tensor([0, 999, 400])  # both ends, and a time step for each picture
GUIDANCE, WEIGHTING = 7.5, 0.7
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def alphas_and_sigmas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_gives_the_picture_back(prediction_type):
    """And with any other one, x̂ is off by the closed form's multiple of the prediction's error."""
    z, noise, error = (prompt_noise(seed, range(3), (4, 8, 8)).double() for seed in (0, 1, 2))
    alpha, sigma = (values[TIMES].reshape(-1, 1, 1, 1) for values in alphas_and_sigmas())
    perfect = {"epsilon": noise, "v_prediction": alpha * noise - sigma * z, "sample": z}[prediction_type]
    gain = {"epsilon": -sigma / alpha, "v_prediction": -sigma, "sample": 1}[prediction_type]
    scheduler, seen = make_scheduler(BETAS | {"prediction_type": prediction_type}, 25), []

    def predict(z_t, t, conditions):
        seen.append((z_t, t))
        return perfect + conditions["error"]

    for conditions in ({"error": 0}, {"error": error}):
        found = denoise_once(predict, scheduler, z, noise, TIMES, conditions)
        expected = z + gain * conditions["error"]
        # diffusers keeps its alphas in float32, which costs seven digits and more of σ at t = 0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    torch.testing.assert_close(seen[0][0], alpha * z + sigma * noise, rtol=0, atol=1e-5)
    assert torch.equal(seen[0][1], TIMES)


def test_zero_terminal_snr_needs_no_division():
    config = BETAS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    z, noise, v = (prompt_noise(seed, [0], (4, 8, 8)) for seed in range(3))
    found = denoise_once(lambda *_: v, make_scheduler(config, 25), z, noise, torch.tensor([999]), {})
    torch.testing.assert_close(found, -v, rtol=0, atol=1e-3)


def naive_images(model, latents, noise):
    """One picture at a time, one network evaluation for each embedding, and no scheduler."""
    tokenizer, original, tuned, unet, vae, _ = model
    alphas, sigmas = (values.double() for values in alphas_and_sigmas())

    def embed(encoder, text):
        ids = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return encoder(ids)[0]

    images = []
    for caption, z, e, t in zip(CAPTIONS, latents, noise, TIMES.tolist(), strict=True):
        z_t = (alphas[t] * 0.18215 * z + sigmas[t] * e)[None]
        mixed = [WEIGHTING * embed(tuned, text) + (1 - WEIGHTING) * embed(original, text) for text in ("", caption)]
        uncond, cond = (unet(z_t, t, encoder_hidden_states=c, return_dict=False)[0] for c in mixed)
        z_0 = (z_t - sigmas[t] * (uncond + GUIDANCE * (cond - uncond))) / alphas[t]
        images.append((vae.decode(z_0 / 0.18215, return_dict=False)[0] / 2 + 0.5).clamp(0, 1))
    return torch.cat(images)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_images_and_gradients_equal_the_definition(double_model, checkpoint):
    tokenizer, original, tuned, unet, vae, config = double_model
    latents, noise, weights = (prompt_noise(seed, range(3), (4, 8, 8)).double() for seed in (3, 4, 5))
    weights = weights.mean(1, keepdim=True).repeat_interleave(8, 2).repeat_interleave(8, 3)
    networks = make_networks(Model(tokenizer, original, unet, vae, config), tuned)
    how = {"guidance": GUIDANCE, "weighting": WEIGHTING, "checkpoint": checkpoint, "vae_checkpointing": checkpoint}
    scheduler = make_scheduler(config, 25)
    scheduler.alphas_cumprod = alphas_and_sigmas()[0] ** 2  # in float64, as in the definition
    parameters = [*tuned.requires_grad_(True).parameters(), *unet.requires_grad_(True).parameters()]
    try:
        images = make_direct_images(networks, scheduler, CAPTIONS, latents, noise, TIMES, **how)
        expected = naive_images(double_model, latents, noise)
        gradients = [torch.autograd.grad((weights * each).sum(), parameters) for each in (images, expected)]
    finally:
        tuned.requires_grad_(False), unet.requires_grad_(False)
    # Not closer: diffusers embeds time steps in fp32, whose last bit depends on the processor and the batch.
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    for network in (slice(len(list(tuned.parameters()))), slice(len(list(tuned.parameters())), None)):
        found, wanted = (torch.cat([part.flatten() for part in each[network]]) for each in gradients)
        assert wanted.norm() > 0
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
