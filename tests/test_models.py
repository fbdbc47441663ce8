"""Loading SD v1.5 as it comes: old and new folders, single files, and what is damaged said in one line."""

import json
import shutil
import socket

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from textcraftor import models
from textcraftor.errors import UserError
from textcraftor.models import check_model, load_model
from textcraftor.sampling import make_scheduler

SMALL = {  # SD v1's own blocks, narrow
    "unet": {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 4, "attention_head_dim": 2},
    "vae": {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 4, "sample_size": 64},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
}
SMALL["unet"] |= {"cross_attention_dim": 32, "sample_size": 8}


def build(configs):
    """The three networks of a folder of configurations, in load_model's order."""
    text_config = CLIPTextConfig.from_pretrained(configs / "text_encoder")
    unet, vae = (
        kind.load_config(configs / part) for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    return CLIPTextModel(text_config), UNet2DConditionModel.from_config(unet), AutoencoderKL.from_config(vae)


def assert_same(networks, others):
    for network, other in zip(networks, others, strict=True):
        state, expected = network.state_dict(), other.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def small_sd_v1(tmp_path_factory):
    """(configurations, networks) of an SD v1 with all its blocks and layers, but narrow."""
    configs = tmp_path_factory.mktemp("configs") / "configs"
    shutil.copytree(models.SD_V1_CONFIGS, configs)
    for part, changes in SMALL.items():
        config = json.loads((configs / part / "config.json").read_text())
        tiny.write_json(configs / part / "config.json", config | changes)
    return configs, tiny.seeded(9, lambda: build(configs))


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("tried to connect"))


def test_configurations_for_single_files_are_those_of_sd_v1_5(small_sd_v1):
    with torch.device("meta"):
        networks = build(models.SD_V1_CONFIGS)
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in networks]
    assert sizes == [123_060_480, 859_520_964, 83_653_863]  # as published
    # The small ones of these tests stand for them.
    assert [network.state_dict().keys() for network in networks] == [net.state_dict().keys() for net in small_sd_v1[1]]
    assert networks[1].config.sample_size == 64 and networks[2].config.scaling_factor == 0.18215


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_file_is_the_model_of_the_folder(small_sd_v1, tmp_path, monkeypatch, no_network, dtype):
    configs, networks = small_sd_v1
    monkeypatch.setattr(models, "SD_V1_CONFIGS", configs)
    folder, path = tmp_path / "folder", tmp_path / "v1-5-pruned-emaonly.safetensors"
    shutil.copytree(configs, folder)
    tiny.make_tokenizer(folder / "tokenizer")
    for network, part in zip(networks, ("text_encoder", "unet", "vae"), strict=True):
        network.save_pretrained(folder / part)
    state = tiny.original_checkpoint(*networks)
    for name in (  # some that are known of the released file, so that the names above are not only our own
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.encoder.down.0.downsample.conv.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.decoder.mid.attn_1.proj_out.weight",
        "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight",
    ):
        assert name in state
    save_file({name: value.to(dtype) for name, value in state.items()}, path)
    check_model(str(path))
    tokenizer, *loaded, scheduler_config = load_model(str(path))
    if dtype == torch.float16:
        networks = [tiny.seeded(9, lambda: build(configs))[index].half().float() for index in range(3)]
    assert_same(loaded, networks)
    assert {weight.dtype for network in loaded for weight in network.parameters()} == {torch.float32}
    assert not any(weight.requires_grad for network in loaded for weight in network.parameters())
    of_folder = load_model(str(folder))
    prompts = ["An owl, 4k!", "", "fox " * 90]
    assert (
        tokenizer(prompts, padding="max_length", truncation=True).input_ids
        == of_folder[0](prompts, padding="max_length", truncation=True).input_ids
    )
    ours, expected = make_scheduler(scheduler_config, 25), make_scheduler(of_folder[-1], 25)
    assert ours.config == expected.config and torch.equal(ours.alphas_cumprod, expected.alphas_cumprod)


