"""Exported text encoders, each form read back by the library it is for."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from base64 import b64decode
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import export
from textcraftor import models
from textcraftor.errors import UserError
from textcraftor.exporting.card import model_card, run_parts
from textcraftor.exporting.lora import lora_of_difference
from textcraftor.exporting.original_names import original_text, original_unet, original_vae
from textcraftor.models import latent_shape, load_model, make_networks, quiet_libraries
from textcraftor.sampling import make_images, make_scheduler
from textcraftor.validation import save_look
from textcraftor.weight_files import load_text_encoder, read_text_encoder, save_text_encoder

ROOT = Path(__file__).parents[1]
RANK = 6
PROMPT = "a red fox, 4k"


@pytest.fixture(scope="module")
def tuned(stable_diffusion, tmp_path_factory):
    """A tuned encoder's file: the linear layers changed, by little else than rank 6, and a norm."""
    state, generator = read_text_encoder(stable_diffusion, ""), torch.Generator().manual_seed(0)
    for name, value in state.items():
        if ".layers." in name and value.ndim == 2:
            up, down = (
                torch.randn(len(value), 6, generator=generator),
                torch.randn(6, value.shape[1], generator=generator),
            )
            noise = torch.randn(value.shape, generator=generator)
            state[name] = value + 0.02 * up @ down + 0.001 * noise
    state["text_model.final_layer_norm.bias"] = state["text_model.final_layer_norm.bias"] + 0.003
    path = tmp_path_factory.mktemp("run") / "tc_text.safetensors"
    save_text_encoder(state, path)
    return path


def exported(form, tuned, base, output, *more):
    """export.py in this process -> output."""
    export.main(["--text_path", str(tuned), "--model", str(base), "--form", form, "-o", str(output), *more])
    return output


def images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, num_inference_steps=3, generator=generator, output_type="np").images


@pytest.fixture(scope="module")
def expected(stable_diffusion, tuned):
    """What the stock pipeline draws with the tuned encoder put into it."""
    quiet_libraries()
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    before = images(pipeline)
    load_text_encoder(pipeline.text_encoder, tuned)
    assert np.abs(images(pipeline) - before).max() > 0.01
    return images(pipeline)


def test_a_whole_folder_is_a_stock_pipeline(stable_diffusion, tuned, expected, tmp_path):
    folder = exported("diffusers", tuned, stable_diffusion, tmp_path / "whole")
    assert np.array_equal(images(StableDiffusionPipeline.from_pretrained(folder)), expected)
    assert load_model(str(folder)).scheduler_config == load_model(str(stable_diffusion)).scheduler_config
    assert {path.name for path in (folder / "tokenizer").iterdir()} > {"vocab.json", "merges.txt"}  # for transformers 4
    half = exported("diffusers", tuned, stable_diffusion, tmp_path / "half", "--half")
    files = list(half.glob("*/*.safetensors"))
    assert len(files) == 3 and {value.dtype for file in files for value in load_file(file).values()} == {torch.float16}
    pipeline = StableDiffusionPipeline.from_pretrained(half, dtype=torch.float32)
    np.testing.assert_allclose(images(pipeline), expected, rtol=0, atol=0.02)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "whole"]  # nothing unfinished is left


def test_the_text_encoder_alone_loads_in_transformers(stable_diffusion, tuned, tmp_path):
    folder = exported("text_encoder", tuned, stable_diffusion, tmp_path / "encoder")
    encoder, info = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    reference = CLIPTextModel.from_pretrained(stable_diffusion, subfolder="text_encoder")
    load_text_encoder(reference, tuned)
    tokens = CLIPTokenizer.from_pretrained(stable_diffusion / "tokenizer")(PROMPT, return_tensors="pt").input_ids
    assert torch.equal(encoder(tokens).last_hidden_state, reference(tokens).last_hidden_state)
    # As one file, under the names that ComfyUI's loader knows CLIP-L by.
    state = load_file(exported("clip_l", tuned, stable_diffusion, tmp_path / "clip_l.safetensors"))
    assert state.keys() == load_file(folder / "model.safetensors").keys()
    assert "text_model.encoder.layers.0.mlp.fc1.weight" in state and all(name[:11] == "text_model." for name in state)


