"""Weights in every spelling they come in, and the file that goes out read by its readers."""

import copy
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from textcraftor import weight_files
from textcraftor.errors import UserError
from textcraftor.models import SD_V1_CONFIGS, load_model
from textcraftor.weight_files import load_text_encoder, load_unet, save_text_encoder, save_unet


@pytest.fixture(scope="module")
def model(stable_diffusion):
    return load_model(str(stable_diffusion))


def refilled(network, value):
    """A copy with other weights: number of the parameter times `value`."""
    other = copy.deepcopy(network)
    for number, weight in enumerate(other.parameters()):
        weight.fill_(number * value)
    return other


def assert_same(network, other):
    state, expected = network.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_text_encoder_goes_out_under_the_old_names_and_comes_back(model, tmp_path):
    encoder = refilled(model[1], 0.001)
    save_text_encoder(encoder.state_dict(), tmp_path / "new" / "tc_text.safetensors")
    state = load_file(tmp_path / "new" / "tc_text.safetensors")
    assert all(name.startswith("text_model.") for name in state)
    with safe_open(tmp_path / "new" / "tc_text.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # many a transformers 4 reads no file without it
    assert "text_model.encoder.layers.1.self_attn.k_proj.weight" in state
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tc_text.safetensors"]  # nothing unfinished
    back = refilled(model[1], 0)
    load_text_encoder(back, tmp_path / "new" / "tc_text.safetensors")
    assert_same(back, encoder)


def test_exported_weights_load_where_users_put_them(model, stable_diffusion, tmp_path):
    folder = shutil.copytree(stable_diffusion, tmp_path / "model")
    encoder, unet = refilled(model[1], 0.001), refilled(model[2], 0.001)
    save_text_encoder(encoder.state_dict(), folder / "text_encoder" / "model.safetensors")
    save_unet(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    loaded, info = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(loaded, encoder)
    assert_same(UNet2DConditionModel.from_pretrained(folder / "unet"), unet)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert_same(pipeline.text_encoder, encoder)


@pytest.mark.parametrize("prefix", ["", "text_model.", "module.text_model.", "module."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_text_encoder_comes_in_under_any_name(model, tmp_path, prefix, suffix):
    """The paper's file: a pickled state dict, module.text_model.…, with position_ids."""
    encoder, path = refilled(model[1], 0.001), tmp_path / f"tc_text_e_0_iter_10000{suffix}"
    state = {prefix + name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    back = refilled(model[1], 0)
    load_text_encoder(back, path)
    assert_same(back, encoder)


def paper_weights():
    """Names and shapes of the paper's file, written down from transformers 4, without position_ids."""
    shapes = {"embeddings.token_embedding.weight": (49408, 768), "embeddings.position_embedding.weight": (77, 768)}
    for layer in range(12):
        parts = {f"self_attn.{part}_proj": (768, 768) for part in "kvq"} | {"self_attn.out_proj": (768, 768)}
        parts |= {"layer_norm1": (768,), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072), "layer_norm2": (768,)}
        for part, shape in parts.items():
            shapes |= {f"encoder.layers.{layer}.{part}.weight": shape, f"encoder.layers.{layer}.{part}.bias": shape[:1]}
    shapes |= {"final_layer_norm.weight": (768,), "final_layer_norm.bias": (768,)}
    return {f"module.text_model.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("position_ids", [False, True])
def test_the_papers_file_fits_the_real_text_encoder(tmp_path, position_ids):
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(SD_V1_CONFIGS / "text_encoder"))
    state, path = paper_weights(), tmp_path / "tc_text_e_0_iter_10000.pth"
    assert len(state) == 196
    if position_ids:
        state["module.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(state, path)
    load_text_encoder(encoder, path)
    # Of another kind of model: the first of what is missing, and of what is too much.
    last = "module.text_model.encoder.layers.11.mlp.fc2.bias"
    state["module.visual.proj"] = state.pop(last)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"missing: \S*encoder.layers.11.mlp.fc2.bias; unexpected: module.visual.proj$"):
        load_text_encoder(encoder, path)


def test_half_precision_weights_are_read_into_fp32(model, tmp_path):
    encoder, path = refilled(model[1], 0.001), tmp_path / "half.safetensors"
    save_file({name: value.half() for name, value in encoder.state_dict().items()}, path)
    back = refilled(model[1], 0)
    load_text_encoder(back, path)
    assert {weight.dtype for weight in back.parameters()} == {torch.float32}
    torch.testing.assert_close(back.final_layer_norm.weight, encoder.final_layer_norm.weight, rtol=1e-3, atol=0)


def test_unet_comes_back(model, tmp_path):
    unet, back = refilled(model[2], 0.001), refilled(model[2], 0)
    torch.save({f"module.{name}": value for name, value in unet.state_dict().items()}, tmp_path / "unet.pth")
    load_unet(back, tmp_path / "unet.pth")
    assert_same(back, unet)


def test_another_models_weights_are_refused_with_names(model, tmp_path):
    encoder = model[1]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = {f"text_model.{name}": value for name, value in encoder.state_dict().items()}
    missing = "text_model.final_layer_norm.bias"
    cases = {
        "missing: final_layer_norm.bias": {name: value for name, value in state.items() if name != missing},
        "unexpected: text_model.encoder.layers.9.x": state | {"text_model.encoder.layers.9.x": torch.zeros(2)},
        "final_layer_norm.bias (3,)": state | {missing: torch.zeros(3)},
        "missing: conv_in.weight": None,
    }
    for problem, tensors in cases.items():
        network, load = (encoder, load_text_encoder) if tensors else (model[2], load_unet)
        save_file(tensors or state, tmp_path / "other.safetensors")
        with pytest.raises(UserError) as error:
            load(network, tmp_path / "other.safetensors")
        assert problem in str(error.value) and "other.safetensors" in str(error.value)
        assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_what_is_no_checkpoint_is_refused(model, tmp_path):
    (tmp_path / "text.pth").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": print}, tmp_path / "code.pth")
    for name in ("text.pth", "list.pth", "code.pth"):
        with pytest.raises(UserError, match=name):
            load_text_encoder(model[1], tmp_path / name)


def test_a_failed_write_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "tc_text.safetensors"
    save_text_encoder(refilled(model[1], 0.001).state_dict(), path)
    before = path.read_bytes()

    def half(tensors, unfinished, **options):
        unfinished.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weight_files, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_text_encoder(model[1].state_dict(), path)
    assert path.read_bytes() == before
