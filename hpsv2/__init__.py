"""Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341): cos(image, text) of a fine-tuned open_clip ViT-H-14."""

from pathlib import Path

import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from rewards.towers import CONFIG, OpenClipReward, load_open_clip, load_tokenizer, missing_file
from textcraftor.downloads import command


def missing(root: Path) -> list[str]:
    """One line for each file that is not there."""
    return missing_file(root / "hpsv2" / "HPS_v2_compressed.pt", command("hpsv2", root))


def load(root: Path, device: torch.device | str, dtype: torch.dtype, version: str = "v2") -> OpenClipReward:
    """The HPSv2 reward, about 0.27; version "v2" or "v2.1". UserError if the weights do not fit."""
    folder = root / "hpsv2"
    architecture = f"local-dir:{folder}" if (folder / CONFIG).is_file() else "ViT-H-14"
    model = load_open_clip(architecture, folder / f"HPS_{version}_compressed.pt")
    return OpenClipReward("hpsv2", 100.0, model, load_tokenizer(architecture, model)).frozen(device, dtype)


@torch.inference_mode()
def score_pictures(reward: OpenClipReward, pictures: list[Image.Image], prompts: list[str]) -> Tensor:
    """HPSv2 of B PIL pictures and prompts as the authors' package scores image files (hpsv2 1.2.0) -> (B,)."""
    pixels = torch.stack([prepare(picture, reward.image_size[0]) for picture in pictures])
    return reward.score(reward.image_features(pixels), prompts)


def prepare(picture: Image.Image, size: int) -> Tensor:
    """A PIL picture as the authors' package shows it to the model -> (3, size, size), about [0, 1].

    Resized after the conversion to floats, bicubically, so that edges overshoot [0, 1] a little and nothing is rounded;
    to the longer side, the rest black: a picture that is not square is neither cut nor stretched.
    """
    pixels = TF.to_tensor(picture.convert("RGB"))
    height, width = (round(side * size / max(picture.size)) for side in pixels.shape[1:])
    pixels = TF.resize(pixels, [height, width], TF.InterpolationMode.BICUBIC)
    left, top = (size - width) // 2, (size - height) // 2
    return TF.pad(pixels, [left, top, size - width - left, size - height - top])
