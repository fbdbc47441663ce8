"""Weight files as people have them: any names, wrappers and containers, read without running their code."""

import argparse
import copy
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from textcraftor import weight_files
from textcraftor.errors import UserError
from textcraftor.models import SD_V1_CONFIGS, load_model
from textcraftor.unpickle import read_pickle
from textcraftor.weight_files import (
    check_text_encoder,
    check_unet,
    choose_files,
    load_public_state,
    load_text_encoder,
    load_unet,
    public_state,
    save_text_encoder,
    save_unet,
)
from textcraftor.weights import read_weights


@pytest.fixture(scope="module")
def model(stable_diffusion):
    return load_model(str(stable_diffusion))


@pytest.fixture(scope="module")
def encoder(model):
    return refilled(model.text_encoder, 0.001)


@pytest.fixture(scope="module")
def bare(encoder):
    """The encoder's weights without any prefix."""
    return {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}


def contiguous(network):
    """A state dict that safetensors writes: the networks are channels last."""
    return {name: value.contiguous() for name, value in network.state_dict().items()}


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


def assert_loads(encoder, path):
    check_text_encoder(path)
    back = refilled(encoder, 0)
    load_text_encoder(back, path)
    assert_same(back, encoder)


def test_exported_weights_load_where_users_put_them(model, encoder, stable_diffusion, tmp_path):
    folder, unet = shutil.copytree(stable_diffusion, tmp_path / "model"), refilled(model.unet, 0.001)
    exported = folder / "text_encoder" / "model.safetensors"
    save_text_encoder(encoder.state_dict(), exported)
    save_unet(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    with safe_open(exported, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # many a transformers 4 reads no file without it
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
        assert "text_model.encoder.layers.1.self_attn.k_proj.weight" in file.keys()  # noqa: SIM118
    loaded, info = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(loaded, encoder)
    assert_same(UNet2DConditionModel.from_pretrained(folder / "unet"), unet)
    assert_same(StableDiffusionPipeline.from_pretrained(folder).text_encoder, encoder)
    for path in (exported, folder / "text_encoder", folder):
        assert_loads(encoder, path)
    for path in (folder, folder / "unet"):
        check_unet(path)
        back = refilled(unet, 0)
        load_unet(back, path)
        assert_same(back, unet)


@pytest.mark.parametrize(
    "prefixes",
    [
        ("", "text_model.", "module.", "module.text_model.", "_orig_mod.text_model.", "text_encoder.text_model."),
        ("cond_stage_model.transformer.text_model.", "model.", "transformer.", "transformer.text_model.", "clip_l."),
        ("clip.text_model.", "text_encoders.clip_l.transformer.text_model.", "clip.cond_stage_model.transformer."),
        ("_orig_mod.module.text_encoder.", "module._orig_mod.text_model.", "text_encoder.module.text_model._orig_mod."),
        ("model.text_encoder.module._fsdp_wrapped_module.text_model.", "pipe.text_encoder.base.", "net_te."),
    ],
)
def test_a_text_encoder_is_found_under_any_prefix(encoder, bare, tmp_path, prefixes):
    for number, prefix in enumerate(prefixes):
        state = {prefix + name: value for name, value in bare.items()}
        if prefix:
            state |= {"model_ema.decay": torch.tensor(0.99), "vae.decoder.conv_in.weight": torch.ones(2)}
        state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
        path = tmp_path / f"{number}.safetensors"
        torch.save(state, path) if number % 2 else save_file(state, path.with_suffix(".ckpt"))  # the name lies
        assert_loads(encoder, path if number % 2 else path.with_suffix(".ckpt"))


def test_wrappers_may_stand_in_the_middle_of_a_name(encoder, bare, tmp_path):
    inner = {
        name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn._orig_mod."): value
        for name, value in bare.items()
    }
    save_file(inner, tmp_path / "fsdp.safetensors")
    assert_loads(encoder, tmp_path / "fsdp.safetensors")


@pytest.mark.parametrize("kind", ["clip", "bare"])
def test_what_clip_has_beside_its_text_encoder_is_left_out(encoder, bare, tmp_path, kind):
    config = CLIPConfig(text_config=encoder.config.to_dict(), vision_config=tiny.VISION_CONFIG, projection_dim=32)
    clip = tiny.seeded(3, lambda: CLIPModel(config))
    state = {name: value for name, value in clip.state_dict().items() if not name.startswith("text_model.")}
    assert {"logit_scale", "text_projection.weight"} < state.keys() and any("vision_model" in name for name in state)
    prefix = "text_model." if kind == "clip" else ""
    save_file(state | {prefix + name: value for name, value in bare.items()}, tmp_path / "clip.safetensors")
    assert_loads(encoder, tmp_path / "clip.safetensors")


class Callback:
    """As a trainer's own classes in its checkpoints."""

    def __init__(self):
        self.best = {"path": Path("a"), "score": np.float64(0.5)}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_state_dicts_in_trainers_checkpoints(encoder, bare, tmp_path, options):
    named = {f"text_model.{name}": torch.nn.Parameter(value) for name, value in bare.items()}
    adam = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(4.0)}}, "param_groups": [{"lr": 1e-6}]}
    plain = {"epoch": 3, "optimizer": adam, "seed": 2**60}
    old = {name: torch.zeros_like(value) for name, value in named.items()}
    beside = {"callbacks": {Callback: Callback()}, "hyper_parameters": argparse.Namespace(a=1), "loss": np.float32(2)}
    beside |= {"array": np.arange(3), "dtype": torch.float16, "function": os.path.join, "set": {1, (2, "x")}}
    contents = [
        {"state_dict": named, **plain},
        {"model": {"text_encoder": named}, **plain},
        {"model_state_dict": {f"module.{name}": value for name, value in named.items()}},
        {"text_encoder": old, "text_encoder_ema": named},
        {"ema": {"module": named}, "model": old, **plain},
        {"state_dict": {f"model.{n}": v for n, v in old.items()} | {f"model_ema.{n}": v for n, v in named.items()}},
        {"text_encoder": named, "unet": {"conv_in.weight": torch.ones(4)}},
        {"text_encoder": named, "original": dict(named)},  # twice the same
        {"state_dict": named, **plain, **beside},
        {"trainer": [beside, {"net": named}]},
    ]
    for number, content in enumerate(contents):
        torch.save(content, tmp_path / f"{number}.ckpt", **options)
        assert_loads(encoder, tmp_path / f"{number}.ckpt")