def test_names_in_a_single_file_are_those_of_the_original_code():
    """SD v1.5 in its own size, by names and shapes."""
    configs = models.SD_V1_CONFIGS
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae"))
        reference = tiny.original_checkpoint(encoder, unet, vae)
        text = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in encoder.state_dict().items()}
        parts = [original_unet(unet), original_vae(vae), original_text(text)]
    assert [len(part) for part in parts] == [686, 248, 197]  # 1131 in v1-5-pruned-emaonly.safetensors
    state = {name: value for part in parts for name, value in part.items()}
    assert state.keys() == reference.keys() - {"alphas_cumprod", "model_ema.num_updates"}
    assert all(state[name].shape == reference[name].shape for name in state)
    odd = UNet2DConditionModel(**{**tiny.make_unet().config, "encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"})
    with pytest.raises(UserError, match="unlike Stable Diffusion v1.*encoder_hid_proj"):
        original_unet(odd)


def test_a_single_file_holds_the_whole_model(stable_diffusion, tuned, expected, tmp_path, monkeypatch):
    path = exported("checkpoint", tuned, stable_diffusion, tmp_path / "from_folder.safetensors")
    pipeline = StableDiffusionPipeline.from_single_file(path, config=str(stable_diffusion), local_files_only=True)
    assert np.array_equal(images(pipeline), expected)

    # From a single file: all but the text encoder stays, bit for bit. Here a pickle with weights that share memory.
    model = load_model(str(stable_diffusion))
    state = tiny.original_checkpoint(model.text_encoder, model.unet.half(), model.vae)
    state["model_ema.decay"] = state["alphas_cumprod"][:1]
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "base.ckpt")
    again = load_file(exported("checkpoint", tuned, tmp_path / "base.ckpt", tmp_path / "from_file.safetensors"))
    prefix, new = "cond_stage_model.transformer.", read_text_encoder(tuned, "")
    assert again.keys() == state.keys()
    for name, value in again.items():
        assert torch.equal(value, new.get(name.removeprefix(prefix), state[name])), name
    half = load_file(exported("checkpoint", tuned, tmp_path / "base.ckpt", tmp_path / "half.safetensors", "--half"))
    others = {name: value.dtype for name, value in half.items() if value.dtype != torch.float16}
    positions = f"{prefix}text_model.embeddings.position_ids"
    assert others == {"alphas_cumprod": torch.float32, "model_ema.num_updates": torch.int64, positions: torch.int64}
    # The other forms read a single file, too.
    monkeypatch.setattr(models, "SD_V1_CONFIGS", stable_diffusion)
    folder = exported("diffusers", tuned, path, tmp_path / "folder")
    assert np.array_equal(images(StableDiffusionPipeline.from_pretrained(folder)), expected)


