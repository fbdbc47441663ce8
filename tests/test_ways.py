"""The ways in which gradient flows (--gradient), each against its definition written out, in float64."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from test_gradients import GUIDANCE, PROMPTS, K, T, gradient

from textcraftor.errors import UserError
from textcraftor.models import Model, make_networks
from textcraftor.sampling import (
    make_images,
    make_scheduler,
    prompt_noise,
    sample_detached,
    sample_last_k,
    sample_one_prediction,
    training_sampler,
)
from textcraftor.training_options import parse_options


def written_out(model, noise, way, chosen, both):
    """z_0 of each prompt: "drtune" as a z_T + sum of b_i ε_i; "refl" as (z_t - σ_t ε) / α_t; "last_k" step by step.

    both: whether the tuned encoder reads the empty prompt, too.
    """
    tokenizer, original, tuned, unet, *_ = model
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0).double()
    times = [999 - step * 1000 // T for step in range(T)]

    def embed(encoder, text):
        ids = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return encoder(ids)[0]

    def predict(encoder, prompt, z, t):
        texts = (("", encoder if both else original), (prompt, encoder))
        empty, full = (unet(z, t, encoder_hidden_states=embed(reader, text))[0] for text, reader in texts)
        return empty + GUIDANCE * (full - empty)

    found = []
    for prompt, z in zip(PROMPTS, noise, strict=True):
        z, predictions = z[None], []
        for step, t in enumerate(times):
            index = step - (T - K)
            alpha, sigma = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
            if way == "refl" and index == chosen:
                found.append((z - sigma * predict(tuned, prompt, z, t)) / alpha)
                break
            driven = way != "refl" and index >= 0
            seen = z if way == "last_k" else z.detach()
            with torch.set_grad_enabled(driven and (way == "last_k" or index in chosen)):
                predictions.append(predict(tuned if driven else original, prompt, seen, t))
            after = alpha_bar[max(t - 1000 // T, 0)]
            alpha_after, sigma_after = after.sqrt(), (1 - after).sqrt()
            last = predictions[-1] if way == "last_k" else predictions[-1].detach()
            z = alpha_after / alpha * seen + (sigma_after - alpha_after * sigma / alpha) * last
        if way == "last_k":
            found.append(z)
        if way == "drtune":
            # z_0 as one sum: a step multiplies what came before by alpha_after / alpha.
            total = 0
            for step, (t, prediction) in enumerate(zip(times, predictions, strict=True)):
                after = alpha_bar[max(t - 1000 // T, 0)]
                alpha, sigma = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
                b = (1 - after).sqrt() - after.sqrt() * sigma / alpha
                for later in times[step + 1 :]:
                    b = b * (alpha_bar[max(later - 1000 // T, 0)] / alpha_bar[later]).sqrt()
                total = total + b * prediction
            first = noise[len(found)][None]
            for t in times:
                first = first * (alpha_bar[max(t - 1000 // T, 0)] / alpha_bar[t]).sqrt()
            found.append(first + total)
    return torch.cat(found)


WAYS = [
    ("drtune", {0, 2}, True, "text"), ("refl", 1, True, "text"), ("drtune", {1, 2}, False, "text"),
    ("refl", 0, False, "text"), ("last_k", 0, False, "text"), ("last_k", 0, False, "unet"), ("refl", 1, False, "unet"),
]  # fmt: skip


@pytest.mark.parametrize("way, chosen, both, trains", WAYS)
def test_gradient_is_that_of_the_definition(double_model, way, chosen, both, trains):
    tokenizer, original, tuned, unet, vae, config = double_model
    noise = prompt_noise(0, [0, 1], (4, 8, 8)).double()
    networks = make_networks(Model(tokenizer, original, unet, vae, config), tuned, both)
    trained = tuned if trains == "text" else unet
    parameters = list(trained.requires_grad_().parameters())
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    try:
        z = written_out(double_model, noise, way, chosen, both)
        images = (vae.decode(z / 0.18215).sample / 2 + 0.5).clamp(0, 1)
        expected = gradient((images * target.repeat(1, 1, 8, 8)[:, :3]).sum(), parameters)
        for checkpoint in (False, True):
            sampler = {
                "drtune": partial(sample_detached, graded=chosen),
                "refl": partial(sample_one_prediction, index=chosen),
                "last_k": sample_last_k,
            }[way]
            found = make_images(
                networks, make_scheduler(config, T), PROMPTS, noise, tuned_steps=K, guidance=GUIDANCE,
                checkpoint=checkpoint, sampler=sampler,
            )  # fmt: skip
            torch.testing.assert_close(found, images, rtol=1e-6, atol=1e-7)
            ours = gradient((found * target.repeat(1, 1, 8, 8)[:, :3]).sum(), parameters)
            assert expected.norm() > 0 and (ours - expected).norm() < 1e-5 * expected.norm()
    finally:
        trained.requires_grad_(False)


def test_steps_are_drawn_evenly_and_alike_on_all_processes():
    drawn, counts, places = Counter(), Counter(), Counter()
    for step in range(3000):
        sampler, tuned_steps = training_sampler("drtune", (3, 3), 15, 7, step)
        assert tuned_steps == 15 and len(sampler.keywords["graded"]) == 3
        drawn.update(sampler.keywords["graded"])
        counts[training_sampler("last_k", (1, 5), 15, 7, step)[1]] += 1
        places[training_sampler("refl", (1, 1), 5, 7, step)[0].keywords["index"]] += 1
    assert sorted(drawn) == list(range(15)) and sorted(counts) == [1, 2, 3, 4, 5] and sorted(places) == list(range(5))
    for found in (drawn, counts, places):  # each a fifth, within five standard deviations
        assert np.abs(np.array(list(found.values())) / 3000 - 0.2).max() < 5 * (0.2 * 0.8 / 3000) ** 0.5


def test_ranges_that_make_no_sense_are_refused():
    for options, message in (
        (["--grad_steps", "5-1"], "--grad_steps 5-1: expected a number of at least 1"),
        (["--grad_steps", "0-3"], "expected a number"),
        (["--grad_steps", "many"], "expected a number"),
        (["--grad_steps", "1-30"], "grad_steps <= step"),
        (["--gradient", "drtune", "--grad_steps", "16"], "--grad_steps 16 --driven 15 --step 25"),
        (["--gradient", "drtune", "--driven", "26"], "driven <= step"),
        (["--driven", "5"], "--driven 5: only works with --gradient drtune or refl"),
        (["--t_max", "5"], "--t_max 5: only works with --method direct --images FOLDER"),
        (["--gradient", "refl"], "refl uses one step"),
    ):
        with pytest.raises(UserError, match=message):
            parse_options(["--model", "miniature", *options])
