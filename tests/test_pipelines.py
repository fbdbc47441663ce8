"""A tuned text encoder attached to diffusers' own pipelines, of SD v1 and SDXL, with tiny random networks."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoPipelineForText2Image,
    ControlNetModel,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from tiny import TEXT_CONFIG, seeded
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from textcraftor.benchmark.images import generate, load_pipeline
from textcraftor.errors import UserError
from textcraftor.pipelines import attach_encoder, detach_encoder
from textcraftor.weight_files import save_text_encoder

README = Path(__file__).parents[1] / "README.md"
T, K, SEED = 25, 15, 2023
KINDS = {
    "v1": (
        StableDiffusionPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionControlNetPipeline,
    ),
    "XL": (
        StableDiffusionXLPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLControlNetPipeline,
    ),
}
PROMPTS, NEGATIVE = ["a red fox", "snow"], ["blurred", "text"]


def changed(encoder, seed):
    """A text encoder that differs from `encoder` in every weight."""
    tuned, generator = copy.deepcopy(encoder), torch.Generator().manual_seed(seed)
    for weight in tuned.parameters():
        weight.data += weight.std() * torch.randn(weight.shape, generator=generator)
    return tuned


@pytest.fixture(scope="module")
def pipeline(stable_diffusion):
    return load_pipeline(str(stable_diffusion), "DDIM", 5)[0]


@pytest.fixture(scope="module")
def tuned(pipeline):
    return changed(pipeline.text_encoder, 0)


def build(kind, model, **replaced):
    """A pipeline of any class: SDXL's have a second text encoder and a UNet for both, ControlNet's a random one."""
    parts = {name: getattr(model, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    if "XL" in kind.__name__:
        xl = {"cross_attention_dim": 64, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        xl["projection_class_embeddings_input_dim"] = 6 * 8 + 32
        second = CLIPTextConfig(**TEXT_CONFIG)
        parts["unet"] = seeded(8, lambda: UNet2DConditionModel.from_config({**model.unet.config, **xl}).eval())
        parts["text_encoder_2"] = seeded(9, lambda: CLIPTextModelWithProjection(second).eval())
        parts |= {"tokenizer_2": model.tokenizer, "force_zeros_for_empty_prompt": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if "ControlNet" in kind.__name__:
        parts["controlnet"] = changed(seeded(10, lambda: ControlNetModel.from_unet(parts["unet"])).eval(), 1)
    pipeline = kind(**parts | replaced)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts=PROMPTS, **options):
    """Latents of 5 steps, always from the same noise; image to image and inpainting skip the first step."""
    name, options = type(pipeline).__name__, {"num_inference_steps": 5, "guidance_scale": 7.5} | options
    if re.search("Img2Img|Inpaint|ControlNet", name):
        options["image"] = torch.linspace(0, 1, 64).expand(len(prompts), 3, 64, 64)
    if re.search("Img2Img|Inpaint", name):
        options["strength"] = 0.8
    if "Inpaint" in name:
        options["mask_image"] = torch.ones(len(prompts), 1, 64, 64)
    return pipeline(prompts, generator=torch.Generator().manual_seed(0), output_type="latent", **options).images


def evaluations(pipeline, *networks, **options):
    """Draw -> the text embeddings of each evaluation of the networks, the UNet if none are named."""
    seen = []
    hooks = [
        network.register_forward_hook(lambda *call: seen.append(call[2]["encoder_hidden_states"]), with_kwargs=True)
        for network in networks or [pipeline.unet]
    ]
    draw(pipeline, **options)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", ["v1", "XL"])
def test_no_tuned_steps_all_and_some(family, pipeline, tuned):
    """To the bit: none are the stock pipeline, and all are the pipeline that holds the tuned encoder."""
    for kind in KINDS[family]:
        stock = build(kind, pipeline)
        holder = build(kind, pipeline, text_encoder=tuned)
        cases = [
            {"negative_prompt": NEGATIVE, "num_images_per_prompt": 2},
            {"guidance_scale": 1.0},
        ]  # fmt: skip
        cases += [{"guess_mode": True}] if "ControlNet" in kind.__name__ else []
        for options in cases:
            own, whole = draw(stock, **options), draw(holder, **options)
            results = {}
            for steps in (0, 2, 4, 99):
                attach_encoder(stock, tuned, steps)
                results[steps] = draw(stock, **options)
            skipped = "Img2Img" in kind.__name__ or "Inpaint" in kind.__name__
            assert torch.equal(results[0], own), (kind, options)
            assert torch.equal(results[99], whole), (kind, options)
            assert torch.equal(results[4], whole) == skipped, (kind, options)
            assert all((results[2] - other).abs().max() > 1e-4 for other in (own, whole)), (kind, options)
            detach_encoder(stock)


def test_the_second_encoder_of_sdxl_is_kept_and_runs_once(pipeline, tuned):
    """Figure 7: embeddings of the first encoder's last layer but one, beside the other's, whose pooled output stays."""
    stock = build(StableDiffusionXLPipeline, pipeline)
    runs, pooled = [], []
    stock.text_encoder_2.text_projection.register_forward_hook(lambda *call: runs.append(1))
    stock.unet.register_forward_hook(
        lambda *call: pooled.append(call[2]["added_cond_kwargs"]["text_embeds"]), with_kwargs=True
    )
    own = evaluations(stock)
    assert len(runs) == 2  # prompts, negative prompts
    attach_encoder(stock, [(tuned, 0.5), (changed(tuned, 2), 0.5)], 2)
    attach_encoder(stock, tuned, 2)
    used = evaluations(stock)
    assert len(runs) == 4 and "forward" not in vars(stock.text_encoder_2)
    ids = stock.tokenizer(["", "", *PROMPTS], padding="max_length", return_tensors="pt").input_ids
    expected = torch.cat([tuned(ids, output_hidden_states=True).hidden_states[-2], own[0][..., 32:]], -1)
    assert all(torch.equal(each, own[0]) for each in used[:3])
    for each in used[3:]:
        torch.testing.assert_close(each, expected)
    assert all(torch.equal(each, pooled[0]) for each in pooled)


def test_a_naive_loop_and_the_users_own_callback(pipeline, tuned):
    """DDIM by hand, three of five steps tuned; the callback turns guidance off for the last two and sees every step."""
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append((step, int(t)))
        if step != 2:
            return {}
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}

    ids = pipeline.tokenizer(["", *PROMPTS], padding="max_length", return_tensors="pt").input_ids
    rows = [encoder(ids).last_hidden_state[[0, 0, 1, 2]] for encoder in (pipeline.text_encoder, tuned)]
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(5)
    alphas = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps] + [float(scheduler.final_alpha_cumprod)]
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            embeddings = rows[step >= 2]
            uncond, cond = (
                pipeline.unet(z.float(), t, encoder_hidden_states=half).sample.double() for half in embeddings.chunk(2)
            )
            noise = uncond + 7.5 * (cond - uncond) if step <= 2 else cond
            clean = (z - (1 - alphas[step]) ** 0.5 * noise) / alphas[step] ** 0.5
            z = alphas[step + 1] ** 0.5 * clean + (1 - alphas[step + 1]) ** 0.5 * noise
    stock = build(StableDiffusionPipeline, pipeline)
    attach_encoder(stock, tuned, 3)
    found = draw(stock, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert (found - z).abs().max() < 2e-5 * z.abs().max()
    assert seen == [(step, int(t)) for step, t in enumerate(scheduler.timesteps)]


def test_steps_are_counted_not_evaluations(pipeline, tuned):
    """PNDM evaluates the UNet twice in the first step; Heun's method, of second order, in each step but the last."""
    for scheduler, counts in (
        (EulerDiscreteScheduler, (1, 1, 1, 1, 1)),
        (PNDMScheduler, (2, 1, 1, 1, 1)),
        (HeunDiscreteScheduler, (2, 2, 2, 2, 1)),
    ):
        own = scheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
        for kind in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline):
            stock = build(kind, pipeline, scheduler=own)
            steps = [step for step, count in enumerate(counts) for _ in range(count)]
            if kind is StableDiffusionImg2ImgPipeline:
                steps = steps[own.order :]  # strength 0.8; with PNDM, the second step is now the one of two evaluations
            for tuned_steps in (0, 1, 3, 5):
                attach_encoder(stock, tuned, tuned_steps)
                used = evaluations(stock)
                reference = stock.encode_prompt(PROMPTS, "cpu", 1, True)
                original = torch.cat(reference[::-1])
                expected = [step >= 5 - tuned_steps for step in steps]
                assert [not torch.equal(each, original) for each in used] == expected, (scheduler, kind, tuned_steps)


