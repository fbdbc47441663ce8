"""The tuned text encoder in diffusers' own pipelines, as the README shows it."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
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


def test_batches_negative_prompts_and_other_pipelines(stable_diffusion, tuned_path):
    """Inpainting skips the first steps: two prompts with negative ones, the last three of four steps tuned."""
    pipeline, tuned = load_pipeline(str(stable_diffusion), "DDIM", 5, str(tuned_path))
    inpaint = StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    prompts, negative = ["a red fox", "snow"], ["blurred", ""]
    embeddings = encode_with(tuned, inpaint, prompts, negative)
    ids = pipeline.tokenizer(negative + prompts, padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(embeddings, tuned(ids).last_hidden_state)
    assert inpaint.text_encoder is pipeline.text_encoder
    half = copy.deepcopy(pipeline).to(torch.bfloat16)
    assert encode_with(tuned, half, prompts).dtype == torch.bfloat16

    seen = []
    inpaint.unet.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(options["encoder_hidden_states"]), with_kwargs=True
    )
    picture, mask = torch.zeros(2, 3, 64, 64), torch.ones(2, 1, 64, 64)
    inpaint(
        prompts, picture, mask, negative_prompt=negative, strength=0.8, height=64, width=64, num_inference_steps=5,
        callback_on_step_end=switch_embeddings(embeddings, 3),
    )  # fmt: skip
    assert [torch.equal(used, embeddings) for used in seen] == [False, True, True, True]