def test_views_dtypes_and_meta_of_our_own_unpickler(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    content = {"base": base, "view": base[1:3, ::2], "transposed": base.T, "empty": torch.empty(0, 3), "x": Callback()}
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn):
        content[str(dtype)] = torch.arange(5.0).to(dtype)
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        path = tmp_path / "x.pt"
        torch.save(content, path, **options)
        found, names = read_pickle(path), read_pickle(path, meta=True)
        for name, value in content.items():
            if name != "x":
                assert found[name].dtype == value.dtype and torch.equal(found[name].float(), value.float()), name
                assert names[name].is_meta and names[name].shape == value.shape and names[name].dtype == value.dtype


class Payload:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """What pickle asks of the first item in __reduce__'s tuple."""


class Evil:
    def __setstate__(self, state):
        Path(state).touch()

    def __getstate__(self):
        return self.mark

    def __init__(self, mark):
        self.mark = mark


@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_of_a_pickle_runs(bare, tmp_path, protocol):
    mark = tmp_path / "ran"
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    payloads = [
        Payload(os.system, (f"touch {mark}",)),
        Payload(eval, (touch,)),
        Payload(exec, (touch,)),
        Payload(Payload(getattr, (Payload(__import__, ("os",)), "system")), (f"touch {mark}",)),
        Payload(getattr, (Payload(Path, (str(mark),)), "touch")),
        Payload(Path.touch, (Path(mark),)),
        Payload(torch.load, (str(mark),)),
        Payload(pickle.loads, (pickle.dumps(Payload(os.system, (f"touch {mark}",))),)),
        Evil(str(mark)),
    ]
    for number, payload in enumerate(payloads):
        for zipped in (True, False):
            path = tmp_path / f"{number}.ckpt"
            content = {"state_dict": bare, "payload": [payload]}
            torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
            try:
                assert read_weights(path).keys() == bare.keys()  # the tensors are good all the same
            except UserError as problem:
                assert "damaged" in str(problem)
            assert not mark.exists(), (number, zipped)
    pickle.loads(pickle.dumps(payloads[-1]))  # that they would run
    assert mark.exists()


