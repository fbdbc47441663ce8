"""The sampler against diffusers' own pipeline, its noise, and what it keeps in memory for the backward pass."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import embed, sample_latents

from textcraftor.embeddings import count_cut, embed_prompts
from textcraftor.errors import UserError
from textcraftor.models import load_model, make_networks
from textcraftor.sampling import decode, make_scheduler, prompt_noise

PROMPTS = ["a red fox", "two apples on a table"]
T = 6


@pytest.fixture(scope="module")
def model(stable_diffusion):
    return load_model(str(stable_diffusion))


@pytest.fixture(scope="module")
def noise(model):
    return prompt_noise(0, [0, 1], (4, 8, 8))


def test_timesteps_are_trailing(model):
    scheduler = make_scheduler(model[-1], 25)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -40))
    # The last step ends at alpha-bar of t = 0, not at 1.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(scheduler.final_alpha_cumprod.double(), 1 - betas[0], rtol=0, atol=1e-6)


def test_every_number_of_steps_gives_as_many(model):
    """By rounding, diffusers adds t = -1 for some, 61 among them."""
    for steps in range(1, 1001):
        timesteps = make_scheduler(model[-1], steps).timesteps
        assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
        assert (timesteps.diff() < 0).all()


def test_a_schedule_rescaled_to_zero_snr_is_kept_by_every_scheduler():
    """As diffusers has it: training and the other samplers share the model's own noise schedule."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    config |= {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    expected = DDIMScheduler(**config).alphas_cumprod
    for name in ("DDIM", "DPMSolver", "Euler"):
        found = make_scheduler(config, 10, name).alphas_cumprod
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert expected[-1] < 1e-6 < DDIMScheduler(**config | {"rescale_betas_zero_snr": False}).alphas_cumprod[-1]
    with pytest.raises(UserError, match="v_prediction"):
        make_scheduler(config | {"prediction_type": "epsilon"}, 10)


@pytest.mark.parametrize("grad_steps", [0, 2, T])
def test_equals_the_stock_pipeline(stable_diffusion, model, noise, grad_steps):
    """With another embedding from step T - K on, by the pipeline's own callback."""
    tokenizer, text_encoder, unet, vae, config = model
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=False
    )
    first = embed(tokenizer, text_encoder, PROMPTS)
    late = embed(tokenizer, text_encoder, ["quite another thing", "snow"])

    def switch(pipeline, step, t, kwargs):
        return {"prompt_embeds": late if step >= T - grad_steps - 1 else first}

    start = late if grad_steps == T else first
    expected = pipeline(
        prompt_embeds=start[2:], negative_prompt_embeds=start[:2], latents=noise, num_inference_steps=T,
        guidance_scale=7.5, output_type="pt", callback_on_step_end=switch,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    ).images  # fmt: skip
    with torch.no_grad():
        images = decode(vae, sample_latents(unet, make_scheduler(config, T), noise, first, late, 7.5, grad_steps))
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)
    assert images.std() > 0.05  # no grey page equals another


def test_prompts_are_encoded_as_the_stock_pipeline_does(stable_diffusion, model):
    tokenizer, text_encoder, *_ = model
    prompts = ["a red fox", "word " * 200]
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    expected, unconditional = pipeline.encode_prompt(prompts, "cpu", 1, True)
    pair = embed(tokenizer, text_encoder, prompts)
    torch.testing.assert_close(pair, torch.cat([unconditional, expected]), rtol=0, atol=1e-5)
    assert count_cut(tokenizer, [*prompts, "word " * 75, "word " * 76]) == 2  # 75 and the two marks are 77