def test_encoders_are_mixed_and_take_the_pipelines_type(pipeline, tuned, tmp_path):
    """Weights outside [0, 1], a weight file beside an encoder in memory; a pipeline in bf16 keeps its type."""
    other = changed(pipeline.text_encoder, 3)
    save_text_encoder(other.state_dict(), tmp_path / "other.safetensors")
    stock = build(StableDiffusionPipeline, pipeline)
    attach_encoder(stock, [(tuned, 1.5), (tmp_path / "other.safetensors", -0.75)], 5)
    ids = pipeline.tokenizer(["", "", *PROMPTS], padding="max_length", return_tensors="pt").input_ids
    first, second, zero = (each(ids).last_hidden_state.double() for each in (tuned, other, pipeline.text_encoder))
    expected = 1.5 * first - 0.75 * second + 0.25 * zero
    torch.testing.assert_close(evaluations(stock)[0].double(), expected, rtol=1e-4, atol=1e-5)
    half = build(StableDiffusionPipeline, copy.deepcopy(pipeline).to(torch.bfloat16))
    attach_encoder(half, tuned, 2)
    used = evaluations(half)
    assert {each.dtype for each in used} == {torch.bfloat16}
    torch.testing.assert_close(used[-1], first.bfloat16())


def test_only_the_attached_pipeline_changes(pipeline, tuned):
    """Its networks serve other pipelines meanwhile, also after a call that failed; a copy is attached to itself."""
    stock = build(StableDiffusionPipeline, pipeline)
    other = build(StableDiffusionImg2ImgPipeline, pipeline)
    own, untouched = draw(stock), draw(other)
    attach_encoder(stock, tuned, 5)
    whole = draw(stock)
    twin = copy.deepcopy(stock)

    def stop(pipe, step, t, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(stock, callback_on_step_end=stop)
    assert torch.equal(draw(other), untouched) and torch.equal(draw(stock), whole)
    assert stock.text_encoder is pipeline.text_encoder
    again = AutoPipelineForText2Image.from_pipe(stock)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), own)
    detach_encoder(stock)
    detach_encoder(stock)
    assert torch.equal(draw(stock), own) and torch.equal(draw(twin), whole)


