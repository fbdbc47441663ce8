"""open_clip models as reward towers: loading, tokenizer and features, shared by CLIP, HPSv2 and the aesthetic score."""

from pathlib import Path

import open_clip
from huggingface_hub import try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from torch import Tensor, nn

from rewards.base import Reward
from textcraftor.errors import UserError, first_line
from textcraftor.weights import load_strictly, read_weights

CONFIG = "open_clip_config.json"


class OpenClipReward(Reward):
    """cos(image, text) of an open_clip model."""

    def __init__(self, name: str, scale: float, model: open_clip.CLIP, tokenizer):
        super().__init__()
        self.name, self.scale, self.tower = name, scale, model
        self.image_size = model.visual.image_size
        self.context_length = model.context_length
        self.tokenizer = tokenizer

    @property
    def visual(self) -> nn.Module:
        return self.tower.visual

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.tower.encode_text(tokens)

    def tokenize(self, prompts: list[str], length: int) -> Tensor:
        return self.tokenizer(prompts, context_length=length)


def load_open_clip(architecture: str, weights: Path) -> open_clip.CLIP:
    """An open_clip model in fp32 on the CPU, every weight read from the file `weights`.

    `architecture` is a name known to open_clip, or `local-dir:FOLDER` for the one in FOLDER/open_clip_config.json.
    Raises UserError if the configuration cannot be used or the weights do not fit it.
    """
    try:
        model = open_clip.CLIP(**open_clip.get_model_config(architecture))
    except (ValueError, TypeError, KeyError) as error:  # damaged json, options that open_clip does not know
        raise UserError(f"{architecture}: no usable {CONFIG} ({error})") from error
    load_strictly(model, read_weights(weights), weights)
    return model


def load_tokenizer(architecture: str, model: open_clip.CLIP):
    """The tokenizer that belongs to `architecture`: a folder's own files if its configuration says so, else CLIP's.

    Raises UserError if it cannot be loaded or its vocabulary is not the model's.
    """
    try:
        tokenizer = open_clip.get_tokenizer(architecture)
    except (ValueError, OSError) as error:
        raise UserError(f"{architecture}: its tokenizer cannot be loaded ({first_line(error)})") from error
    words = tokenizer.vocab_size if isinstance(tokenizer, open_clip.SimpleTokenizer) else len(tokenizer.tokenizer)
    if words != model.vocab_size:
        raise UserError(
            f"{architecture}: the tokenizer has {words} tokens, the model {model.vocab_size}; a folder with tokenizer "
            f'files of its own needs "hf_tokenizer_name" in text_cfg of {CONFIG}'
        )
    return tokenizer


def find_tower(folder: Path, name: str, tag: str) -> tuple[str, Path | None]:
    """(architecture, weights) of the open_clip folder `folder` if there is one, else of name/tag in the hub's cache.

    weights is None if they are not there; nothing is downloaded.
    """
    files = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
    if (folder / CONFIG).is_file():
        architecture, places = f"local-dir:{folder}", [folder / file for file in files]
    else:
        repository = open_clip.get_pretrained_cfg(name, tag)["hf_hub"].rstrip("/")
        cached = [try_to_load_from_cache(repository, file) for file in files]
        architecture, places = name, [Path(path) for path in cached if isinstance(path, str)]
    return architecture, next((path for path in places if path.is_file()), None)


def missing_tower(folder: Path, name: str, tag: str, how: str) -> list[str]:
    """One line for the tower's weights if they are missing: what, where they belong and how to get them."""
    architecture, weights = find_tower(folder, name, tag)
    if weights:
        return []
    if architecture == name:
        return [f"open_clip {name} ({tag}) in the hub's cache, or an open_clip folder at {folder}; get it: {how}"]
    return [f"{folder / HF_SAFE_WEIGHTS_NAME}; put it beside the {CONFIG} there"]


def missing_file(path: Path, how: str) -> list[str]:
    """One line for `path` if it is missing, with how to get it."""
    return [] if path.is_file() else [f"{path}; get it: {how}"]