def test_averaged_weights_are_taken_from_a_file_with_both(small_sd_v1, tmp_path, monkeypatch):
    configs, (text_encoder, unet, vae) = small_sd_v1
    monkeypatch.setattr(models, "SD_V1_CONFIGS", configs)
    state = tiny.original_checkpoint(text_encoder, unet, vae)
    start = "model.diffusion_model."
    for name in [name for name in state if name.startswith(start)]:
        state[f"model_ema.diffusion_model{name.removeprefix(start).replace('.', '')}"] = state[name]
        state[name] = torch.zeros_like(state[name])
    save_file(state, tmp_path / "v1-5-pruned.safetensors")
    assert_same(load_model(str(tmp_path / "v1-5-pruned.safetensors"))[1:-1], (text_encoder, unet, vae))


def test_single_files_that_are_no_sd_v1_are_refused_with_names(small_sd_v1, tmp_path, monkeypatch, no_network):
    configs, networks = small_sd_v1
    monkeypatch.setattr(models, "SD_V1_CONFIGS", configs)
    state = tiny.original_checkpoint(*networks)
    path = tmp_path / "model.safetensors"
    unet, vae = "model.diffusion_model.", "first_stage_model."
    text = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    cases = {
        r"CLIPTextModel.*missing: (text_model\.)?final_layer_norm.bias": {text: None},
        "UNet2DConditionModel.*missing: mid_block.attentions.0.proj_in.bias": {
            f"{unet}middle_block.1.proj_in.bias": None
        },
        "no VAE in it": {f"{vae}decoder.conv_in.weight": None},
        "an inpainting UNet": {f"{unet}input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},  # the inpainting model's
    }
    for problem, changes in cases.items():
        changed = {name: value for name, value in (state | changes).items() if value is not None}
        save_file(changed, path)
        with pytest.raises(UserError, match=problem) as error:
            load_model(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="not weights|cannot be read"):
        load_model(str(path))


@pytest.mark.parametrize("safety_checker", [False, True])
def test_folders_of_2022_with_pickled_weights(stable_diffusion, tmp_path, no_network, safety_checker):
    folder = shutil.copytree(stable_diffusion, tmp_path / "model")
    for safe, pickled in (("model", "pytorch_model"), ("diffusion_pytorch_model", "diffusion_pytorch_model")):
        for path in folder.rglob(f"{safe}.safetensors"):
            torch.save(load_file(path), path.with_name(f"{pickled}.bin"))
            path.unlink()
    assert len(list(folder.rglob("*.bin"))) == 3 and not list(folder.rglob("*.safetensors"))
    if safety_checker:  # never looked at
        index = json.loads((folder / "model_index.json").read_text())
        index |= {
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "requires_safety_checker": True,
        }
        index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
        tiny.write_json(folder / "model_index.json", index)
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"")
    check_model(str(folder))
    assert_same(load_model(str(folder))[1:-1], load_model(str(stable_diffusion))[1:-1])


@pytest.mark.parametrize("dtype, variant", [(torch.float32, None), (torch.float16, "fp16")])
def test_folders_as_todays_library_writes_them(stable_diffusion, tmp_path, no_network, dtype, variant):
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion).to(dtype)
    pipeline.save_pretrained(tmp_path / "model", variant=variant)
    expected = [network.to(dtype).float() for network in load_model(str(stable_diffusion))[1:-1]]
    assert_same(load_model(str(tmp_path / "model"))[1:-1], expected)


def test_the_vae_of_sd_v1_5_names_its_attention_the_old_way(stable_diffusion, tmp_path):
    folder = shutil.copytree(stable_diffusion, tmp_path / "model")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, value in load_file(path).items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = value
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old
    save_file(old, path, metadata={"format": "pt"})
    (_, _, _, vae, _), (_, _, _, expected, _) = load_model(str(folder)), load_model(str(stable_diffusion))
    state = vae.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())


@pytest.mark.parametrize(
    "file, content",
    [
        ("text_encoder/model.safetensors", b"<html>not found</html>"),
        ("text_encoder/model.safetensors", None),
        ("text_encoder/config.json", None),  # then transformers' own sizes do not fit the weights
        ("unet/diffusion_pytorch_model.safetensors", b"<html>not found</html>"),
        ("vae/config.json", b"{"),
        ("tokenizer/vocab.json", b"{"),
        ("scheduler/scheduler_config.json", None),
    ],
)
def test_damaged_and_missing_files_are_said_in_one_line(stable_diffusion, tmp_path, file, content):
    folder = shutil.copytree(stable_diffusion, tmp_path / "model")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(
        UserError, match=r"could not be loaded|not weights|no weights|no such file|cannot be read"
    ) as error:
        load_model(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
