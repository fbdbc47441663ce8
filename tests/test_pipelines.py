"""The tuned text encoder in diffusers' own pipelines, as the README shows it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.image_processor import VaeImageProcessor

from textcraftor.benchmark.images import generate, load_pipeline
from textcraftor.models import load_model
from textcraftor.pipelines import encode_with, switch_embeddings
from textcraftor.weight_files import save_text_encoder

README = Path(__file__).parents[1] / "README.md"
T, K, SEED = 25, 15, 2023


@pytest.fixture(scope="module")
def tuned_path(stable_diffusion, tmp_path_factory):
    """A text encoder that differs from the model's own, where training leaves it."""
    encoder = load_model(str(stable_diffusion)).text_encoder
    generator = torch.Generator().manual_seed(0)
    for weight in encoder.parameters():
        weight.data += weight.std() * torch.randn(weight.shape, generator=generator)
    path = tmp_path_factory.mktemp("user") / "output" / "tc_text.safetensors"
    path.parent.mkdir()
    save_text_encoder(encoder.state_dict(), path)
    return path


def test_the_readmes_lines_make_the_benchmarks_image(stable_diffusion, tuned_path, monkeypatch):
    """Run as they stand in the README, beside a model folder as download_models.py leaves it: no safety checker."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "diffusers" in block)
    monkeypatch.chdir(tuned_path.parents[1])
    shutil.copytree(stable_diffusion, "stable-diffusion-v1-5")
    index = Path("stable-diffusion-v1-5/model_index.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }))  # fmt: skip

    noise = torch.from_numpy(np.random.default_rng([SEED, 7]).standard_normal((1, 4, 8, 8), dtype=np.float32))
    monkeypatch.setattr(StableDiffusionPipeline, "prepare_latents", lambda *arguments: noise.clone())
    decoded = []
    postprocess = VaeImageProcessor.postprocess

    def keep(processor, image, **options):
        decoded.append(image)
        return postprocess(processor, image, **options)

    monkeypatch.setattr(VaeImageProcessor, "postprocess", keep)
    names = {}
    exec(code, names)
    image = (decoded[0] / 2 + 0.5).clamp(0, 1)

    def ours(tuned_steps):
        pipeline, tuned = load_pipeline(str(stable_diffusion), "DDIM", T, str(tuned_path))
        return generate(pipeline, tuned, [names["prompt"]], [7], seed=SEED, grad_steps=tuned_steps, guidance=7.5)

    torch.testing.assert_close(image, ours(K), rtol=0, atol=2e-5)
    assert all((image - ours(other)).abs().max() > 5e-4 for other in (K - 1, K + 1, T))
    assert names["image"].size == (64, 64)


def embeddings_used(pipeline, *arguments, **options):
    """The text embeddings of each evaluation of the UNet when the pipeline is called."""
    seen = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda module, positional, named: seen.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline(*arguments, output_type="latent", **options)
    hook.remove()
    return seen


def test_batches_negative_prompts_and_other_pipelines(stable_diffusion, tuned_path):
    """Image to image and inpainting skip the first steps; the last three of the four left are tuned."""
    own, tuned = load_pipeline(str(stable_diffusion), "DDIM", 5, str(tuned_path))
    prompts, negative = ["a red fox", "snow"], ["blurred", ""]
    picture, mask = torch.zeros(2, 3, 64, 64), torch.ones(2, 1, 64, 64)
    ids = own.tokenizer(negative + prompts, padding="max_length", return_tensors="pt").input_ids
    expected = tuned(ids).last_hidden_state
    for kind, inputs in (
        (StableDiffusionImg2ImgPipeline, (picture,)),
        (StableDiffusionInpaintPipeline, (picture, mask)),
    ):
        pipeline = kind(**own.components, requires_safety_checker=False)
        embeddings = encode_with(tuned, pipeline, prompts, negative)
        torch.testing.assert_close(embeddings, expected)
        assert pipeline.text_encoder is own.text_encoder
        used = embeddings_used(
            pipeline, prompts, *inputs, negative_prompt=negative, strength=0.8, num_inference_steps=5,
            callback_on_step_end=switch_embeddings(embeddings, 3),
        )  # fmt: skip
        assert [torch.equal(each, embeddings) for each in used] == [False, True, True, True], kind
    assert encode_with(tuned, own.to(torch.bfloat16), prompts).dtype == torch.bfloat16


def test_steps_are_counted_not_evaluations(stable_diffusion, tuned_path):
    """PNDM evaluates the UNet twice in the first step; Heun's method, of second order, in each step but the last."""
    own, tuned = load_pipeline(str(stable_diffusion), "DDIM", 5, str(tuned_path))
    pipeline = StableDiffusionPipeline(**own.components, requires_safety_checker=False)
    embeddings = encode_with(tuned, pipeline, "a red fox")
    for scheduler, evaluations in (
        (EulerDiscreteScheduler, (1, 1, 1, 1, 1)),
        (PNDMScheduler, (2, 1, 1, 1, 1)),
        (HeunDiscreteScheduler, (2, 2, 2, 2, 1)),
    ):
        pipeline.scheduler = scheduler.from_config(own.scheduler.config, skip_prk_steps=True)
        for tuned_steps in (1, 3):
            callback = switch_embeddings(embeddings, tuned_steps)
            used = embeddings_used(pipeline, "a red fox", num_inference_steps=5, callback_on_step_end=callback)
            expected = [step >= 5 - tuned_steps for step, count in enumerate(evaluations) for _ in range(count)]
            assert [torch.equal(each, embeddings) for each in used] == expected, (scheduler, tuned_steps)
