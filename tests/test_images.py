"""Generated images against stock diffusers pipelines, whatever the batch and the threads."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from textcraftor.benchmark.images import generate, load_pipeline
from textcraftor.errors import UserError
from textcraftor.models import load_model
from textcraftor.options import SCHEDULERS
from textcraftor.sampling import prompt_noise
from textcraftor.weight_files import check_text_encoder, load_text_encoder, save_text_encoder, save_unet

PROMPTS = ["a red fox", "two apples on a table", "snow"]
INDICES = [0, 7, 3]
T = 5


@pytest.fixture(scope="module")
def tuned_path(stable_diffusion, tmp_path_factory):
    """A text encoder that differs from the model's own."""
    encoder = load_model(str(stable_diffusion))[1]
    generator = torch.Generator().manual_seed(0)
    for weight in encoder.parameters():
        weight.data += weight.std() * torch.randn(weight.shape, generator=generator)
    path = tmp_path_factory.mktemp("tuned") / "tc_text.safetensors"
    save_text_encoder(encoder.state_dict(), path)
    return path


def load(stable_diffusion, tuned_path, scheduler="DDIM"):
    return load_pipeline(str(stable_diffusion), scheduler, T, str(tuned_path))


def make(pipeline, tuned, rows=(0, 1, 2), grad_steps=2, guidance=7.5, weighting=1.0):
    prompts, indices = [PROMPTS[row] for row in rows], [INDICES[row] for row in rows]
    how = {"seed": 2023, "grad_steps": grad_steps, "guidance": guidance, "weighting": weighting}
    return generate(pipeline, tuned, prompts, indices, **how)


def test_images_are_those_of_stock_pipelines(stable_diffusion, tuned_path):
    """With one text encoder in all steps, for every sampler; with DDIM also when the embeddings are switched midway."""
    noise = prompt_noise(2023, INDICES, (4, 8, 8))

    def stock(pipeline, **how):
        pipeline.set_progress_bar_config(disable=True)
        # The noise of ancestral samplers: one documented seed per prompt.
        seeds = [int(np.random.SeedSequence([2023, index]).generate_state(1)[0]) for index in INDICES]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        how |= {"latents": noise, "num_inference_steps": T, "output_type": "pt", "generator": generators}
        return pipeline(PROMPTS, **how).images

    for scheduler in SCHEDULERS:
        pipeline, tuned = load(stable_diffusion, tuned_path, scheduler)
        for grad_steps, encoder in ((0, pipeline.text_encoder), (T, tuned)):
            images = make(pipeline, tuned, grad_steps=grad_steps)
            own = {"text_encoder": encoder, "scheduler": copy.deepcopy(pipeline.scheduler)}  # it counts its steps
            expected = stock(StableDiffusionPipeline(**pipeline.components | own, requires_safety_checker=False))
            torch.testing.assert_close(images, expected, rtol=0, atol=1e-5, msg=scheduler)
            assert images.std() > 0.05

    pipeline, tuned = load(stable_diffusion, tuned_path)
    with torch.no_grad():
        first, late = (tiny.embed(pipeline.tokenizer, encoder, PROMPTS) for encoder in (pipeline.text_encoder, tuned))
    for grad_steps, guidance, weighting in (2, 7.5, 1.0), (3, 6.0, 0.4):
        mixed = weighting * late + (1 - weighting) * first

        def switch(pipeline, step, t, tensors, grad_steps=grad_steps, mixed=mixed):
            return {"prompt_embeds": mixed} if step == T - grad_steps - 1 else {}

        expected = stock(pipeline, guidance_scale=guidance, callback_on_step_end=switch)
        images = make(pipeline, tuned, grad_steps=grad_steps, guidance=guidance, weighting=weighting)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
        without = make(pipeline, tuned, grad_steps=0, guidance=guidance)
        assert (images - without).abs().max() > 1e-3  # a hundred times as much


def evaluations(pipeline, call):
    """The time step and the text embeddings of each evaluation of the UNet in call()."""
    seen = []

    def note(module, arguments, options):
        seen.append((float(arguments[1]), options["encoder_hidden_states"].clone()))

    hook = pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    call()
    hook.remove()
    return seen