@pytest.mark.parametrize("load", [load_text_encoder, load_unet])
def test_other_kinds_of_files_are_named(model, bare, tmp_path, load):
    wide = {name: torch.zeros(49408 if "token" in name else 2, 1280) for name in bare}
    one = torch.ones(1)
    cases = {
        "a LoHa": {"lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": one},
        "a LoRA; ": {**bare, "text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": one},
        "textual-inversion": {"emb_params": torch.ones(1, 768)},
        "a Stable Diffusion XL model": {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": one},
        "XL refiner": {"conditioner.embedders.0.model.ln_final.weight": one},
        "a Stable Diffusion 2.x": {"cond_stage_model.model.ln_final.weight": one},
        "a Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": one},
        "a Flux": {"double_blocks.0.img_attn.norm.key_norm.scale": one},
        "a ControlNet": {"controlnet_cond_embedding.conv_in.weight": one, "time_embedding.linear_1.weight": one},
        "a VAE": {"decoder.conv_in.weight": one, "encoder.conv_in.weight": one},
        "open_clip": {"transformer.resblocks.0.ln_1.weight": one, "token_embedding.weight": one},
        "an image encoder": {"vision_model.post_layernorm.weight": one},
        "a T5": {"encoder.block.0.layer.0.SelfAttention.q.weight": one, "shared.weight": one},
        "such as head.weight": {"head.weight": one},
    }
    if load is load_text_encoder:
        cases["a UNet"] = contiguous(model.unet)
        cases["Stable Diffusion XL|hidden size 1280"] = wide
        cases[r"more than one CLIP text encoder in it \(a, b"] = {
            f"{place}.{name}": value + (place == "b") for name, value in bare.items() for place in "ab"
        }
    else:
        cases["looks like a CLIP text encoder"] = {f"text_model.{name}": value for name, value in bare.items()}
        for channels, kind in ((9, "inpainting"), (8, "InstructPix2Pix"), (5, "depth")):
            first = torch.zeros(16, channels, 3, 3)
            cases[f"{kind}.*{channels} input channels"] = contiguous(model.unet) | {"conv_in.weight": first}
    check, network = (check_text_encoder, model.text_encoder) if load is load_text_encoder else (check_unet, model.unet)
    for number, (problem, state) in enumerate(cases.items()):
        path = tmp_path / f"{number}.safetensors"
        save_file({name: value.clone() for name, value in state.items()}, path)
        for refuse in (check, lambda path: load(network, path)):
            if refuse is check and "more than one" in problem:  # the names alone do not tell whether they are equal
                continue
            with pytest.raises(UserError, match=problem) as error:
                refuse(path)
            assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_misfits_and_bad_numbers_are_refused_and_nothing_is_changed(model, bare, tmp_path):
    encoder, path = model.text_encoder, tmp_path / "other.safetensors"
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    last, inner = "final_layer_norm.bias", "encoder.layers.1.mlp.fc2.weight"
    cases = {
        rf"missing: \S*{inner}$": {name: value for name, value in bare.items() if name != inner},
        "unexpected: .*layers.9.x$": bare | {"encoder.layers.9.x": torch.zeros(2)},
        r"final_layer_norm.bias \(3,\), not \(32,\)": bare | {last: torch.zeros(3)},
        f"{inner} holds NaN or infinity": bare | {inner: bare[inner] / 0},
        f"{last} holds NaN or infinity": bare | {last: torch.tensor([float("-inf")] + [0.0] * 31).half()},
        "hidden size 64, but the model's is 32": bare | {"embeddings.token_embedding.weight": torch.zeros(49408, 64)},
    }
    for problem, state in cases.items():
        save_file(state, path)
        with pytest.raises(UserError, match=problem) as error:
            load_text_encoder(encoder, path)
        assert "other.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    state = {name: value.clone() for name, value in model.unet.state_dict().items()}
    state["conv_out.bias"][1] = float("nan")
    with pytest.raises(UserError, match="conv_out.bias holds NaN"):
        load_public_state(copy.deepcopy(model.unet), state, "resume")


