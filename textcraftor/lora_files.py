"""LoRA files: low-rank changes of layers, W + (alpha / R) up @ down (https://arxiv.org/abs/2106.09685).

Two formats are written: that of kohya's scripts, which A1111, ComfyUI and diffusers read and which keeps alpha, and
diffusers' own, where `up` is scaled since many programs expect no alpha in it. Both are read, and diffusers' older
names.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open

from textcraftor.errors import UserError
from textcraftor.weights import State, check_finite

KOHYA_PREFIX = {"text_encoder": "lora_te_", "unet": "lora_unet_"}
KINDS = ("lora_A.", "lora_B.", "lora_up.", "lora_down.", ".lora.", "_lora.", "lora_linear_layer.", ".alpha")
ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' key for peft's settings in a file's header


class Factors(NamedTuple):
    """The LoRA of one layer, which adds scale * up @ down to its weights."""

    down: torch.Tensor  # (R, inputs), or (R, inputs, h, w) for a convolution
    up: torch.Tensor  # (outputs, R), or (outputs, R, 1, 1)
    scale: float = 1.0  # alpha / R


def diffusers_lora(part: str, factors: dict[str, Factors]) -> dict[str, torch.Tensor]:
    """The names that `pipeline.load_lora_weights` and ComfyUI read. part: "text_encoder" or "unet"."""
    state = {}
    for layer, (down, up, scale) in factors.items():
        state |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up * scale}
    return state


def kohya_lora(part: str, factors: dict[str, Factors]) -> dict[str, torch.Tensor]:
    """The names of kohya's scripts, which A1111, ComfyUI and diffusers read; alpha = scale * R."""
    state = {}
    for layer, (down, up, scale) in factors.items():
        name = kohya_name(part, layer)
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        state |= {f"{name}.alpha": torch.tensor(scale * len(down))}
    return state


def kohya_name(part: str, layer: str) -> str:
    return KOHYA_PREFIX[part] + layer.replace(".", "_")


def kohya_metadata(rank: int, alpha: float) -> dict[str, str]:
    """What kohya's scripts and the tools that list LoRAs read about a file."""
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
        "ss_base_model_version": "sd_v1",
    }


def is_lora(states: list[State]) -> bool:
    """Whether a file holds a LoRA and nothing else, in kohya's or diffusers' format, new or old."""
    names = [name for state in states for name in state.tensors]
    return bool(names) and all(any(kind in name for kind in KINDS) for name in names)


def check_lora(states: list[State], part: str, path: Path | str) -> None:
    """Raise UserError unless a file's LoRA is of a Stable Diffusion v1 and changes `part`, as far as names tell."""
    names = [name for state in states for name in state.tensors]
    if any(name.startswith(("lora_te1_", "lora_te2_", "text_encoder_2.")) for name in names):
        raise UserError(f"{path}: is a LoRA of Stable Diffusion XL; expected one of a Stable Diffusion v1")
    if not any(name.startswith((KOHYA_PREFIX[part], f"{part}.")) for name in names):
        network, option = ("text encoder", "--unet_path") if part == "text_encoder" else ("UNet", "--text_path")
        raise UserError(f"{path}: is a LoRA that does not change the {network}; the test programs take it as {option}")


def with_lora(
    weights: dict[str, torch.Tensor], states: list[State], part: str, path: Path | str
) -> dict[str, torch.Tensor]:
    """The weights of a network, a state dict under public names, with the LoRA in a file added to them.

    part: "text_encoder" or "unet"; states: read_states(path). A file that changes both networks can be given for each.
    Raises UserError unless every layer of the LoRA is in the network and has its shape, and for NaN or infinity.
    """
    check_lora(states, part, path)
    layers = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    weights = dict(weights)
    for layer, (down, up, scale) in _read_factors(states, part, layers, path).items():
        weight = weights.get(f"{layer}.weight")
        if weight is None or weight.shape != (len(up), *down.shape[1:]) or up.flatten(1).shape[1] != len(down):
            found = "has no such layer" if weight is None else f"has {tuple(weight.shape)} there"
            raise UserError(
                f"{path}: its LoRA of {layer} has the shapes {tuple(up.shape)} and {tuple(down.shape)}, but the model "
                f"{found}; expected a LoRA trained on this model"
            )
        change = scale * (up.double().flatten(1) @ down.double().flatten(1)).view(weight.shape)
        weights[f"{layer}.weight"] = (weight.cpu().double() + change).to(weight)  # Apple's GPUs have no float64
    check_finite(weights, path)
    return weights


def _read_factors(states, part, layers, path):
    """{layer: Factors}; layers: those of the network, which kohya's names flatten."""
    tensors = {name: value for state in states for name, value in state.tensors.items()}
    names, prefix = {kohya_name(part, layer): layer for layer in layers}, KOHYA_PREFIX[part]
    alphas, kohya, others = {}, {}, {}
    for name, value in tensors.items():
        key, _, kind = name.partition(".")
        if name.startswith(prefix):
            layer = names.get(key, key)
            if kind == "alpha":
                alphas[layer] = float(value)
            else:
                kohya[f"{layer}.{kind.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}"] = value
        elif name.startswith(f"{part}."):
            others[name.removeprefix(f"{part}.").replace(".processor.", ".")] = value
    if any("lora_A." not in name and "lora_B." not in name for name in others):  # diffusers' names before it used peft
        others = (convert_unet_state_dict_to_peft if part == "unet" else convert_state_dict_to_peft)(others)
    halves = kohya | others
    settings = _adapter_settings(path, part)
    factors = {}
    for name in [name for name in halves if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        down, up = halves.pop(name), halves.pop(f"{layer}.lora_B.weight", None)
        if up is None:
            raise UserError(f"{path}: {layer} has only one of the two halves of a LoRA; fetch the file again")
        alpha = alphas.get(layer, settings.get("alpha_pattern", {}).get(layer, settings.get("lora_alpha", len(down))))
        factors[layer] = Factors(down, up, alpha / len(down))
    if halves or settings.get("use_rslora") or settings.get("use_dora"):
        found = next(iter(halves), "rsLoRA or DoRA")
        raise UserError(f"{path}: unsupported kind of LoRA ({found}); expected plain lora_A and lora_B matrices")
    return factors


def _adapter_settings(path, part):
    """peft's settings for a part, which diffusers writes into the header of newer files; {} if there are none."""
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get(ADAPTER_METADATA, "{}"))
    except (SafetensorError, OSError):  # a pickle, which has no header, or a folder
        return {}
    return {name.removeprefix(f"{part}."): value for name, value in settings.items() if name.startswith(f"{part}.")}
