"""Several tuned text encoders: their specifications, their embeddings mixed, their weights merged."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merge
from textcraftor.errors import UserError
from textcraftor.mixing import Weighted, mix, parse_weighted
from textcraftor.models import latent_shape, load_model, make_networks
from textcraftor.sampling import decode, make_images, make_scheduler, prompt_noise
from textcraftor.weight_files import load_text_encoder, read_text_encoder


def test_a_specification_is_a_path_and_a_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for existing in ("lr=1e-6", "seed=3", "C:", "a=b.safetensors"):
        Path(existing).mkdir()
    for spec, path, weight in (
        ("a.safetensors=0.6", "a.safetensors", 0.6),
        ("a.safetensors", "a.safetensors", 1),
        ("a.safetensors=-0.5", "a.safetensors", -0.5),
        ("user/encoder=1.5", "user/encoder", 1.5),  # a hub id
        ("user/encoder", "user/encoder", 1),
        ("C:/runs/tc_text.safetensors=1e-1", "C:/runs/tc_text.safetensors", 0.1),
        ("seed=3", "seed=3", 1),  # exists under the whole name
        ("seed=4", "seed", 4),
        ("seed=3=0.25", "seed=3", 0.25),
        ("lr=1e-6/tc_text.safetensors=.5", "lr=1e-6/tc_text.safetensors", 0.5),
        ("lr=1e-6/tc_text.safetensors", "lr=1e-6/tc_text.safetensors", 1),
        ("a=b.safetensors", "a=b.safetensors", 1),
        ("no=such.safetensors", "no=such.safetensors", 1),  # reported as missing later
    ):
        assert parse_weighted(spec) == Weighted(path, weight), spec
    for spec in ("", "=0.5", "a.safetensors=", "a.safetensors=half", "a.safetensors=nan", "a.safetensors=inf", "a=0,5"):
        with pytest.raises(UserError, match="expected") as refused:
            parse_weighted(spec)
        assert "\n" not in str(refused.value)


def test_embeddings_are_mixed_as_the_paper_says():
    generator = torch.Generator().manual_seed(0)
    original, *tuned = (
        {"encoder_hidden_states": torch.randn(4, 77, 8, generator=generator), "pooled": torch.randn(4, 8)}
        for _ in range(4)
    )
    for weights in ((0.6, 0.3, 0.1), (0.6, 0.3, 0.0), (1.5, -0.7, 0.4), (0.2, 0.2, 0.2), (-1.0, 0.0, 3.0)):
        mixed = mix(original, list(zip(tuned, weights, strict=True)))
        for name, value in mixed.items():
            terms = [weight * state[name].double().numpy() for state, weight in zip(tuned, weights, strict=True)]
            expected = np.sum(terms, axis=0) + (1 - np.sum(weights)) * original[name].double().numpy()
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    one = {name: value.bfloat16() for name, value in tuned[0].items()}
    whole, none, half = (mix(original, [(one, weight)]) for weight in (1, 0, 0.5))
    for name, value in one.items():
        assert torch.equal(whole[name], value) and torch.equal(none[name], original[name].bfloat16())
        assert half[name].dtype == torch.bfloat16  # computed in fp32, rounded once
        assert torch.equal(half[name], ((original[name] + value.float()) / 2).bfloat16())
    # Gradient reaches each encoder by its weight.
    trained = {"encoder_hidden_states": torch.zeros(2, 3, requires_grad=True)}
    rest = {"encoder_hidden_states": torch.ones(2, 3)}
    mix(rest, [(trained, 0.25), (rest, 0.5)])["encoder_hidden_states"].sum().backward()
    assert torch.equal(trained["encoder_hidden_states"].grad, torch.full((2, 3), 0.25))


@pytest.fixture
def encoders(stable_diffusion, tmp_path):
    """Two tuned encoders of the tiny model, one under each kind of names, and the original: (paths, state dicts)."""
    original, generator, paths = read_text_encoder(stable_diffusion, ""), torch.Generator().manual_seed(1), []
    for name, prefix in (("a", "text_model."), ("b=2", "module.text_model.")):
        tuned = {key: value + 0.02 * torch.randn(value.shape, generator=generator) for key, value in original.items()}
        paths.append(tmp_path / f"{name}.safetensors")
        save_file({key.replace("text_model.", prefix, 1): value for key, value in tuned.items()}, paths[-1])
    return paths, [read_text_encoder(path, "") for path in paths], original


def test_merged_weights_are_the_sum_and_say_what_they_are(encoders, stable_diffusion, tmp_path, capsys):
    (a, b), states, original = encoders
    output = tmp_path / "new" / "c.safetensors"
    merge.main([f"{a}=0.6", f"{b}=0.3", "-o", str(output), "--base", str(stable_diffusion)])
    assert f"{output} = 0.6 * {a} + 0.3 * {b} + 0.1 * {stable_diffusion}" in capsys.readouterr().out
    merged = load_file(output)
    assert merged.keys() == original.keys()
    for name, value in merged.items():
        one, two, none = (state[name].double().numpy() for state in (*states, original))
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value, 0.6 * one + 0.3 * two + 0.1 * none, rtol=0, atol=1e-6)
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    parts = json.loads(metadata["merged"])
    assert metadata["format"] == "pt" and [part["path"] for part in parts] == [str(a), str(b), str(stable_diffusion)]
    assert [round(part["weight"], 6) for part in parts] == [0.6, 0.3, 0.1] and len(parts[0]["sha256"]) == 64

    # Where the weights add up to 1, the base is not read.
    merge.main([f"{a}=1.4", f"{b}=-0.4", "-o", str(tmp_path / "d.safetensors"), "--base", str(tmp_path / "none")])
    one, two = (state["text_model.final_layer_norm.weight"].double().numpy() for state in states)
    merged = load_file(tmp_path / "d.safetensors")["text_model.final_layer_norm.weight"]
    np.testing.assert_allclose(merged, 1.4 * one - 0.4 * two, rtol=0, atol=1e-6)


def test_what_cannot_be_merged_is_one_clear_line(encoders, stable_diffusion, tmp_path):
    (a, _), (state, _), _ = encoders
    norm = "text_model.final_layer_norm.weight"
    deeper = {name.replace("layers.1.", "layers.2."): value + 0 for name, value in state.items() if "layers.1." in name}
    wide = {name: torch.zeros([48 if size == 32 else size for size in value.shape]) for name, value in state.items()}
    files = {
        "missing": {name: value for name, value in state.items() if not name.endswith("fc2.bias")},
        "deeper": state | deeper,
        "wide": wide,
        "short": state | {"text_model.embeddings.position_embedding.weight": torch.zeros(64, 32)},
        "nan": state | {norm: torch.full((32,), torch.nan)},
        "big": state | {norm: torch.full((32,), 3e38)},
        "lora": {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 32)},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "file").write_text("")
    output, base = tmp_path / "out.safetensors", ["--base", str(stable_diffusion)]
    for specs, target, message in (
        ("missing=0.5", output, "missing: text_model.encoder.layers.0.mlp.fc2.bias"),
        ("deeper=0.5", output, "unexpected: text_model.encoder.layers.2"),
        ("wide=0.5", output, "hidden size 48"),
        ("short=0.5", output, r"position_embedding.weight \(64, 32\), not \(77, 32\)"),
        ("nan=0.5", output, "final_layer_norm.weight holds NaN"),
        ("big=3", output, f"out.safetensors: .*{norm} holds NaN or infinity"),
        ("lora=0.5", output, "only one of the two halves"),
        ("none=0.5", output, "none.safetensors: no such weights"),
        ("big=x", output, "x is not a weight"),
        ("big=1", tmp_path / "lora.safetensors", "exists already"),
        ("big=1", tmp_path / "out.pth", "ends in .safetensors"),
        ("big=1", tmp_path / "file" / "out.safetensors", "is a file; choose a folder"),
    ):
        name, _, weight = specs.partition("=")
        argv = [f"{a}=0.3", f"{tmp_path / name}.safetensors={weight}", *base, "-o", str(target)]
        with pytest.raises(UserError, match=message) as refused:
            merge.main(argv)
        assert "\n" not in str(refused.value)
    assert not output.exists()
    with pytest.raises(UserError, match="whole.safetensors: is a LoRA; expected the whole model"):
        lora = {
            f"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{name}.weight": torch.zeros(shape)
            for name, shape in (("down", (4, 32)), ("up", (64, 4)))
        }
        save_file(lora, tmp_path / "whole.safetensors")
        merge.main([f"{a}=0.3", "-o", str(output), "--base", str(tmp_path / "whole.safetensors")])
    with pytest.raises(UserError, match="no-model: no such weights"):
        merge.main([f"{a}=0.3", "-o", str(output), "--base", "./no-model"])
    with pytest.raises(UserError, match="-o is missing"):
        merge.main([f"{a}=0.3"])


def test_images_are_made_with_several_encoders(encoders, stable_diffusion):
    paths, _, _ = encoders
    model, weights, weighting = load_model(str(stable_diffusion)), (0.6, 0.9), 0.5
    tuned = [copy.deepcopy(model.text_encoder) for _ in paths]
    for encoder, path in zip(tuned, paths, strict=True):
        load_text_encoder(encoder, path)
    mixed = [Weighted(encoder, weight) for encoder, weight in zip(tuned, weights, strict=True)]
    prompts, scheduler = ["a red fox", "fox " * 90], make_scheduler(model.scheduler_config, 4)
    noise = prompt_noise(0, range(2), latent_shape(model))

    def draw(text_encoder, weighting=1.0, tuned_steps=2):
        networks = make_networks(model, text_encoder)
        how = {"tuned_steps": tuned_steps, "guidance": 7.5, "weighting": weighting}
        return make_images(networks, scheduler, prompts, noise, **how)

    with torch.no_grad():
        original, *others = (tiny.embed(model.tokenizer, encoder, prompts) for encoder in (model.text_encoder, *tuned))
        # --prompt_weighting multiplies all weights: 0.3 and 0.45, so a quarter of the original is left.
        wanted = 0.3 * others[0].double() + 0.45 * others[1].double() + 0.25 * original.double()
        z = tiny.sample_latents(model.unet, scheduler, noise, original, wanted.float(), 7.5, 2)
        torch.testing.assert_close(draw(mixed, weighting), decode(model.vae, z), rtol=0, atol=1e-4)
        assert (draw(mixed, weighting) - draw(mixed)).abs().max() > 1e-3
        assert torch.equal(draw([Weighted(tuned[0])]), draw(tuned[0]))
        assert torch.equal(draw(mixed, tuned_steps=0), draw(None))
