"""Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341): cos(image, text) of a fine-tuned open_clip ViT-H-14."""

from pathlib import Path

import torch

from rewards.towers import CONFIG, OpenClipReward, load_open_clip, load_tokenizer, missing_file


def missing(root: Path, version: str = "2.0") -> list[str]:
    """One line for each file that is not there."""
    path = weights(root, version)
    return missing_file(path, f"hf download xswu/HPSv2 {path.name} --local-dir {path.parent}")


def load(root: Path, device: torch.device | str, dtype: torch.dtype, version: str = "2.0") -> OpenClipReward:
    """The HPSv2 reward, about 0.27; version "2.0" or "2.1". UserError if the weights do not fit."""
    folder = root / "hpsv2"
    architecture = f"local-dir:{folder}" if (folder / CONFIG).is_file() else "ViT-H-14"
    model = load_open_clip(architecture, weights(root, version))
    return OpenClipReward("hpsv2", 100.0, model, load_tokenizer(architecture, model)).frozen(device, dtype)


def weights(root: Path, version: str) -> Path:
    """Where the weights of a version belong."""
    return root / "hpsv2" / {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}[version]