def test_embedding_mix(model):
    tuned_encoder = type(model.text_encoder)(model.text_encoder.config).eval()

    def mixed(weighting, encoder=tuned_encoder):
        pair = embed_prompts(make_networks(model, encoder), PROMPTS, weighting)
        return [conditions["encoder_hidden_states"] for conditions in pair]

    pure = embed(model.tokenizer, tuned_encoder, PROMPTS)
    original, all_tuned = mixed(1.0)
    torch.testing.assert_close(original, embed(model.tokenizer, model.text_encoder, PROMPTS))
    assert torch.equal(all_tuned, pure) and not original.requires_grad
    torch.testing.assert_close(mixed(0.0)[1], original)
    torch.testing.assert_close(mixed(0.3)[1], 0.3 * pure + 0.7 * original)
    assert torch.equal(*mixed(1.0, model.text_encoder))


def test_noise_is_a_function_of_seed_and_index_alone():
    together = prompt_noise(7, range(5), (4, 8, 8))
    alone = [prompt_noise(7, [index], (4, 8, 8))[0] for index in (4, 2, 0)]
    assert torch.equal(together[[4, 2, 0]], torch.stack(alone))
    other_seed, far = prompt_noise(8, [0], (4, 8, 8)), prompt_noise(7, [2**32], (4, 8, 8))
    for other in (other_seed, far, together[1:2]):
        assert (other - together[0]).abs().max() > 1
    many = prompt_noise(0, range(100), (4, 8, 8))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02 and many.dtype == torch.float32


def test_an_image_does_not_depend_on_its_batch(model, noise):
    tokenizer, text_encoder, unet, vae, config = model
    scheduler = make_scheduler(config, T)

    def images(rows):
        pair = embed(tokenizer, text_encoder, [PROMPTS[row] for row in rows])
        with torch.no_grad():
            return decode(vae, sample_latents(unet, scheduler, noise[rows], pair, pair, 7.5, 2))

    torch.testing.assert_close(images([0, 1]), torch.cat([images([0]), images([1])]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("grad_steps", [1, 3, T])
def test_only_the_last_steps_carry_gradient(model, noise, grad_steps):
    tokenizer, text_encoder, unet, _, config = model
    pair = embed(tokenizer, text_encoder, PROMPTS)
    early, late = pair.clone().requires_grad_(), pair.clone().requires_grad_()
    evaluations = []
    hook = unet.register_forward_hook(lambda *_: evaluations.append(torch.is_grad_enabled()))
    sample_latents(unet, make_scheduler(config, T), noise, early, late, 7.5, grad_steps).sum().backward()
    hook.remove()
    assert early.grad is None
    assert late.grad[:2].abs().min(dim=-1).values.max() > 0 and late.grad[2:].abs().max() > 0  # both branches
    # T evaluations forward, and K again for the backward pass; none of the first T - K with gradient.
    assert len(evaluations) == T + grad_steps and evaluations[: T - grad_steps] == [False] * (T - grad_steps)


def kept_bytes(model, steps, grad_steps, checkpoint=True):
    """Bytes that autograd keeps from sampling and decoding two images, each storage counted once."""
    tokenizer, text_encoder, unet, vae, config = model
    pair = embed(tokenizer, text_encoder, PROMPTS).requires_grad_()
    noise = prompt_noise(0, [0, 1], (4, 8, 8))
    weights = {weight.untyped_storage().data_ptr() for part in (unet, vae) for weight in part.state_dict().values()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or its address would be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        z = sample_latents(unet, make_scheduler(config, steps), noise, pair, pair, 7.5, grad_steps, checkpoint)
        images = decode(vae, z, checkpoint)
    assert images.requires_grad
    return sum(size for size, _ in kept.values())


def test_memory_grows_neither_with_steps_nor_beyond_the_latents_with_grad_steps(model):
    latents = 2 * 4 * 8 * 8 * 4
    time_steps = 8 * 8  # eight more integers
    assert kept_bytes(model, 12, 2) - kept_bytes(model, 4, 2) == time_steps
    assert kept_bytes(model, 12, 8) - kept_bytes(model, 12, 2) == 6 * latents
    # What the same count finds without checkpointing.
    assert kept_bytes(model, 4, 3, checkpoint=False) - kept_bytes(model, 4, 2, checkpoint=False) > 50 * latents
