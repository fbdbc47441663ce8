"""Mix several tuned text encoders: Σ wᵢ Tᵢ + (1 − Σ wᵢ) T₀ (TextCraftor, Figures 4 and 5).

T₀ is the original encoder. `mix` mixes text embeddings; merging.py mixes weights. Nothing here imports torch, so that
programs can check their options first.
"""

import math
from pathlib import Path
from typing import NamedTuple, TypeVar

from textcraftor.errors import UserError

Tensors = TypeVar("Tensors", bound=dict)


class Weighted(NamedTuple):
    """A tuned text encoder, or where it is found, and its weight in a mix."""

    encoder: object
    weight: float = 1.0


def parse_weighted(spec: str) -> Weighted:
    """PATH or PATH=WEIGHT -> Weighted(path, weight); without a weight it is 1.

    A path may itself contain "=" and ":". If a file or folder of the whole name exists, that is the path; otherwise the
    text after the last "=" is the weight. Weights may be negative or above 1. Raises UserError for an empty path and
    for a weight that is not a finite number.
    """
    path, equals, weight = spec.rpartition("=")
    if not equals or Path(spec).exists():
        path, weight = spec, "1"
    if not path:
        raise UserError(f"{spec or 'an empty name'}: expected PATH or PATH=WEIGHT, such as a.safetensors=0.6")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
        if "/" in weight or "." in weight:  # the "=" belongs to the path, which check_text_encoder judges later
            return Weighted(spec)
    if not math.isfinite(number):
        raise UserError(f"{spec}: {weight or 'nothing'} is not a weight; expected a finite number, as in {path}=0.6")
    return Weighted(path, number)


def original_share(weights: list[float]) -> float:
    """1 − Σ wᵢ, the original encoder's weight in a mix; 0 where only rounding keeps the weights from adding up to 1."""
    share = 1 - math.fsum(weights)
    return 0.0 if abs(share) < 1e-9 else share


def mix(original: Tensors, tuned: list[tuple[Tensors, float]]) -> Tensors:
    """Σ wᵢ Tᵢ + (1 − Σ wᵢ) T₀ for each tensor, computed in fp32 and returned in the type of the first tuned one.

    original: T₀, {name: tensor}; tuned: [(Tᵢ, wᵢ)] with the same names and shapes. A single encoder of weight 1 is
    returned bit for bit, and with weight 0 so is the original.
    """
    share = original_share([weight for _, weight in tuned])
    mixed = {}
    for name, first in tuned[0][0].items():
        total = share * original[name].float()
        for tensors, weight in tuned:
            total = total + weight * tensors[name].float()
        mixed[name] = total.to(first.dtype)
    return mixed
