"""--tune_unconditional off: the empty prompt keeps the original embedding, in training, tests and pipelines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from test_train import command, train, work  # noqa: F401

import export
import merge
from figures import mix
from textcraftor.benchmark.images import generate, load_pipeline
from textcraftor.benchmark.options import parse_options as parse_test_options
from textcraftor.benchmark.prompt_lists import PARTI
from textcraftor.errors import UserError
from textcraftor.pipelines import attach_encoder
from textcraftor.recorded import ENCODERS, record, recorded_settings, tunes_unconditional
from textcraftor.training_options import parse_options
from textcraftor.weight_files import read_text_encoder, save_text_encoder


@pytest.fixture
def files(stable_diffusion, tmp_path):
    """A tuned encoder trained with the empty prompt, without it, and with a --prompt_weighting of a half."""
    state, generator = read_text_encoder(stable_diffusion, ""), torch.Generator().manual_seed(1)
    state = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    found = {}
    for how, own in {
        "on": {"tune_unconditional": "on"}, "off": {"tune_unconditional": "off"}, "half": {"prompt_weighting": 0.5},
    }.items():  # fmt: skip
        found[how] = str(tmp_path / f"{how}.safetensors")
        settings = {"step": 10, "grad_steps": 6, "guidance": 3.0} | own
        save_text_encoder(state, found[how], record(settings))
    return found


def test_a_run_says_how_it_sampled_and_later_programs_follow(work, command):  # noqa: F811
    run = [*command, "--max_steps", 1, "--gradient", "drtune", "--driven", 3, "--grad_steps", 1, "--guidance", 4]
    train(*run, "--tune_unconditional", "off", "--lora_rank", 2)
    train(*run, "--tune_unconditional", "off", "--output-path", "full")
    for path in ("output/tc_text_lora.safetensors", "full/tc_text.safetensors", "full/tc_text_best.safetensors"):
        wanted = {"step": 3, "grad_steps": 3, "guidance": 4.0, "tune_unconditional": "off", "gradient": "drtune"}
        assert wanted.items() <= recorded_settings(path).items()
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["textcraftor"]) == recorded_settings(path)
        test = parse_test_options(PARTI, "", ["--text_path", path, "--output_path", "x"])
        assert (test.step, test.grad_steps, test.guidance, test.tune_unconditional) == (3, 3, 4.0, "off")
        test = parse_test_options(PARTI, "", ["--text_path", path, "--tune_unconditional", ""])
        assert test.tune_unconditional == "off"
        test = parse_test_options(PARTI, "", ["--text_path", path, "--guidance=2", "--tune-unconditional", "on"])
        assert (test.step, test.guidance, test.tune_unconditional) == (3, 2, "on")
    second = ["--text_path", "full/tc_text.safetensors", "--lr_text", "0", "--lr_unet", "1e-6", "--output-path", "y"]
    assert parse_options(second).tune_unconditional == "off"
    assert parse_options(["--output-path", "y"]).tune_unconditional == "on"
    # A flag, then what the weights say, then the model's default.
    train(*run, "--tune_unconditional", "on", "--output-path", "on")
    go_on = ["--model", "miniature", "--text_path", "on/tc_text.safetensors", "--output-path", "y"]
    assert parse_options(go_on).tune_unconditional == "on"
    assert parse_options([*go_on, "--tune_unconditional", "off"]).tune_unconditional == "off"
    assert parse_options([*go_on, "--text_path", ""]).tune_unconditional == "off"


def test_tests_follow_a_unet_and_the_weighting_too(work, command, files):  # noqa: F811
    """An encoder and a UNet of different settings leave the choice to the user."""
    run = ["--max_steps", 1, "--lr_text", 0, "--lr_unet", "1e-6", "--guidance", 4, "--prompt_weighting", 0.5]
    train(*command, *run)
    unet = ["--output_path", "x", "--unet_path", "output/tc_unet.safetensors"]
    test = parse_test_options(PARTI, "", ["--text_path", "", *unet])
    assert (test.step, test.guidance, test.prompt_weighting) == (3, 4, 0.5)
    both = ["--text_path", files["on"], *unet]
    choice = ["--step", 10, "--grad_steps", 6, "--guidance", 3]
    for flags in ([], choice[:2], choice[:4]):
        with pytest.raises(
            UserError, match=r"tc_unet\.safetensors for [\d.]+; choose one with --(step|grad_steps|guid)"
        ):
            parse_test_options(PARTI, "", [*both, *map(str, flags)])
    test = parse_test_options(PARTI, "", [*both, *map(str, choice)])
    assert (test.step, test.grad_steps, test.guidance, test.prompt_weighting) == (10, 6, 3, 0.5)


def test_a_hub_id_says_what_its_weights_say(files, monkeypatch, tmp_path):
    """Whatever name of the two its text encoder has there; without a network, loading the weights complains."""
    for name in ENCODERS:

        def fetch(repo, file, name=name):
            if (repo, file) != ("ada/tuned", name):
                raise OSError("no such file")
            return files["off"]

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
        assert recorded_settings("ada/tuned") == recorded_settings(files["off"])
        options = parse_test_options(PARTI, "", ["--text_path", "ada/tuned"])
        assert (options.step, options.tune_unconditional) == (10, "off")
        assert recorded_settings("ada/other") == {}
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: asked.append(names))
    assert not any(
        recorded_settings(f"ada/tuned{suffix}") for suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
    )
    Path("ada").mkdir()
    assert not recorded_settings("ada/tuned_without_its_suffix")
    assert not asked, "a mistyped path is no business of the hub"


def test_files_that_say_nothing_or_different_things(files, tmp_path):
    other = tmp_path / "other.pth"
    other.write_bytes(b"PK" + bytes(100))
    assert recorded_settings(other) == recorded_settings(tmp_path) == recorded_settings("somebody/model") == {}
    assert tunes_unconditional([str(other)]) and tunes_unconditional([]) and not tunes_unconditional([files["off"]])
    both = ["--text_path", f"{files['on']}=0.5", "--text_path", f"{files['off']}=0.5"]
    with pytest.raises(UserError, match="on.safetensors was trained for --tune_unconditional on, .*off.* choose one"):
        parse_test_options(PARTI, "", both)
    assert parse_test_options(PARTI, "", [*both, "--tune_unconditional", "on"]).step == 10
    plain = parse_test_options(PARTI, "", ["--text_path", ""])
    assert (plain.step, plain.grad_steps, plain.guidance, plain.tune_unconditional) == (25, 15, 7.5, "on")


def test_test_programs_and_pipelines_make_the_same_image(stable_diffusion, files, monkeypatch):
    pipeline, tuned = load_pipeline(str(stable_diffusion), "DDIM", 10, files["off"])
    noise = torch.from_numpy(np.random.default_rng([5, 7]).standard_normal((1, 4, 8, 8), dtype=np.float32))
    monkeypatch.setattr(StableDiffusionPipeline, "prepare_latents", lambda *arguments: noise.clone())
    images = {}
    for how, own in {"on": {}, "off": {"tune_unconditional": False}, "half": {"weighting": 0.5}}.items():
        settings = {"seed": 5, "grad_steps": 6, "guidance": 3.0} | own
        ours = generate(pipeline, tuned, ["a red fox"], [7], **settings)
        attach_encoder(pipeline, files[how])  # 6 steps, as the files say
        stock = pipeline("a red fox", num_inference_steps=10, guidance_scale=3.0, output_type="pt").images
        torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)
        images[how] = ours
    assert all((images["on"] - images[how]).abs().max() > 1e-3 for how in ("off", "half"))
    attach_encoder(pipeline, [(files["half"], 1.0), (files["half"], 1.0)])  # their halves add up
    stock = pipeline("a red fox", num_inference_steps=10, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(images["on"], stock, rtol=0, atol=1e-5)


def test_merged_and_exported_files_say_it_too(stable_diffusion, files, tmp_path):
    merged = tmp_path / "merged.safetensors"
    base = ["--base", str(stable_diffusion)]
    merge.main([f"{files['off']}=0.5", *base, "-o", str(merged)])
    assert recorded_settings(merged) == recorded_settings(files["off"])
    with pytest.raises(UserError, match="trained for --tune_unconditional on, .*; merge encoders that"):
        merge.main([f"{files['on']}=0.5", f"{files['off']}=0.5", *base, "-o", str(tmp_path / "x.safetensors")])
    with pytest.raises(UserError, match="use encoders that agree"):
        mix.main(["--model", str(stable_diffusion), "--text_path", files["on"], "--text_path", files["off"]])
    for form in ("clip_l", "lora", "lora_kohya", "checkpoint", "text_encoder", "diffusers"):
        output = tmp_path / (form if form in ("text_encoder", "diffusers") else f"{form}.safetensors")
        export.main(["--model", str(stable_diffusion), "--text_path", files["off"], "--form", form, "-o", str(output)])
        assert recorded_settings(output) == recorded_settings(files["off"])
