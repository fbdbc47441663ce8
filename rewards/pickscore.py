"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): exp(logit_scale) * cos(image, text) of a CLIPModel ViT-H/14."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, PreTrainedTokenizerBase

from rewards.base import Reward
from rewards.towers import missing_file
from textcraftor.downloads import command
from textcraftor.errors import UserError, first_line
from textcraftor.models import clip_tokenizer
from textcraftor.weights import check_fit


class PickScore(Reward):
    name = "pickscore"
    scale = 1.0

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.tower, self.tokenizer = model, tokenizer
        size = model.config.vision_config.image_size
        self.image_size = (size, size)
        self.context_length = model.config.text_config.max_position_embeddings
        self.logit_scale = model.logit_scale.exp().item()  # kept as a float: bf16 would change it by a per cent

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.tower.get_image_features(pixels).pooler_output

    def encode_text(self, tokens: Tensor) -> Tensor:
        # Attention is causal and the pooled token is the first end token: the padding needs no mask.
        return self.tower.get_text_features(tokens).pooler_output

    def tokenize(self, prompts: list[str], length: int) -> Tensor:
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt", verbose=False
        )
        return encoded.input_ids

    def score(self, image_features: Tensor, prompts: list[str]) -> Tensor:
        return self.logit_scale * super().score(image_features, prompts)


def missing(root: Path) -> list[str]:
    """One line for each file that is not there."""
    folder = root / "pickscore" / "pickmodel"
    files = (folder / "config.json", folder / "model.safetensors")
    return [line for path in files for line in missing_file(path, command("pickscore", root))]


def load(root: Path, device: torch.device | str, dtype: torch.dtype) -> PickScore:
    """The PickScore reward, about 20; UserError if the weights do not fit the configuration."""
    folder = root / "pickscore" / "pickmodel"
    try:
        model, info = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # json, safetensors and configuration errors each are of another kind
        raise UserError(f"{folder} cannot be loaded as a transformers CLIPModel ({first_line(error)})") from error
    check_fit(
        folder,
        "CLIPModel",
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
        misshapen=[f"{key} {tuple(found)}, not {tuple(own)}" for key, found, own in sorted(info["mismatched_keys"])],
    )
    return PickScore(model, load_tokenizer(folder, model)).frozen(device, dtype)


def load_tokenizer(folder: Path, model: CLIPModel) -> PreTrainedTokenizerBase:
    """The tokenizer files in `folder` if there are any, else CLIP's own; UserError if it is not the model's."""
    own_files = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True) if own_files else clip_tokenizer()
    if len(tokenizer) != model.config.text_config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.text_config.vocab_size}; "
            "put the model's own tokenizer files there"
        )
    return tokenizer