def test_a_lora_is_the_best_of_its_rank_and_says_its_error(stable_diffusion, tuned, tmp_path, capsys):
    original, new = read_text_encoder(stable_diffusion, ""), read_text_encoder(tuned, "")
    factors, error = lora_of_difference(original, new, RANK)
    relative, missed, covered, everything = {}, 0, 0, 0
    for name, weight in original.items():
        change = new[name].double().numpy() - weight.double().numpy()
        everything += (change**2).sum()
        if ".layers." in name and name.endswith(".weight") and change.ndim == 2:
            layer = name.removesuffix(".weight")
            u, s, v = np.linalg.svd(change)
            best = u[:, :RANK] * s[:RANK] @ v[:RANK]
            np.testing.assert_allclose(factors[layer].up @ factors[layer].down, best, atol=1e-4 * s[0])
            relative[layer] = np.sqrt((s[RANK:] ** 2).sum() / (s**2).sum())
            missed, covered = missed + (s[RANK:] ** 2).sum(), covered + (s**2).sum()
    assert factors.keys() == relative.keys() and len(factors) == 12
    np.testing.assert_allclose(error.mean, np.mean(list(relative.values())), rtol=1e-3)
    np.testing.assert_allclose(error.largest, max(relative.values()), rtol=1e-3)
    assert error.largest_layer == max(relative, key=relative.get)
    np.testing.assert_allclose(error.not_covered, 1 - covered / everything, rtol=1e-2)
    np.testing.assert_allclose(error.total, np.sqrt((missed + everything - covered) / everything), rtol=1e-3)

    # Read back: the pipeline with the LoRA draws what one with the low-rank weights in it draws.
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    low_rank = {
        name: weight + factors[layer].up @ factors[layer].down if (layer := name[:-7]) in factors else weight
        for name, weight in original.items()
    }
    save_text_encoder(low_rank, tmp_path / "low_rank.safetensors")
    before = images(pipeline)
    load_text_encoder(pipeline.text_encoder, tmp_path / "low_rank.safetensors")
    wanted = images(pipeline)
    assert np.abs(wanted - before).max() > 0.01
    paths = {
        form: exported(form, tuned, stable_diffusion, tmp_path / f"{form}.safetensors", "--lora_rank", str(RANK))
        for form in ("lora", "lora_kohya")
    }
    assert f"LoRA of rank {RANK}: {error}" in capsys.readouterr().out
    for path in paths.values():
        pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion)
        pipeline.load_lora_weights(path)
        np.testing.assert_allclose(images(pipeline), wanted, rtol=0, atol=1e-4)
        pipeline.unload_lora_weights()
        assert np.array_equal(images(pipeline), before)

    # As ComfyUI reads them: lora_up @ lora_down * alpha / rank is added to the layer that the name means.
    state = load_file(paths["lora_kohya"])
    for layer in factors:
        number, part = re.fullmatch(r"text_model\.encoder\.layers\.(\d)\.(.+)", layer).groups()
        name = f"lora_te_text_model_encoder_layers_{number}_{part.replace('.', '_')}"
        up, down, alpha = (state.pop(f"{name}.{kind}") for kind in ("lora_up.weight", "lora_down.weight", "alpha"))
        change = up @ down * alpha.item() / len(down)
        torch.testing.assert_close(original[f"{layer}.weight"] + change, low_rank[f"{layer}.weight"])
    assert not state
    with safe_open(paths["lora_kohya"], "pt") as file:
        assert file.metadata()["ss_network_dim"] == str(RANK)


def test_what_cannot_be_exported_is_one_clear_line(stable_diffusion, tuned, tmp_path):
    file, folder, taken = tmp_path / "a.safetensors", tmp_path / "a", tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text("{}")
    state = read_text_encoder(tuned, "")
    norm = "text_model.final_layer_norm.bias"
    others = {
        "nan": state | {norm: torch.full((32,), torch.nan)},
        "large": state | {norm: torch.full((32,), 1e5)},
        "other": {name: torch.zeros([48 if size == 32 else size for size in v.shape]) for name, v in state.items()},
    }
    for name, tensors in others.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    for options, message in (
        (["--form", "lora", "-o", folder], "ends in .safetensors"),
        (["--form", "diffusers", "-o", file], "is a folder"),
        (["--form", "diffusers", "-o", taken], "exists already"),
        (["--form", "clip_l", "-o", tmp_path / "nan.safetensors"], "exists already"),
        (["--form", "clip_l", "-o", tmp_path / "nan.safetensors" / "x.safetensors"], "is a file; choose a folder"),
        (["--form", "clip_l"], "--output_path is missing: name what to write, such as exported.safetensors"),
        (["--form", "onnx", "-o", folder], "--form"),
        (["--form", "lora", "-o", file, "--lora_rank", 0], "--lora_rank 0: must be at least 1"),
        (["--form", "lora", "-o", file, "--lora_rank", 33], "--lora_rank 33: .* use at most 32"),
        (["--form", "lora", "-o", file, "--text_path", stable_diffusion], "no difference to export"),
        (["--form", "lora", "-o", file, "--text_path", ""], "--text_path is missing"),
        (["--form", "clip_l", "-o", file, "--text_path", tmp_path / "nan.safetensors"], "holds NaN or infinity"),
        (
            ["--form", "clip_l", "-o", file, "--text_path", tmp_path / "other.safetensors"],
            "hidden size 48, but .* has 32",
        ),
        (["--form", "clip_l", "-o", file, "--text_path", tmp_path / "no.safetensors"], "no such weights"),
        (
            ["--form", "text_encoder", "-o", folder, "--half", "--text_path", tmp_path / "large.safetensors"],
            "too large for",
        ),
        (["--form", "clip_l", "-o", file, "--push_to_hub", "a/b/c"], "expected USER/NAME"),
        (["--form", "clip_l", "-o", file, "--run", taken], "no options.json in it"),
        (["--form", "clip_l", "-o", file, "--model", tmp_path / "none"], "no such model"),
    ):
        argv = ["--text_path", tuned, "--model", stable_diffusion, *options]
        with pytest.raises(UserError, match=message) as refused:
            export.main([str(word) for word in argv])
        assert "\n" not in str(refused.value)
    assert not file.exists() and not folder.exists()


