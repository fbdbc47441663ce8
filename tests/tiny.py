"""Tiny models with seeded random weights in the file formats of the real ones, with CLIP's real vocabulary."""

import json
import re
from functools import partial
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from open_clip.tokenizer import default_bpe
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from textcraftor.embeddings import encode_prompts, guidance_pair
from textcraftor.sampling import predict_noise, sample_last_k

EMBEDDING = 32  # what the towers of make_rewards embed into
IMAGE_SIZE = 32  # their input; make_stable_diffusion makes 64 x 64 pixels
HEAD_WIDTHS = (EMBEDDING, 32, 16, 8, 4, 1)

OPEN_CLIP = {
    "embed_dim": EMBEDDING,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}

# What transformers 4 wrote for CLIP text and vision towers; eos_token_id 2 is the historical default.
TEXT_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": EMBEDDING,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
VISION_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "projection_dim": EMBEDDING,
    "hidden_act": "gelu",
}


def make_rewards(root: Path) -> Path:
    """Write the weights of all four rewards below `root`, laid out as the real ones; returns `root`."""
    root = Path(root)
    make_open_clip_folder(root / "clip", OPEN_CLIP, seed=0)
    make_hpsv2(root / "hpsv2")
    make_pickscore(root / "pickscore" / "pickmodel")
    make_aesthetic(root / "aesthetic")
    return root


def make_open_clip_folder(folder: Path, config: dict, seed: int) -> None:
    """An open_clip folder: open_clip_config.json and open_clip_model.safetensors."""
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    save_file(open_clip_weights(folder, seed), folder / "open_clip_model.safetensors")


def make_hpsv2(folder: Path) -> None:
    """HPS_v2_compressed.pt, a pickled {'state_dict': open_clip CLIP}, and the small architecture beside it."""
    write_json(folder / "open_clip_config.json", {"model_cfg": OPEN_CLIP, "preprocess_cfg": {}})
    torch.save({"state_dict": open_clip_weights(folder, seed=1)}, folder / "HPS_v2_compressed.pt")


def make_aesthetic(folder: Path) -> None:
    """The head's .pth with the released file's keys, and OpenAI's kind of tower (QuickGELU) in clip/."""
    make_open_clip_folder(folder / "clip", OPEN_CLIP | {"quick_gelu": True}, seed=2)
    generator = torch.Generator().manual_seed(3)
    state = {}
    for layer, width, next_width in zip((0, 2, 4, 6, 7), HEAD_WIDTHS[:-1], HEAD_WIDTHS[1:], strict=True):
        state[f"layers.{layer}.weight"] = torch.randn(next_width, width, generator=generator) * width**-0.5
        state[f"layers.{layer}.bias"] = torch.randn(next_width, generator=generator)
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")


