"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): exp(logit_scale) * cos(image, text) of a CLIPModel ViT-H/14."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel

from rewards.towers import (
    OPENAI,
    TRANSFORMERS_FILES,
    TransformersReward,
    load_transformers,
    missing_file,
    missing_weights,
)
from textcraftor.downloads import command


class PickScore(TransformersReward):
    """The cosine of a CLIP model, multiplied by its own exp(logit_scale)."""

    def __init__(self, model: CLIPModel, tokenizer, normalization=OPENAI):
        super().__init__("pickscore", 1.0, model, tokenizer, normalization)
        self.logit_scale = model.logit_scale.exp().item()  # a Python float, since bf16 would change it by 1 %

    def compare(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return self.logit_scale * super().compare(image_features, text_features)


def missing(root: Path) -> list[str]:
    """One line for each file that is not there."""
    folder, how = root / "pickscore" / "pickmodel", command("pickscore", root)
    return missing_file(folder / "config.json", how) + missing_weights(folder, TRANSFORMERS_FILES, how)


def load(root: Path, device: torch.device | str, dtype: torch.dtype) -> PickScore:
    """The PickScore reward, about 20. Raises UserError if the weights do not fit the configuration."""
    return PickScore(*load_transformers(root / "pickscore" / "pickmodel")).frozen(device, dtype)
