"""LoRA in training: low-rank changes of layers by peft (https://arxiv.org/abs/2106.09685), saved and loaded."""

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from textcraftor.errors import UserError
from textcraftor.lora_files import Factors, diffusers_lora, kohya_lora, kohya_metadata
from textcraftor.weights import check_finite, check_fit, read_weights, save_tensors

# The layers that get a LoRA: all linear ones of the text encoder, and the UNet's attention.
LAYERS = {
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
}
ADAPTER = "default"  # peft's name for the only LoRA of a network


def add_lora(network: nn.Module, part: str, rank: int, alpha: float, seed: int) -> None:
    """Freeze `network` in place and add a LoRA to its LAYERS, in fp32 and in training, which at first changes nothing.

    part: "text_encoder" or "unet"; seed: of the random weights in `down` (uniform, as in nn.Linear; `up` is 0).
    Raises UserError if the rank exceeds a layer's inputs or outputs.
    """
    network.requires_grad_(False)
    endings = tuple(f".{name}" for name in LAYERS[part])
    for name, layer in network.named_modules():
        if name.endswith(endings) and rank > min(layer.weight.shape):
            raise UserError(f"--lora_rank {rank}: too large for {name}; use at most {min(layer.weight.shape)}")
    # peft would make the new weights in the network's own precision; so it makes them without contents.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[*LAYERS[part]])
    inject_adapter_in_model(config, network, low_cpu_mem_usage=True)
    device = next(network.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for down, up in _adapters(network).values():
            fresh = nn.Linear(down.in_features, down.out_features, bias=False, device="cpu")  # the same on all devices
            down.weight = nn.Parameter(fresh.weight.data.to(device))
            up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=device))


def save_lora(network: nn.Module, part: str, path: Path | str, metadata: dict[str, str]) -> None:
    """Write the LoRA that add_lora added in kohya's format, fp32: A1111, ComfyUI and diffusers read it."""
    factors = trained_factors(network, part)
    (rank, alpha) = next((len(down), scale * len(down)) for down, _, scale in factors.values())
    save_tensors(kohya_lora(part, factors), path, metadata | kohya_metadata(rank, alpha))


def save_diffusers_lora(network: nn.Module, part: str, path: Path | str, metadata: dict[str, str]) -> None:
    """Write the LoRA that add_lora added in diffusers' format, fp32."""
    save_tensors(diffusers_lora(part, trained_factors(network, part)), path, metadata)


def trained_factors(network: nn.Module, part: str) -> dict[str, Factors]:
    """The LoRA that add_lora added, by layer under public names; part: "text_encoder" or "unet"."""
    scales = {name: module.scaling[ADAPTER] for name, module in network.named_modules() if hasattr(module, "lora_A")}
    factors = {}
    for name, (down, up) in _adapters(network).items():
        public = f"text_model.{name.removeprefix('text_model.')}" if part == "text_encoder" else name
        factors[public] = Factors(down.weight, up.weight, scales[name])
    return factors


def load_lora(network: nn.Module, part: str, path: Path | str) -> None:
    """Load what save_lora wrote into the LoRA that add_lora added, strictly and in place.

    Raises UserError if layers, rank or alpha differ, and for NaN or infinity.
    """
    saved, own = read_weights(path), kohya_lora(part, trained_factors(network, part))
    check_fit(path, "LoRA", saved, own)
    for name, value in own.items():
        if name.endswith(".alpha") and saved[name] != value:
            raise UserError(f"{path}: {name} is {saved[name]:g}, not {value:g}; use the --lora_alpha of its training")
    check_finite(saved, path)
    with torch.no_grad():
        for name, value in saved.items():
            own[name].copy_(value)


def _adapters(network):
    """{layer: (down, up)}, the two linear layers that peft added to each."""
    return {
        name: (module.lora_A[ADAPTER], module.lora_B[ADAPTER])
        for name, module in network.named_modules()
        if hasattr(module, "lora_A")
    }