def make_pickscore(folder: Path) -> None:
    """A CLIPModel folder as transformers 4 wrote it, position ids included; no tokenizer files."""
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "logit_scale_init_value": 2.6592,
        "projection_dim": EMBEDDING,
        "text_config": {"model_type": "clip_text_model", "hidden_act": "gelu", **TEXT_CONFIG},
        "torch_dtype": "float32",
        "transformers_version": "4.27.3",
        "vision_config": {"model_type": "clip_vision_model", **VISION_CONFIG},
    }
    write_json(folder / "config.json", config)
    state = seeded(4, lambda: CLIPModel(CLIPConfig.from_pretrained(folder))).state_dict()
    state["logit_scale"] = torch.tensor(4.6052)
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange((IMAGE_SIZE // 8) ** 2 + 1)[None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def make_stable_diffusion(folder: Path) -> Path:
    """Write a diffusers folder in SD v1.5's format (64 x 64 images, 4 x 8 x 8 latents); returns `folder`."""
    folder = Path(folder)
    model_index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    scheduler = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    write_json(folder / "model_index.json", model_index)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    make_tokenizer(folder / "tokenizer")
    make_text_encoder(folder / "text_encoder")
    seeded(6, make_unet).save_pretrained(folder / "unet")
    seeded(7, make_vae).save_pretrained(folder / "vae")
    return folder


def make_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer files as transformers 4 wrote them, from the vocabulary that open_clip ships."""
    bpe = open_clip.SimpleTokenizer(default_bpe())
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    write_json(folder / "vocab.json", {renamed.get(token, token): index for token, index in bpe.encoder.items()})
    merges = ["#version: 0.2", *(" ".join(pair) for pair in bpe.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    write_json(folder / "special_tokens_map.json", special)
    config = {"add_prefix_space": False, "do_lower_case": True, "model_max_length": 77}
    write_json(folder / "tokenizer_config.json", config | special | {"tokenizer_class": "CLIPTokenizer"})


def make_text_encoder(folder: Path) -> None:
    """A CLIPTextModel folder as transformers 4 wrote it: keys text_model.…, position ids included."""
    config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu"}
    write_json(folder / "config.json", config | TEXT_CONFIG | {"transformers_version": "4.22.0.dev0"})
    encoder = seeded(5, lambda: CLIPTextModel(CLIPTextConfig.from_pretrained(folder)))
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in encoder.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_CONFIG["hidden_size"],
        attention_head_dim=2,
        norm_num_groups=8,
    )


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )


# Parts of residual blocks in diffusers' names and in those of the original code's checkpoints.
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
UNET_ENDS |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}


def original_unet_name(name: str, layers: int) -> str:
    """A UNet2DConditionModel's weight, `layers` residual blocks a level, as the original code's checkpoints call it."""
    stem, kind = name.rsplit(".", 1)
    if stem in UNET_ENDS:
        return f"{UNET_ENDS[stem]}.{kind}"
    place, number, rest = re.fullmatch(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.\w+\.(\d+)\.?(.*)", stem).groups()
    part, number = stem.removeprefix(f"{place}.").split(".")[0], int(number)
    level = int(place.split(".")[1]) if "." in place else 0
    if part == "downsamplers":
        return f"input_blocks.{(layers + 1) * (level + 1)}.0.op.{kind}"
    if part == "upsamplers":  # after the attention, where the level has one; the first has none
        return f"output_blocks.{(layers + 1) * (level + 1) - 1}.{1 if level == 0 else 2}.conv.{kind}"
    if place == "mid_block":
        block = f"middle_block.{1 if part == 'attentions' else 2 * number}"
    else:
        first = 1 if place.startswith("down") else 0
        block = f"{'input' if first else 'output'}_blocks.{(layers + 1) * level + number + first}"
        block += ".1" if part == "attentions" else ".0"
    return f"{block}.{RESNET[rest] if part == 'resnets' else rest}.{kind}"


def original_vae(state: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """An AutoencoderKL's state dict as in the original code's checkpoints, where attention is 1 x 1 convolutions."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    original = {}
    for name, value in state.items():
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", name)
        name = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", name
        )
        if "mid_block.attentions.0." in name:
            start, part = name.split("mid_block.attentions.0.")
            part, kind = part.rsplit(".", 1)
            name = f"{start}mid.attn_1.{attention[part]}.{kind}"
            value = value[..., None, None] if value.ndim == 2 else value
        original[name] = value
    return original


def original_checkpoint(text_encoder, unet, vae) -> dict[str, torch.Tensor]:
    """The three networks as one SD v1 checkpoint of the original code, as most people have it."""
    layers, levels = unet.config.layers_per_block, len(vae.config.block_out_channels)
    state = {"alphas_cumprod": torch.ones(1000), "model_ema.num_updates": torch.tensor(0)}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for name, value in text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    for name, value in unet.state_dict().items():
        state[f"model.diffusion_model.{original_unet_name(name, layers)}"] = value
    for name, value in original_vae(vae.state_dict(), levels).items():
        state[f"first_stage_model.{name}"] = value
    return state


def open_clip_weights(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Random weights of the architecture in the folder's open_clip_config.json."""
    return seeded(seed, lambda: open_clip.create_model(f"local-dir:{folder}", load_weights=False)).state_dict()


def seeded(seed: int, build):
    """build() under its own seed, the global generator left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def embed(tokenizer, text_encoder, prompts: list[str]) -> torch.Tensor:
    """Text embeddings (2B, L, D) of B prompts, the unconditional ones first."""
    return guidance_pair(encode_prompts(tokenizer, text_encoder, ["", *prompts]))["encoder_hidden_states"]


def sample_latents(unet, scheduler, noise, original, tuned, guidance, tuned_steps, checkpoint=True) -> torch.Tensor:
    """The project's sampler on plain text embeddings (2B, L, D) -> z_0."""
    conditions = [{"encoder_hidden_states": embeddings} for embeddings in (original, tuned)]
    return sample_last_k(partial(predict_noise, unet, guidance), scheduler, noise, *conditions, tuned_steps, checkpoint)