def test_files_that_are_no_weights_are_refused(model, encoder, tmp_path):
    torch.save(encoder.state_dict(), tmp_path / "whole.pth")
    save_file(encoder.state_dict(), tmp_path / "whole.safetensors")
    torch.save([1, 2], tmp_path / "list")
    cases = {
        "is not a weight file": b"not weights",
        "is a web page": b"<!DOCTYPE html><title>Access denied</title>",
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 492265168\n",
        "is empty": b"",
        "damaged or incomplete": (tmp_path / "whole.pth").read_bytes()[:100_000],
        "damaged or incomplete .*fetch it again": (tmp_path / "whole.safetensors").read_bytes()[:100_000],
        "holds no weights": (tmp_path / "list").read_bytes(),
    }
    for problem, content in cases.items():
        (tmp_path / "text.pth").write_bytes(content)
        for refuse in (check_text_encoder, lambda path: load_text_encoder(model.text_encoder, path)):
            with pytest.raises(UserError, match=problem):
                refuse(tmp_path / "text.pth")
    for path in ("checkpoints/none.pth", "./none", "/none", "a/b/c"):
        with pytest.raises(UserError, match="no such weights"):
            check_text_encoder(path)
    check_text_encoder("somebody/model")


# fmt: off
FOLDERS = (  # names in a folder; the file, or the shards, to read
    ("model.safetensors model.fp16.safetensors pytorch_model.bin", "model.safetensors"),
    ("model.fp16.safetensors pytorch_model.bin config.json", "pytorch_model.bin"),
    ("model.fp16.safetensors model.fp16.bin", "model.fp16.safetensors"),
    ("model.non_ema.bin model.fp16.bin model.bf16.bin", "model.bf16.bin"),
    ("model-00001-of-00002.bin model-00002-of-00002.bin model.bin.index.json model.fp16.bin",
     "model-00001-of-00002.bin model-00002-of-00002.bin"),
    ("model.fp16-00001-of-00002.bin model.fp16-00002-of-00002.bin model.bin.index.fp16.json",
     "model.fp16-00001-of-00002.bin model.fp16-00002-of-00002.bin"),
    ("model-00001-of-00002.fp16.bin model-00002-of-00002.fp16.bin model.bin.index.fp16.json",
     "model-00001-of-00002.fp16.bin model-00002-of-00002.fp16.bin"),
    ("model-00001-of-00002.safetensors model.fp16.safetensors", "model.fp16.safetensors"),
    ("model.onnx flax_model.msgpack tf_model.h5 optimizer.bin config.json", ""),
)
# fmt: on


def test_full_precision_and_complete_files_are_preferred():
    for names, expected in FOLDERS:
        for stem in ("model.", "diffusion_pytorch_model."):
            if "tf_model" not in names:
                names, expected = (text.replace("pytorch_model.", "model.") for text in (names, expected))
                names, expected = (text.replace("model.", stem) for text in (names, expected))
            assert choose_files(names.split()) == expected.split(), names


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_of_the_libraries(model, encoder, tmp_path, variant):
    unet = refilled(model.unet, 2**-10)
    encoder = refilled(model.text_encoder, 2**-10)  # exact in fp16
    dtype = torch.float16 if variant else torch.float32
    copy.deepcopy(unet).to(dtype).save_pretrained(tmp_path / "unet", max_shard_size="100KB", variant=variant)
    copy.deepcopy(encoder).to(dtype).save_pretrained(tmp_path / "text_encoder", max_shard_size="2MB", variant=variant)
    assert len(list((tmp_path / "unet").glob("*-of-*"))) > 1 < len(list((tmp_path / "text_encoder").glob("*-of-*")))
    assert_loads(encoder, tmp_path)
    back = refilled(unet, 0)
    load_unet(back, tmp_path)
    assert_same(back, unet)
    sorted((tmp_path / "unet").glob("*-of-*"))[0].unlink()
    with pytest.raises(UserError, match="unet: .* of the .* shards"):
        check_unet(tmp_path)
    shutil.rmtree(tmp_path / "unet")
    (tmp_path / "unet").mkdir()
    tiny.write_json(tmp_path / "unet" / "config.json", {})
    with pytest.raises(UserError, match="unet: no weights in it, only a configuration"):
        check_unet(tmp_path)