def test_steps_are_counted_not_evaluations(stable_diffusion, tuned_path):
    """Some samplers evaluate the UNet twice in some steps."""
    evaluated = {name: [1] * T for name in SCHEDULERS}
    evaluated |= {"PNDM": [2] + [1] * (T - 1), "Heun": [2] * (T - 1) + [1]}
    for scheduler, counts in evaluated.items():
        pipeline, tuned = load(stable_diffusion, tuned_path, "Euler" if scheduler == "Heun" else scheduler)
        if scheduler == "Heun":
            pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
            pipeline.scheduler.set_timesteps(T)
        for grad_steps in 1, 3:
            seen = evaluations(pipeline, partial(make, pipeline, tuned, rows=[0], grad_steps=grad_steps))
            is_tuned = [not torch.equal(embeddings, seen[0][1]) for _, embeddings in seen]
            expected = [step >= T - grad_steps for step, count in enumerate(counts) for _ in range(count)]
            assert is_tuned == expected, scheduler


def test_an_image_depends_neither_on_its_batch_nor_on_threads(stable_diffusion, tuned_path):
    """EulerAncestral draws noise in every step; UniPC and PNDM keep what they saw in earlier steps."""
    batches = [(0, 1, 2), (2,), (1, 0), (0, 2), (1,), (2, 1)]
    for scheduler in "DDIM", "EulerAncestral", "PNDM", "UniPC":
        pipeline, tuned = load(stable_diffusion, tuned_path, scheduler)
        found = {}
        for threads in 1, 3:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                found[threads] = list(pool.map(partial(make, pipeline, tuned), batches))
        together, *others = found[1]
        for rows, images in zip(batches[1:], others, strict=True):
            torch.testing.assert_close(images, together[list(rows)], rtol=0, atol=2e-5, msg=scheduler)
        assert (together[0] - together[1]).abs().max() > 0.1
        assert all(map(torch.equal, found[1], found[3])), scheduler


def test_tuned_weights_come_in_every_form(stable_diffusion, tuned_path, tmp_path):
    tokenizer, original, unet, *_ = load_model(str(stable_diffusion))
    tuned = copy.deepcopy(original)
    load_text_encoder(tuned, tuned_path)
    tuned.save_pretrained(tmp_path / "transformers")
    tuned.save_pretrained(tmp_path / "diffusers" / "text_encoder")
    state = {f"module.text_model.{key.removeprefix('text_model.')}": value for key, value in tuned.state_dict().items()}
    torch.save(state, tmp_path / "paper.pth")
    for path in (tuned_path, tmp_path / "paper.pth", tmp_path / "transformers", tmp_path / "diffusers"):
        encoder = copy.deepcopy(original)
        load_text_encoder(encoder, str(path))
        for name, weight in encoder.state_dict().items():
            assert torch.equal(weight, tuned.state_dict()[name]), (path, name)

    for weight in unet.parameters():
        weight.data *= 1.1
    save_unet(unet.state_dict(), tmp_path / "tc_unet.safetensors")
    unet.save_pretrained(tmp_path / "model" / "unet")
    for path in (tmp_path / "tc_unet.safetensors", tmp_path / "model", tmp_path / "model" / "unet"):
        pipeline, encoder = load_pipeline(str(stable_diffusion), "DDIM", T, unet_path=str(path))
        assert encoder is pipeline.text_encoder
        assert torch.equal(pipeline.unet.conv_in.weight, unet.conv_in.weight)


def test_tuned_weights_that_do_not_fit_are_refused(stable_diffusion, tuned_path, tmp_path):
    with pytest.raises(UserError, match="no UNet in it"):
        load_pipeline(str(stable_diffusion), "DDIM", T, unet_path=str(tuned_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: "):
        load_pipeline(str(stable_diffusion), "DDIM", T, text_path=str(tmp_path / "empty"))
    lacking = copy.deepcopy(load_model(str(stable_diffusion))[1])
    lacking.save_pretrained(tmp_path / "lacking")
    state = load_file(tmp_path / "lacking" / "model.safetensors")
    name = sorted(name for name in state if "layers.0.mlp.fc1.weight" in name)[0]
    del state[name]
    save_file(state, tmp_path / "lacking" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacking: .*layers\.0\.mlp\.fc1\.weight"):
        load_pipeline(str(stable_diffusion), "DDIM", T, text_path=str(tmp_path / "lacking"))
    for path in ("checkpoints/none.pth", "./none", "/none", "a/b/c"):
        with pytest.raises(UserError, match="no such weights"):
            check_text_encoder(path)
    check_text_encoder("somebody/model")
