"""The difference of two text encoders as a LoRA: the best approximation of rank R for each linear layer."""

from typing import NamedTuple

import torch

from textcraftor.errors import UserError
from textcraftor.lora_files import Factors


class LoraError(NamedTuple):
    """How well a LoRA approximates a difference D of weights; |.| are Frobenius norms."""

    mean: float  # over linear layers that changed, of |D - up @ down| / |D|
    largest: float
    largest_layer: str
    not_covered: float  # share of |D|² over all weights that lies in embeddings, norms and biases, which no LoRA holds
    total: float  # |D - LoRA| / |D| over all weights, those not covered included

    def __str__(self):
        return (
            f"relative error of the linear layers: mean {self.mean:.2%}, largest {self.largest:.2%} "
            f"({self.largest_layer}); {self.not_covered:.2%} of the squared change is in embeddings, norms and biases, "
            f"which a LoRA leaves out; relative error over all weights: {self.total:.2%}"
        )


def lora_of_difference(
    original: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], rank: int
) -> tuple[dict[str, Factors], LoraError]:
    """Truncated singular value decomposition of each linear layer's change (Eckart and Young, 1936).

    original, tuned: state dicts under public names. Returns {layer, such as
    text_model.encoder.layers.0.self_attn.q_proj: Factors, fp32} and the error made. Raises UserError if the encoders
    are equal, or if a layer has fewer than `rank` inputs or outputs.
    """
    factors, errors, squared = {}, {}, {"missed": 0.0, "not covered": 0.0, "all": 0.0}
    for name, weight in original.items():
        change = tuned[name].float() - weight.float()
        size = change.double().square().sum().item()
        squared["all"] += size
        layer, _, kind = name.rpartition(".")
        if not (".layers." in name and kind == "weight" and change.ndim == 2):
            squared["not covered"] += size
            continue
        if rank > min(change.shape):
            raise UserError(f"--lora_rank {rank}: too large for {layer}; use at most {min(change.shape)}")
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        root = s[:rank].sqrt()
        factors[layer] = Factors(root[:, None] * v[:rank], u[:, :rank] * root)
        missed = s[rank:].double().square().sum().item()
        squared["missed"] += missed
        if size:
            errors[layer] = (missed / size) ** 0.5
    if not squared["all"]:
        raise UserError("--text_path and --model have the same text encoder: there is no difference to export")
    errors = errors or {"none changed": 0.0}
    largest = max(errors, key=errors.get)
    not_covered = squared["not covered"] / squared["all"]
    total = ((squared["missed"] + squared["not covered"]) / squared["all"]) ** 0.5
    return factors, LoraError(sum(errors.values()) / len(errors), errors[largest], largest, not_covered, total)
