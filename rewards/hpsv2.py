"""Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341): cos(image, text) of a fine-tuned open_clip ViT-H-14."""

from pathlib import Path

import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from rewards.towers import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_FILES,
    TRANSFORMERS_FILES,
    OpenClipReward,
    find_weights,
    load_open_clip,
    missing_weights,
)
from textcraftor.downloads import command

FILES = {  # by version; weights that users fine-tuned may have open_clip's usual names and then count as 2.0
    "2.0": ("HPS_v2_compressed.pt", "HPS_v2_compressed.safetensors", *OPEN_CLIP_FILES, *TRANSFORMERS_FILES),
    "2.1": ("HPS_v2.1_compressed.pt", "HPS_v2.1_compressed.safetensors"),
}


def missing(root: Path, version: str = "2.0") -> list[str]:
    """One line for each file that is not there."""
    how = command("hpsv2" if version == "2.0" else "hpsv2.1", root)
    return missing_weights(root / "hpsv2", FILES[version], how)


def load(root: Path, device: torch.device | str, dtype: torch.dtype, version: str = "2.0") -> OpenClipReward:
    """The HPSv2 reward, about 0.27. version: "2.0" or "2.1". Raises UserError if the weights do not fit."""
    folder = root / "hpsv2"
    architecture = f"local-dir:{folder}" if (folder / OPEN_CLIP_CONFIG).is_file() else "ViT-H-14"
    weights = find_weights(folder, FILES[version])
    return load_open_clip("hpsv2", 100.0, architecture, weights).frozen(device, dtype)


def prepare(picture: Image.Image, size: int) -> Tensor:
    """A PIL picture as the model sees it in the authors' package -> (3, size, size), about [0, 1].

    Pixels become floats before the bicubic resize: nothing is rounded, and edges overshoot [0, 1] a little. The longer
    side becomes `size`, and black bars fill the rest: a picture that is not square is neither cropped nor stretched.
    """
    pixels = TF.to_tensor(picture.convert("RGB"))
    height, width = (round(side * size / max(picture.size)) for side in pixels.shape[1:])
    pixels = TF.resize(pixels, [height, width], TF.InterpolationMode.BICUBIC, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return TF.pad(pixels, [left, top, size - width - left, size - height - top])