def test_mistakes_are_answered_before_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported torch')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for words, message in (
        (["export.py", "--text_path", "x"], "error: --output_path is missing"),
        (["merge.py", "a.safetensors=much", "-o", "c.safetensors"], "error: a.safetensors=much: much is not a weight"),
    ):
        command = [sys.executable, ROOT / words[0], *words[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stderr.startswith(message), done.stderr


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as making a repository, committing to it and reading files from it need."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, files = unquote(self.path), self.server.files
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == "Bearer hf_right"
            return self.answer(200 if known else 401, {"name": "ada", "type": "user"})
        repo, _, name = path[1:].partition("/resolve/")
        content = files.get(f"{repo}/{name.partition('/')[2]}")
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        self.answer(200, content, ETag=f'"{sha256(content).hexdigest()}"', X_Repo_Commit="1" * 40)

    do_HEAD = do_GET

    def do_PUT(self):  # a large file goes to its own address
        self.server.large[self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            repo = self.server.made[-1]
            if repo.get("organization") != "ada":
                return self.answer(403, {"error": "not yours"})
            return self.answer(200, {"url": f"{self.server.url}/ada/{repo['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            modes = [("lfs" if f["path"].endswith(".safetensors") else "regular", f) for f in json.loads(body)["files"]]
            files = [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for mode, f in modes]
            return self.answer(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/upload/{item['oid']}"}}
            return self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/json")
        if self.path.endswith("/commit/main"):
            repo = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[f"{repo}/{value['path']}"] = b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[f"{repo}/{value['path']}"] = self.server.large[value["oid"]]
            return self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40})
        self.answer(404, {"error": self.path})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.large, server.made, server.daemon_threads = {}, {}, [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


PUSH = """
import json, os, sys
import torch
from huggingface_hub import constants
from transformers import CLIPTextModel
import export
from textcraftor.errors import UserError

arguments, cases, loaded = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
for token, endpoint, repo in cases:
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {"HF_TOKEN": token} if token else {}
    constants.ENDPOINT = endpoint or os.environ["HF_ENDPOINT"]
    try:
        export.main([*arguments, "--push_to_hub", repo, "-o", f"{loaded}_{repo.replace('/', '_')}"])
    except UserError as refused:
        print("refused:", refused)
encoder = CLIPTextModel.from_pretrained("ada/tuned")
torch.save(encoder(torch.arange(77)[None]).last_hidden_state, loaded)
"""


def test_the_hub_gets_the_encoder_with_a_card(hub, stable_diffusion, tuned, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tuned, run / "tc_text_e_0_iter_40.safetensors")
    (run / "tc_text.safetensors").symlink_to("tc_text_e_0_iter_40.safetensors")
    options = {"reward weights": {"clip": 0.5, "my_reward": 2}, "lr_text": 1e-6, "images per step": 32, "guidance": 7.5}
    options |= {"grad_steps": "1-5", "method": "prompts", "ema": 0.0, "anchor": 0.1, "prompts": "/home/ada/secret.csv"}
    tiny.write_json(run / "options.json", options)
    (run / "metrics.csv").write_text(
        "step,total,clip,val_total,val_clip\n0,,,1.5,0.25\n20,1,0.2,3,0.5\n30,1,0.2,,\n40,1,0.2,2.5,0.75\n"
    )
    (run / "before_after.png").write_bytes(b"\x89PNG")
    arguments = ["--text_path", str(run / "tc_text.safetensors"), "--model", str(stable_diffusion)]
    cases = [
        ("", "", "ada/tuned"),
        ("hf_wrong", "", "ada/tuned"),
        ("hf_right", "http://127.0.0.1:9", "ada/tuned"),
        ("hf_right", "", "bob/tuned"),
        ("hf_right", "", "ada/tuned"),
    ]
    unset = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    words = [json.dumps([*arguments, "--form", "text_encoder", "--private"]), json.dumps(cases), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", PUSH, *words], env=unset | environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refusals = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    for line, words in zip(
        refusals,
        ("not logged in; run `hf auth login`", "refused (401)", ":9 cannot be used", "refused (403)"),
        strict=True,
    ):
        assert words in line
    assert "write access to bob" in refusals[-1] and refusals[-1].endswith(f"remove {tmp_path / 'out_bob_tuned'}")
    assert f"{hub.url}/ada/tuned" in done.stdout and "private" in json.dumps(hub.made[-1])
    names = {"README.md", "before_after.png", "config.json", "model.safetensors"}
    assert hub.files.keys() == {f"ada/tuned/{name}" for name in names}

    reference = CLIPTextModel.from_pretrained(stable_diffusion, subfolder="text_encoder")
    load_text_encoder(reference, tuned)
    found = torch.load(tmp_path / "out", weights_only=True)
    torch.testing.assert_close(found, reference(torch.arange(77)[None]).last_hidden_state, rtol=0, atol=1e-5)
    card = hub.files["ada/tuned/README.md"].decode()
    for line in (
        "| clip | 0.5 |", "| my_reward | 2 |", "| learning rate, text encoder | 1e-06 |",
        "| steps with gradient | 1-5 |", "| anchor | 0.1 |", "| images per update | 32 |",
        "| updates | 40 |", "| total | 1.5000 | 2.5000 | +1.0000 |  |", "| clip | 0.2500 | 0.7500 | +0.5000 |  |",
        "library_name: diffusers", "![held-out prompts before and after tuning](before_after.png)",
    ):  # fmt: skip
        assert f"\n{line}\n" in card, line
    assert "moving average" not in card and "/home/ada" not in card and str(tmp_path) not in card


def test_cards_tell_which_weights_they_are_of_and_their_intervals(stable_diffusion, tmp_path):
    tiny.write_json(tmp_path / "options.json", {"clip": 0.5, "hpsv2": 1})  # as runs of earlier versions
    (tmp_path / "metrics.csv").write_text("step,val_total,val_clip\n0,1,0.5\n20,3,0.75\n40,2,1.5\n")
    scores = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    (tmp_path / "resume").mkdir()
    for name, score in (("before", scores), ("after", scores + 1)):
        save_look({"total": score, "clip": score + 0}, torch.zeros(1), 40, tmp_path / "resume" / f"{name}.safetensors")
    (tmp_path / "before_after.png").touch()

    def card(name, run=tmp_path, form="text_encoder"):
        training = run_parts(run, str(tmp_path / name))
        return model_card("ada/x", form, "x.safetensors", str(stable_diffusion), training, "note", {})

    best, last, other = (card(f"tc_text{name}.safetensors") for name in ("_best", "_e_0_iter_40", ""))
    assert "| updates | 20 |" in best and "| clip | 0.5000 | 0.7500 | +0.2500 |  |" in best
    assert "| updates | 40 |" in last and "| clip | 0.5000 | 1.5000 | +1.0000 | +1.0000 … +1.0000 |" in last
    assert "before_after.png" in last and "before_after.png" not in best
    # Trained on, and stopped: the scores of each prompt, and the picture, are still those of update 40.
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("60,4,2.5\n")
    later = card("tc_text_e_0_iter_60.safetensors")
    assert "| clip | 0.5000 | 2.5000 | +2.0000 |  |" in later and "before_after.png" not in later
    assert "+1.0000 … +1.0000" in card("tc_text_e_0_iter_40.safetensors")
    assert "updates" not in other and "| clip | 0.5 |" in other and "| hpsv2 | 1 |" in other
    assert "Training" not in card("x", None) and "models/loras" in card("x", None, "lora_kohya")
    (tmp_path / "metrics.csv").write_text("step,val_total\n0,high\n")
    with pytest.raises(UserError, match="metrics.csv: cannot be read"):
        card("x")


def test_the_lines_of_a_card_use_the_encoder_as_in_the_paper(stable_diffusion, tuned, tmp_path):
    """The original encoder in the first ten of 25 steps, the tuned one in the last 15: the images of make_images; and
    where an encoder was trained for other steps, in those."""
    model = load_model(str(stable_diffusion))
    full = exported("lora", tuned, stable_diffusion, tmp_path / "full.safetensors", "--lora_rank", "32")
    state, lora = read_text_encoder(stable_diffusion, ""), load_file(full)
    for name in list(state):
        layer = f"text_encoder.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in lora:
            state[name] = state[name] + lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
    save_text_encoder(state, tmp_path / "full_rank.safetensors")
    encoder_folder, as_in_the_paper = tmp_path / "encoder", {"step": 25, "grad_steps": 15, "guidance": 7.5}
    for form, path, weights, settings in (
        ("diffusers", exported("diffusers", tuned, stable_diffusion, tmp_path / "whole"), tuned, {}),
        ("text_encoder", exported("text_encoder", tuned, stable_diffusion, encoder_folder), tuned, {}),
        ("text_encoder", encoder_folder, tuned, {"step": 10, "grad_steps": 10, "guidance": 4.0}),  # in all steps
        ("text_encoder", encoder_folder, tuned, {"step": 10, "grad_steps": 6, "prompt_weighting": 0.5}),
        ("lora", full, tmp_path / "full_rank.safetensors", {}),
    ):
        card = model_card("ada/x", form, path.name, str(stable_diffusion), [], "", settings)
        settings = as_in_the_paper | settings
        code = card.split("```python\n")[1].split("```")[0]
        assert len(code.strip().splitlines()) <= (18 if "prompt_weighting" in settings else 16)
        code = code.replace('"ada/x"', repr(str(tmp_path if form == "lora" else path)))
        code = code.replace(f'"{stable_diffusion.name}"', repr(str(stable_diffusion)))
        head, last, _ = code.rpartition("image =")
        names = {}
        exec(head, names)
        torch.manual_seed(0)
        exec(last + _, names)
        torch.manual_seed(0)
        noise = torch.randn(1, *latent_shape(model))
        encoder = copy.deepcopy(model.text_encoder)
        load_text_encoder(encoder, weights)
        scheduler = make_scheduler(model.scheduler_config, settings["step"])
        how = {"tuned_steps": settings["grad_steps"], "guidance": settings["guidance"]}
        how["weighting"] = settings.get("prompt_weighting", 1)
        with torch.no_grad():
            wanted = make_images(make_networks(model, encoder), scheduler, [names["prompt"]], noise, **how)[0]
        pixels = torch.from_numpy(np.array(names["image"])).permute(2, 0, 1) / 255
        torch.testing.assert_close(pixels, wanted, rtol=0, atol=1.5 / 255)


TRANSFORMERS_4 = """
import sys
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

folder, lora, encoder, output = sys.argv[1:]
assert transformers.__version__.startswith("4.")
_, info = CLIPTextModel.from_pretrained(encoder, output_loading_info=True)
assert not any(info.values()), info
CLIPTokenizer.from_pretrained(f"{folder}/tokenizer")
pipeline = StableDiffusionPipeline.from_pretrained(folder)
draw = lambda: pipeline("a red fox, 4k", num_inference_steps=3, generator=torch.Generator().manual_seed(0),
                        output_type="np").images
images = [draw()]
pipeline.load_lora_weights(lora, weight_name="lora.safetensors")
np.save(output, np.concatenate([*images, draw()]))
"""


@pytest.mark.slow
def test_what_is_exported_loads_in_transformers_4(stable_diffusion, tuned, expected, tmp_path):
    """In the last versions before transformers 5, from PyPI, in a folder of their own."""
    packages = ["transformers==4.57.3", "huggingface-hub==0.36.0", "tokenizers==0.22.1", "diffusers==0.35.2"]
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--retries", "1", "--timeout", "20"]
    done = subprocess.run(
        [*pip, "--target", str(tmp_path / "packages"), *packages, "peft==0.17.1"], capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"transformers 4 cannot be installed from PyPI: {done.stderr.strip().splitlines()[-1]}")
    folder = exported("diffusers", tuned, stable_diffusion, tmp_path / "whole")
    encoder = exported("text_encoder", tuned, stable_diffusion, tmp_path / "encoder")
    lora = exported("lora", tuned, stable_diffusion, tmp_path / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(lora)
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS_4, folder, tmp_path, encoder, tmp_path / "images.npy"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "packages"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain, with_lora = np.load(tmp_path / "images.npy")
    np.testing.assert_allclose(plain, expected[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(with_lora, images(pipeline)[0], rtol=0, atol=1e-4)
