"""LoRAs: trained, written in two formats, and read in all that diffusers and kohya's scripts have written."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_train import command, same_weights, table, train, work  # noqa: F401

from textcraftor.errors import UserError
from textcraftor.lora import add_lora, load_lora, save_diffusers_lora, save_lora
from textcraftor.models import load_model
from textcraftor.weight_files import check_text_encoder, check_unet, load_text_encoder, load_unet, public_state

TEXT_LAYER = "text_model.encoder.layers.1.mlp.fc2"
UNET_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a red fox", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np")
    return made.images


def stock(folder):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@pytest.fixture
def networks(stable_diffusion):
    model = load_model(str(stable_diffusion))
    return {"text_encoder": model.text_encoder, "unet": model.unet}


LOAD = {"text_encoder": load_text_encoder, "unet": load_unet}


def randomise(network):
    """Give `up`, which starts at 0, some weights."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)


def test_both_formats_are_what_diffusers_adds_and_what_our_programs_add(stable_diffusion, networks, tmp_path):
    pipeline = stock(stable_diffusion)
    before = draw(pipeline)
    for part, network in networks.items():
        add_lora(network, part, rank=4, alpha=6, seed=0)
        assert {weight.dtype for weight in network.parameters() if weight.requires_grad} == {torch.float32}
        pipeline.register_modules(**{part: network})
    np.testing.assert_allclose(draw(pipeline), before, rtol=0, atol=1e-5)  # at first it changes nothing
    for network in networks.values():
        randomise(network)
    trained = draw(pipeline)
    assert np.abs(trained - before).max() > 0.02

    for save in (save_lora, save_diffusers_lora):
        theirs, ours = stock(stable_diffusion), stock(stable_diffusion)
        for part, network in networks.items():
            path = tmp_path / f"{part}_{save.__name__}.safetensors"
            save(network, part, path, {})
            theirs.load_lora_weights(path, adapter_name=part)
            (check_text_encoder if part == "text_encoder" else check_unet)(path)
            LOAD[part](getattr(ours, part), path)
        theirs.set_adapters([*networks])
        np.testing.assert_allclose(draw(theirs), trained, rtol=0, atol=1e-4)
        np.testing.assert_allclose(draw(ours), trained, rtol=0, atol=1e-4)


