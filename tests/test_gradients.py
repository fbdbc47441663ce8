"""The training gradient against a naive unroll that stores everything, in float64."""

import pytest
import torch

from rewards import REWARDS, load_reward
from textcraftor.models import Model, make_networks
from textcraftor.sampling import make_images, make_scheduler, prompt_noise

PROMPTS = ["a red fox", "two apples on a table"]
T, K, GUIDANCE = 5, 3, 7.5


def naive_images(model, noise, weighting):
    """Every line of the method written out: no scheduler, no checkpointing, one network evaluation per embedding."""
    tokenizer, original, tuned, unet, vae, _ = model
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0).double()

    def embed(encoder, prompt):
        ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return encoder(ids)[0]

    images = []
    for prompt, z in zip(PROMPTS, noise.double(), strict=True):
        z = z[None]
        for step in range(T):
            t = 999 - step * 1000 // T
            is_tuned = step >= T - K
            with torch.set_grad_enabled(is_tuned):
                embeddings = []
                for text in ("", prompt):
                    embedding = embed(original, text)
                    if is_tuned:
                        embedding = weighting * embed(tuned, text) + (1 - weighting) * embedding
                    embeddings.append(embedding)
                e_uncond, e_cond = (unet(z, t, encoder_hidden_states=e, return_dict=False)[0] for e in embeddings)
                e = e_uncond + GUIDANCE * (e_cond - e_uncond)
                a, a_next = alpha_bar[t], alpha_bar[max(t - 1000 // T, 0)]
                x0 = (z - (1 - a).sqrt() * e) / a.sqrt()
                z = a_next.sqrt() * x0 + (1 - a_next).sqrt() * e
        images.append((vae.decode(z / 0.18215, return_dict=False)[0] / 2 + 0.5).clamp(0, 1))
    return torch.cat(images)


def gradient(score, parameters):
    return torch.cat([part.flatten() for part in torch.autograd.grad(score, parameters)])


@pytest.mark.parametrize("trains", ["text encoder", "unet"])
@pytest.mark.parametrize("name", REWARDS)
def test_gradient_equals_the_naive_unroll(double_model, rewards_root, name, trains):
    tokenizer, original, tuned, unet, vae, config = double_model
    reward = load_reward(name, rewards_root, "cpu", torch.float64)
    network = {"text encoder": tuned, "unet": unet}[trains]
    weighting = {"text encoder": 0.7, "unet": 1.0}[trains]
    noise = prompt_noise(0, [0, 1], (4, 8, 8))
    parameters = list(network.requires_grad_(True).parameters())
    try:
        expected_score = reward(naive_images(double_model, noise, weighting), PROMPTS).mean()
        expected = gradient(expected_score, parameters)
        networks = make_networks(Model(tokenizer, original, unet, vae, config), tuned)
        how = {"tuned_steps": K, "guidance": GUIDANCE, "weighting": weighting, "checkpoint": True}
        score = reward(make_images(networks, make_scheduler(config, T), PROMPTS, noise.double(), **how), PROMPTS).mean()
        found = gradient(score, parameters)
    finally:
        network.requires_grad_(False)
    torch.testing.assert_close(score, expected_score, rtol=1e-7, atol=0)
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_recomputing_changes_nothing_of_the_gradient(double_model):
    tokenizer, original, tuned, unet, vae, config = double_model
    parameters = [*tuned.requires_grad_(True).parameters(), *unet.requires_grad_(True).parameters()]
    noise = prompt_noise(0, [0, 1], (4, 8, 8)).double()
    try:
        networks = make_networks(Model(tokenizer, original, unet, vae, config), tuned)
        found = []
        for recompute in (True, False):
            how = {"checkpoint": recompute, "vae_checkpointing": recompute, "tuned_steps": K, "guidance": GUIDANCE}
            images = make_images(networks, make_scheduler(config, T), PROMPTS, noise, **how)
            found.append(gradient(images.square().mean(), parameters))
    finally:
        tuned.requires_grad_(False), unet.requires_grad_(False)
    assert found[0].norm() > 0
    assert (found[1] - found[0]).norm() <= 1e-12 * found[0].norm()  # the VAE decodes one image at a time, or two
