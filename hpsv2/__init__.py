"""Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341): cos(image, text) of a fine-tuned open_clip ViT-H-14."""

from pathlib import Path

import torch

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