def test_an_offloaded_pipeline_takes_weights(pipeline, tuned, tmp_path):
    file = tmp_path / "tuned.safetensors"
    save_text_encoder(tuned.state_dict(), file)
    copies = {name: copy.deepcopy(getattr(pipeline, name)) for name in ("text_encoder", "unet", "vae")}
    stock = build(StableDiffusionPipeline, pipeline, **copies)
    attach_encoder(stock, str(file), K)
    expected = draw(stock)
    for network in copies.values():
        cpu_offload(network, torch.device("cpu"))  # as enable_sequential_cpu_offload does on a GPU
    assert next(stock.text_encoder.parameters()).is_meta
    attach_encoder(stock, str(file), K)
    np.testing.assert_array_equal(draw(stock), expected)


def test_mistakes_are_said_in_one_line(pipeline, tuned):
    stock = build(StableDiffusionPipeline, pipeline)
    wide = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG | {"hidden_size": 16}))
    small = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG | {"vocab_size": 49407}))
    refiner = build(StableDiffusionXLImg2ImgPipeline, pipeline, text_encoder=None)
    for target, encoder, steps, message in (
        (object(), tuned, 5, "expected a pipeline of diffusers"),
        (refiner, tuned, 5, "no first text encoder"),
        (stock, pipeline.unet, 5, "is a UNet2DConditionModel"),
        (stock, CLIPTextModelWithProjection(tuned.config), 5, "is a CLIPTextModelWithProjection"),
        (stock, wide, 5, "hidden size 16"),
        (stock, "absent.safetensors", 5, "no such weights|absent"),
        (stock, [], 5, "found nothing"),
        (stock, [tuned, (tuned, 0.5)], 5, "found CLIPTextModel, 0.5"),
        (stock, [(tuned, float("nan"))], 5, "finite weights; found nan"),
        (stock, (tuned, 0.5), 5, "is a tuple"),
        (stock, tuned, -1, "tuned_steps is -1"),
        (stock, tuned, 2.5, "tuned_steps is 2.5"),
    ):
        with pytest.raises(UserError, match=message) as error:
            attach_encoder(target, encoder, steps)
        assert "\n" not in str(error.value)
    attach_encoder(stock, tuned, 5)
    embeddings = torch.zeros(2, 77, 32)
    with pytest.raises(UserError, match="pass the prompt"):
        stock(prompt_embeds=embeddings, negative_prompt_embeds=embeddings)
    with pytest.raises(UserError, match="pass the prompt"):
        draw(stock, negative_prompt_embeds=embeddings)
    perturbed = build(StableDiffusionPAGPipeline, pipeline, unet=copy.deepcopy(pipeline.unet))
    attach_encoder(perturbed, tuned, 1)
    with pytest.raises(UserError, match="on 6 prompt embeddings; expected 2 or 4"):
        draw(perturbed, callback_on_step_end=lambda *step: pytest.fail("only after a step"))
    attach_encoder(stock, small, 5)
    with pytest.raises(UserError, match="textual inversion"):
        draw(stock)


def test_the_readmes_lines_make_the_benchmarks_image(stable_diffusion, pipeline, tuned, tmp_path, monkeypatch):
    """Run as they stand in the README, beside a model folder as download_models.py leaves it: no safety checker."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "diffusers" in block)
    (tmp_path / "output").mkdir()
    save_text_encoder(tuned.state_dict(), tmp_path / "output" / "tc_text.safetensors")
    monkeypatch.chdir(tmp_path)
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
    own, prompt = load_pipeline(str(stable_diffusion), "DDIM", T)[0], "a red fox in the snow"
    assert prompt in code

    def ours(tuned_steps):
        return generate(own, tuned, [prompt], [7], seed=SEED, grad_steps=tuned_steps, guidance=7.5)

    torch.testing.assert_close(image, ours(K), rtol=0, atol=2e-5)
    assert all((image - ours(other)).abs().max() > 5e-4 for other in (K - 1, K + 1, T))
    assert names["image"].size == (64, 64)