def test_hub_ids_that_have_fp16_only_in_one_part(model, stable_diffusion, tmp_path, monkeypatch):
    repo, cache = shutil.copytree(stable_diffusion, tmp_path / "repo"), tmp_path / "cache"
    unet = repo / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(repo / "text_encoder" / "model.safetensors", repo / "text_encoder" / "model.fp16.safetensors")
    (repo / "v1-5-pruned.ckpt").write_bytes(b"large")
    (repo / "safety_checker").mkdir()
    (repo / "safety_checker" / "model.safetensors").write_bytes(b"large")

    class Hub:
        def list_repo_files(self, name):
            assert name == "somebody/model"
            return [str(path.relative_to(repo)) for path in repo.rglob("*") if path.is_file()]

    def snapshot_download(name, allow_patterns):
        for file in allow_patterns:
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo / file, cache / file)
        return str(cache)

    monkeypatch.setattr(weight_files, "HfApi", Hub)
    monkeypatch.setattr(weight_files, "snapshot_download", snapshot_download)
    loaded = load_model("somebody/model")
    for network, expected in zip(loaded[1:4], model[1:4], strict=True):
        assert_same(network, expected)
    assert sorted(path.name for path in cache.rglob("*model*.safetensors")) == [
        "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors", "model.safetensors",
    ]  # fmt: skip
    back = refilled(model.text_encoder, 0)
    load_text_encoder(back, "somebody/model")
    assert_same(back, model.text_encoder)
    monkeypatch.undo()
    with pytest.raises(
        UserError, match="somebody/model: no such folder, not in the hub's cache, and the hub cannot be"
    ):
        load_text_encoder(back, "somebody/model")  # the tests have no connection


def test_the_papers_file_fits_the_real_text_encoder(tmp_path):
    """Names and shapes of the paper's file, written down from transformers 4, with and without position_ids."""
    shapes = {"embeddings.token_embedding.weight": (49408, 768), "embeddings.position_embedding.weight": (77, 768)}
    for layer in range(12):
        parts = {f"self_attn.{part}_proj": (768, 768) for part in "kvq"} | {"self_attn.out_proj": (768, 768)}
        parts |= {"layer_norm1": (768,), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072), "layer_norm2": (768,)}
        for part, shape in parts.items():
            shapes |= {f"encoder.layers.{layer}.{part}.weight": shape, f"encoder.layers.{layer}.{part}.bias": shape[:1]}
    shapes |= {"final_layer_norm.weight": (768,), "final_layer_norm.bias": (768,)}
    state = {f"module.text_model.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert len(state) == 196
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(SD_V1_CONFIGS / "text_encoder"))
    for position_ids in ({}, {"module.text_model.embeddings.position_ids": torch.arange(77)[None]}):
        torch.save(state | position_ids, tmp_path / "tc_text_e_0_iter_10000.pth")
        load_text_encoder(encoder, tmp_path / "tc_text_e_0_iter_10000.pth")
    assert public_state(encoder.state_dict()).keys() == {name.removeprefix("module.") for name in state}
    older = {f"module.{name}": value for name, value in public_state(encoder.state_dict()).items()}  # or a wrapper
    assert public_state(older).keys() == public_state(encoder.state_dict()).keys()


def test_a_failed_write_leaves_the_old_file(encoder, model, tmp_path, monkeypatch):
    path = tmp_path / "new" / "tc_text.safetensors"
    save_text_encoder(encoder.state_dict(), path)
    before = load_file(path)

    def half(tensors, unfinished, **options):
        unfinished.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(UserError, match="No space left"):
        save_text_encoder(model.text_encoder.state_dict(), path)
    assert load_file(path).keys() == before.keys() and os.listdir(path.parent) == ["tc_text.safetensors"]
