"""A Stable Diffusion v1 under the names of the original code, in one file, as A1111, ComfyUI and others read it.

diffusers can read these names but not write them. This module writes them, and checks each conversion: diffusers' own
converter must turn the result back into the same weights.
"""

import re

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_TO_LDM_MAPPING,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)

from textcraftor.errors import UserError
from textcraftor.weight_files import LDM_UNET, LDM_VAE

LDM_TEXT = "cond_stage_model.transformer."
UNET_ENDS = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]
VAE_ENDS = DIFFUSERS_TO_LDM_MAPPING["vae"]
# Parts of the UNet's residual blocks and of the VAE's attention: (diffusers' name, the original one).
# fmt: off
RESIDUAL = {
    "norm1":         "in_layers.0",
    "conv1":         "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2":         "out_layers.0",
    "conv2":         "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {
    "group_norm":    "norm",
    "to_q":          "q",
    "to_k":          "k",
    "to_v":          "v",
    "to_out.0":      "proj_out",
}
# fmt: on


def original_text(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a text encoder's state dict from public names to those in a whole checkpoint, and add position_ids."""
    positions = len(state["text_model.embeddings.position_embedding.weight"])
    original = {f"{LDM_TEXT}{name}": value for name, value in state.items()}
    # Not a weight but a constant, which older programs expect.
    return original | {f"{LDM_TEXT}text_model.embeddings.position_ids": torch.arange(positions)[None]}


def original_unet(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The UNet's state dict under the original code's names. Raises UserError for parts that it does not know."""
    state, layers = unet.state_dict(), unet.config.layers_per_block
    kinds = unet.config.up_block_types
    if not isinstance(layers, int):
        raise UserError(
            "the UNet has different numbers of layers in its levels, which the original code cannot express; use "
            "--form diffusers"
        )
    names = {name: _unet_name(name, layers, kinds) for name in state}
    original = {f"{LDM_UNET}{names[name]}": value for name, value in state.items()}
    _check(state, convert_ldm_unet_checkpoint(original, dict(unet.config)), "UNet")
    return original


def _unet_name(name, layers, up_kinds):
    """Level i has `layers` residual blocks on the way down and one more on the way up, each with its attention."""
    if name in UNET_ENDS:
        return UNET_ENDS[name]
    part = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.([a-z]+)\.(\d+)\.(.+)", name)
    if not part:
        return name
    way, level, kind, number, rest = part.groups()
    level, number = int(level or 0), int(number)
    if kind == "resnets":
        inner, _, weight = rest.rpartition(".")
        rest = f"{RESIDUAL.get(inner, inner)}.{weight}"
    if way is None:
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        last = 2 if up_kinds[level].startswith("CrossAttn") else 1
        return f"output_blocks.{(layers + 1) * (level + 1) - 1}.{last}.{rest}"
    block = (layers + 1) * level + number
    place = f"input_blocks.{block + 1}" if way == "down" else f"output_blocks.{block}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{rest}"


def original_vae(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """The VAE's state dict under the original code's names, where attention is made of 1 × 1 convolutions.

    Raises UserError for parts that the original code does not know.
    """
    state, levels = vae.state_dict(), len(vae.config.block_out_channels)
    original = {}
    for name, value in state.items():
        is_attention = ".attentions." in name
        shaped = value[..., None, None] if is_attention and value.ndim == 2 else value
        original[f"{LDM_VAE}{_vae_name(name, levels)}"] = shaped
    _check(state, convert_ldm_vae_checkpoint(dict(original), dict(vae.config)), "VAE")
    return original


def _vae_name(name, levels):
    """diffusers counts the decoder's levels from the latents, the original code from the image."""
    if name in VAE_ENDS:
        return VAE_ENDS[name]
    part = re.fullmatch(r"(..)coder\.(?:(down|up)_blocks\.(\d+)|mid_block)\.([a-z]+)\.(\d+)\.(.+)", name)
    if not part:
        return name
    coder, way, level, kind, number, rest = part.groups()
    number = int(number)
    if kind == "attentions":
        inner, _, weight = rest.rpartition(".")
        return f"{coder}coder.mid.attn_{number + 1}.{ATTENTION.get(inner, inner)}.{weight}"
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if way is None:
        return f"{coder}coder.mid.block_{number + 1}.{rest}"
    level = int(level) if way == "down" else levels - 1 - int(level)
    inner = f"block.{number}" if kind == "resnets" else f"{kind.removesuffix('rs')}"
    return f"{coder}coder.{way}.{level}.{inner}.{rest}"


def _check(state, converted, network):
    """Raise UserError unless diffusers' own converter leads back to `state`."""
    same = state.keys() == converted.keys() and all(
        state[name].shape == converted[name].shape and state[name].data_ptr() == converted[name].data_ptr()
        for name in state
    )
    if not same:
        strange = next((name for name in state if name not in converted), next(iter(state)))
        raise UserError(
            f"the {network} is built unlike Stable Diffusion v1's and has no names in the original code (first: "
            f"{strange}); export with --form diffusers instead"
        )
