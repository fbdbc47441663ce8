"""Loading a diffusers folder: SD v1.5's old spellings, and what is damaged said in one line."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from textcraftor.errors import UserError
from textcraftor.models import load_model


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
    with pytest.raises(UserError, match="could not be loaded") as error:
        load_model(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
