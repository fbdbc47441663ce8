"""The figures' programs: what each picture shows, compared with diffusers called by hand."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from test_pipelines import build, changed

from figures import controlnet, image_to_image, inpainting, mix, sdxl
from textcraftor.benchmark.images import load_pipeline
from textcraftor.errors import UserError
from textcraftor.options import MINIATURE_MODEL
from textcraftor.pictures import GAP, MARGIN, SMALLEST
from textcraftor.pipelines import attach_encoder, detach_encoder
from textcraftor.weight_files import save_text_encoder


@pytest.fixture(scope="module")
def model(stable_diffusion):
    return load_pipeline(str(stable_diffusion), "DDIM", 25)[0]


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    """Files of two tuned text encoders."""
    paths = [tmp_path_factory.mktemp("tuned") / f"{name}.safetensors" for name in "ab"]
    for seed, path in enumerate(paths):
        save_text_encoder(changed(model.text_encoder, seed).state_dict(), path)
    return list(map(str, paths))


def panels(path, count, gap=GAP):
    """The first `count` pictures of a page with a title of one line, as enlarged there."""
    page = Image.open(path).convert("RGB")
    top, lefts = MARGIN + 24 + MARGIN, [MARGIN + number * (SMALLEST + gap) for number in range(count)]
    return [np.array(page.crop((left, top, left + SMALLEST, top + SMALLEST))) for left in lefts]


def by_hand(pipeline, tuned=None, **options):
    """The picture that a pipeline draws, as it is enlarged in a page."""
    attach_encoder(pipeline, tuned or pipeline.text_encoder, 15)
    generator = torch.Generator().manual_seed(7)
    picture = pipeline("a fox", num_inference_steps=25, generator=generator, **options).images[0]
    detach_encoder(pipeline)
    return picture


def same(found, pictures):
    """Whether panels show these pictures: much closer to them than they are to each other, all being different."""
    expected = [np.array(picture.resize((SMALLEST, SMALLEST), Image.LANCZOS)).astype(float) for picture in pictures]
    apart = min(np.abs(one - other).mean() for one, other in itertools.combinations(expected, 2))
    distances = [np.abs(one - other).mean() for one, other in zip(found, expected, strict=True)]
    return 5 * max(distances) < apart


def test_image_to_image_inpainting_and_mix(stable_diffusion, model, weights, tmp_path):
    page, drawn = tmp_path / "x.png", by_hand(model)
    common = ["--model", str(stable_diffusion), "--prompt", "a fox", "--seed", "7", "-o", str(page)]
    tuned = ["--text_path", weights[0]]

    image_to_image.main([*common, *tuned, "--strength", "0.6"])
    pipeline, inputs = build(StableDiffusionImg2ImgPipeline, model), {"image": drawn, "strength": 0.6}
    pictures = [by_hand(pipeline, encoder, **inputs) for encoder in (None, weights[0])]
    assert same(panels(page, 3), [drawn, *pictures])

    red, right = Image.new("RGB", (64, 64), (200, 40, 40)), Image.new("L", (64, 64))
    right.paste(255, (32, 0, 64, 64))
    red.resize((128, 192)).save(tmp_path / "red.png")
    right.save(tmp_path / "right.png")
    inpainting.main([*common, *tuned, "--image", str(tmp_path / "red.png"), "--mask", str(tmp_path / "right.png")])
    pipeline, inputs = build(StableDiffusionInpaintPipeline, model), {"image": red, "mask_image": right}
    pictures = [by_hand(pipeline, encoder, **inputs, strength=1.0) for encoder in (None, weights[0])]
    red.paste("gray", (32, 0, 64, 64))
    assert same(panels(page, 3), [red, *pictures])

    mix.main([*common, *tuned])
    pictures = [by_hand(model, [(weights[0], weight)]) for weight in (0.25, 0.5, 0.75, 1.0)]
    assert same(panels(page, 5, MARGIN), [drawn, *pictures])
    mix.main([*common, *tuned, "--text_path", weights[1]])
    pairs = [list(zip(weights, shares, strict=True)) for shares in ((0.45, 0.45), (0.7, 0.2), (0.2, 0.7))]
    assert same(panels(page, 4, MARGIN), [drawn, *(by_hand(model, pair) for pair in pairs)])
    assert np.array(mix.weights_of(3)[1:]) == pytest.approx(np.vstack([[0.3] * 3, np.eye(3) * 0.6 + 0.1]))


def test_controlnet_sdxl_and_mistakes(stable_diffusion, model, weights, tmp_path):
    """Random networks in folders as diffusers writes them."""
    page = tmp_path / "x.png"
    common = ["--prompt", "a fox", "--seed", "7", "-o", str(page), "--text_path", weights[0]]
    pipeline = build(StableDiffusionControlNetPipeline, model)
    network = pipeline.controlnet
    network.save_pretrained(tmp_path / "canny")
    half = Image.new("L", (64, 64))
    half.paste(80, (32, 0, 64, 64))
    half.save(tmp_path / "half.png")
    inputs = ["--model", str(stable_diffusion), "--image", str(tmp_path / "half.png")]
    controlnet.main([*common, *inputs, "--controlnet", str(tmp_path / "canny")])
    edges = Image.new("RGB", (64, 64))
    edges.paste("white", (31, 0, 33, 64))  # as wide as the change between two pixels
    pictures = [by_hand(pipeline, encoder, image=edges) for encoder in (None, weights[0])]
    assert same(panels(page, 3), [edges, *pictures])

    pipeline = build(StableDiffusionXLPipeline, model)
    pipeline.save_pretrained(tmp_path / "xl")
    sdxl.main([*common, "--model", str(tmp_path / "xl")])
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    assert same(panels(page, 2), [by_hand(pipeline, encoder, guidance_scale=7.5) for encoder in (None, weights[0])])

    config = {**network.config, "cross_attention_dim": 16}
    ControlNetModel.from_config(config).save_pretrained(tmp_path / "narrow")
    (tmp_path / "no.png").write_text("no picture")
    for program, options, message in (
        (sdxl, ["--model", str(stable_diffusion)], "is StableDiffusionPipeline; expected SDXL"),
        (sdxl, ["--model", str(tmp_path / "absent")], "no SDXL folder"),
        (controlnet, [*inputs, "--controlnet", str(tmp_path / "absent")], "--controlnet .*absent: cannot be loaded"),
        (controlnet, [*inputs, "--controlnet", str(tmp_path / "narrow")], "width 16"),
        (image_to_image, [*inputs, "--strength", "1.2"], "between"),
        (image_to_image, [*inputs, "--strength", "0.01"], "a single step of"),
        (image_to_image, [*inputs[:2], "--image", str(tmp_path / "no.png")], "--image .*no.png: cannot be read"),
        (inpainting, [*inputs, "--mask", str(tmp_path / "absent.png")], "--mask .*absent.png: cannot be read"),
        (inpainting, [*inputs, "--text_path", str(tmp_path / "absent.pt")], "no such weights"),
    ):
        with pytest.raises(UserError, match=message) as error:
            program.main([*common, *options])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--text_path is missing"):
        mix.main(inputs[:2])


def test_inpainting_with_the_miniature_keeps_what_is_not_masked(tmp_path):
    page = tmp_path / "x.png"
    encoder = f"{MINIATURE_MODEL}/text_encoder"
    inpainting.main(["--model", "miniature", "--text_path", encoder, "--prompt", "a big fox, clean", "-o", str(page)])
    shown, original, tuned = (panel.astype(float) for panel in panels(page, 3))
    inside, edge = slice(SMALLEST // 4 + 9, -SMALLEST // 4 - 9), SMALLEST // 4 - 9  # away from the mask's edge
    # Of 255 grey levels: the autoencoder's error of a picture without flaws.
    assert np.abs(original - shown)[:edge].mean() < 8
    assert np.abs(original - shown)[inside, inside].mean() > 15  # grey there
    assert (original == tuned).all()  # the encoder is the model's own