def test_every_format_means_the_same_change(networks, tmp_path):
    generator = torch.Generator().manual_seed(1)
    alpha, rank = 3.0, 2
    convolution = "down_blocks.0.resnets.0.conv1"
    for part, layer in (("text_encoder", TEXT_LAYER), ("unet", UNET_LAYER), ("unet", convolution)):
        shape = public_state(networks[part].state_dict())[f"{layer}.weight"].shape
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *([1, 1] if len(shape) == 4 else []), generator=generator)
        scaled = up * alpha / rank
        old = {
            TEXT_LAYER: f"text_encoder.{TEXT_LAYER}.lora_linear_layer",
            UNET_LAYER: f"unet.{UNET_LAYER.removesuffix('.to_out.0')}.processor.to_out_lora",
            convolution: f"unet.{convolution}.lora",
        }[layer]
        flat = {"text_encoder": "lora_te_", "unet": "lora_unet_"}[part] + layer.replace(".", "_")
        settings = {f"{part}.r": rank, f"{part}.lora_alpha": alpha, f"{part}.alpha_pattern": {}}
        files = {
            "kohya": ({f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": alpha}, {}),
            "kohya without alpha": ({f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": scaled}, {}),
            "diffusers": (
                {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up},
                {"lora_adapter_metadata": json.dumps(settings)},
            ),
            "diffusers before peft": ({f"{old}.down.weight": down, f"{old}.up.weight": scaled}, {}),
        }
        wanted = {name: value.double() for name, value in public_state(networks[part].state_dict()).items()}
        change = torch.einsum("or,r...->o...", up.flatten(1).double(), down.double()) * alpha / rank
        wanted[f"{layer}.weight"] = wanted[f"{layer}.weight"] + change
        for form, (tensors, metadata) in files.items():
            path = tmp_path / "lora.safetensors"
            save_file({name: torch.as_tensor(value) for name, value in tensors.items()}, path, metadata)
            fresh = copy.deepcopy(networks[part])
            LOAD[part](fresh, path)
            for name, value in public_state(fresh.state_dict()).items():
                torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-5, msg=f"{form}: {name}")


def test_a_run_trains_only_the_lora_and_goes_on_to_the_bit(work, command, stable_diffusion):  # noqa: F811
    both = [*command, "--lora_rank", 4, "--lora_alpha", 8, "--lr_unet", "1e-3", "--max_steps", 4, "--save_every", 2]
    train(*both, "--output-path", "whole")
    train(*both, "--output-path", "parts", "--max_steps", 2)
    train(*both, "--output-path", "parts", "--resume")
    for part in ("text", "unet"):
        name = f"tc_{part}_lora"
        assert same_weights(f"whole/{name}.safetensors", f"parts/{name}.safetensors")
        state = load_file(f"whole/{name}.safetensors")
        ups = [value for key, value in state.items() if "lora_up" in key]
        assert all(value.any() for value in ups) and {float(v) for k, v in state.items() if "alpha" in k} == {8.0}
        assert sum(value.numel() for value in state.values()) < 40_000
    assert not list(Path("whole").glob("tc_text.safetensors"))
    theirs = [stock(stable_diffusion) for _ in range(2)]
    for pipeline, suffix in zip(theirs, ("", "_diffusers"), strict=True):
        for part in ("text", "unet"):
            pipeline.load_lora_weights(f"whole/tc_{part}_lora{suffix}.safetensors", adapter_name=part)
        pipeline.set_adapters(["text", "unet"])
    np.testing.assert_allclose(draw(theirs[0]), draw(theirs[1]), rtol=0, atol=1e-5)
    totals = [float(row["total"]) for row in table("whole") if row["total"]]
    assert totals[-1] > totals[0]
    with pytest.raises(UserError, match="lora_rank"):
        train(*both, "--output-path", "parts", "--resume", "--max_steps", 6, "--lora_rank", 2)


def test_a_start_from_a_lora_is_a_start_from_its_sum(networks, tmp_path):
    encoder = copy.deepcopy(networks["text_encoder"])
    add_lora(encoder, "text_encoder", 2, 2, 0)
    randomise(encoder)
    save_lora(encoder, "text_encoder", tmp_path / "one.safetensors", {})
    other = copy.deepcopy(networks["text_encoder"])
    add_lora(other, "text_encoder", 2, 2, seed=5)
    load_lora(other, "text_encoder", tmp_path / "one.safetensors")
    tokens = torch.arange(14).view(2, 7)
    assert torch.equal(encoder(tokens).last_hidden_state, other(tokens).last_hidden_state)
    wrong = copy.deepcopy(networks["text_encoder"])
    add_lora(wrong, "text_encoder", 2, 4, 0)
    with pytest.raises(UserError, match="alpha"):
        load_lora(wrong, "text_encoder", tmp_path / "one.safetensors")


def test_loras_that_do_not_fit_are_one_line(networks, tmp_path):
    half = {"lora_te_text_model_encoder_layers_1_mlp_fc2.lora_down.weight": torch.ones(2, 64)}
    cases = {
        "of Stable Diffusion XL": {"lora_te1_text_model_encoder_layers_1_mlp_fc2.lora_down.weight": torch.ones(2, 64)},
        "does not change the text encoder; the test programs take it as --unet_path": {
            f"unet.{UNET_LAYER}.lora_A.weight": torch.ones(1, 1),
            f"unet.{UNET_LAYER}.lora_B.weight": torch.ones(1, 1),
        },
        "only one of the two halves": half,
        r"of text_model.encoder.layers.1.mlp.fc2 has the shapes \(32, 2\) and \(2, 5\)": {
            f"text_encoder.{TEXT_LAYER}.lora_A.weight": torch.ones(2, 5),
            f"text_encoder.{TEXT_LAYER}.lora_B.weight": torch.ones(32, 2),
        },
        "no such layer": {
            f"text_encoder.{TEXT_LAYER.replace('1', '7')}.lora_A.weight": torch.ones(2, 64),
            f"text_encoder.{TEXT_LAYER.replace('1', '7')}.lora_B.weight": torch.ones(32, 2),
        },
        "LoHa, LoKr or DoRA": {"lora_te_text_model_encoder_layers_1_mlp_fc2.hada_w1_a": torch.ones(2, 2)},
        "NaN": {
            f"text_encoder.{TEXT_LAYER}.lora_A.weight": torch.full((2, 64), torch.nan),
            f"text_encoder.{TEXT_LAYER}.lora_B.weight": torch.ones(32, 2),
        },
    }
    for number, (problem, tensors) in enumerate(cases.items()):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path)
        with pytest.raises(UserError, match=problem) as error:
            load_text_encoder(networks["text_encoder"], path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="--lora_rank 33: .* use at most 32"):
        add_lora(networks["text_encoder"], "text_encoder", 33, 33, 0)
