"""The CLIP constraint of TextCraftor's equation 8: an image must fit its prompt as the encoder in training embeds it.

Unlike `--clip`, whose towers are frozen on both sides, this has a gradient straight into the text encoder as well. It
needs the CLIP whose text tower the encoder was: for Stable Diffusion v1 OpenAI's ViT-L/14, the aesthetic reward's.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from rewards import aesthetic
from rewards.base import Reward, at_least_fp32, normalize
from rewards.towers import find_tower, load_open_clip, missing_tower
from textcraftor.downloads import command
from textcraftor.errors import UserError


class ClipConstraint(Reward):
    """cos(image, T_φ(p)): image embeddings of a CLIP, text embeddings by a text encoder that was its text tower."""

    name = "clip_constraint"
    scale = 100.0

    def __init__(self, clip: Reward, dtype: torch.dtype):
        super().__init__()
        self.tower = clip.visual
        self.projection = nn.Parameter(clip.tower.text_projection.detach().to(dtype))
        self.mean, self.std, self.image_size = clip.mean, clip.std, clip.image_size

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels)

    def score(self, image_features: Tensor, pooled: Tensor) -> Tensor:
        """Unit image features (B, E) and the text encoder's pooled embeddings (B, D) -> (B,), with gradient to both."""
        with torch.autocast(image_features.device.type, enabled=False):
            texts = normalize(pooled.to(self.projection) @ self.projection)
            return (image_features * texts.to(image_features)).sum(dim=-1)


def check_constraint(root: Path | str) -> None:
    """Raise UserError if the weights of the CLIP are missing below `root`."""
    folder = Path(root) / "aesthetic" / "clip"
    if lines := missing_tower(folder, *aesthetic.TOWER, command("aesthetic", Path(root))):
        raise UserError("\n  ".join(["--clip_constraint: weights are missing:", *lines]))


def load_constraint(
    root: Path, text_encoder: nn.Module, device: torch.device | str, dtype: torch.dtype
) -> ClipConstraint:
    """The constraint for `text_encoder`, a CLIPTextModel that has not been tuned.

    Raises UserError if files are missing or do not fit, or if the text encoder was never this CLIP's text tower.
    """
    check_constraint(root)
    architecture, weights = find_tower(root / "aesthetic" / "clip", *aesthetic.TOWER)
    clip = load_open_clip("clip", 1.0, architecture, weights)
    check_same_tower(clip.tower, text_encoder, weights)
    return ClipConstraint(clip, at_least_fp32(dtype)).frozen(device, dtype)


def check_same_tower(clip: nn.Module, text_encoder: nn.Module, weights: Path) -> None:
    """Raise UserError unless the text encoder's embeddings and last norm are those of an open_clip model."""
    own = {name.rpartition("text_model.")[2]: value for name, value in text_encoder.state_dict().items()}
    pairs = {
        "token embedding": (clip.token_embedding.weight, own["embeddings.token_embedding.weight"]),
        "position embedding": (clip.positional_embedding, own["embeddings.position_embedding.weight"]),
        "final layer norm": (clip.ln_final.weight, own["final_layer_norm.weight"]),
    }
    for name, (theirs, ours) in pairs.items():
        # Files in half precision differ by 1e-3 of each weight.
        if theirs.shape != ours.shape or (theirs - ours.to(theirs)).norm() > 0.01 * theirs.norm():
            raise UserError(
                f"--clip_constraint: the model's text encoder is not the text tower of {weights} (another {name}); the "
                "constraint compares images with the encoder in training and needs the CLIP that it was part of"
            )
