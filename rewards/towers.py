"""CLIP models of open_clip and of transformers as reward towers: find the files, build the model, load strictly.

Weights may be as trainers save them: under prefixes such as `module.` or `model.`, nested beside optimizer states,
sharded, in half precision. Errors name the weights that do not fit.
"""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import open_clip
import torch
from accelerate import init_empty_weights
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerBase

from rewards.base import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, Reward
from textcraftor.downloads import TOWER_FILES
from textcraftor.errors import UserError, first_line
from textcraftor.models import clip_tokenizer
from textcraftor.weights import State, find_networks, load_strictly, pick_network, read_states, read_weights

logger = logging.getLogger(__name__)

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_FILES = (*TOWER_FILES, "open_clip_model.safetensors.index.json", "open_clip_pytorch_model.bin.index.json")
TRANSFORMERS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Constants that some versions save, and parameters that a cosine does not depend on.
HARMLESS = re.compile(r"(^|\.)(position_ids|attn_mask)$|^(logit_bias|input_resolution|context_length|vocab_size)$")

Network = TypeVar("Network", bound=nn.Module)


class Normalization(NamedTuple):
    """Mean and standard deviation per channel that a tower expects its pixels to be normalised with."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


OPENAI = Normalization(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


class OpenClipReward(Reward):
    """cos(image, text) of an open_clip model."""

    def __init__(self, name: str, scale: float, model: open_clip.CLIP, tokenizer, normalization=OPENAI):
        super().__init__()
        self.name, self.scale, self.tower, self.tokenizer = name, scale, model, tokenizer
        self.mean, self.std = normalization
        self.image_size = size_of(model.visual)
        self.context_length = model.context_length

    @property
    def visual(self) -> nn.Module:
        return self.tower.visual

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.tower.encode_text(tokens)

    def tokenize(self, prompts: list[str], length: int) -> Tensor:
        return self.tokenizer(prompts, context_length=length)


class TransformersReward(Reward):
    """cos(image, text) of a transformers CLIPModel."""

    def __init__(self, name: str, scale: float, model: CLIPModel, tokenizer, normalization=OPENAI):
        super().__init__()
        self.name, self.scale, self.tower, self.tokenizer = name, scale, model, tokenizer
        self.mean, self.std = normalization
        size = model.config.vision_config.image_size
        self.image_size = (size, size)
        self.context_length = model.config.text_config.max_position_embeddings

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.tower.get_image_features(pixels).pooler_output

    def encode_text(self, tokens: Tensor) -> Tensor:
        # Attention is causal and the features are those of the first end token: padding needs no mask.
        return self.tower.get_text_features(tokens).pooler_output

    def tokenize(self, prompts: list[str], length: int) -> Tensor:
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt", verbose=False
        )
        return encoded.input_ids


# Finding files.


def find_weights(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these names that is a file in `folder`, or None; the preferred names come first."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def missing_weights(folder: Path, names: tuple[str, ...], how: str) -> list[str]:
    """One line if `folder` has none of these files, or one for each missing shard if it has an index of shards."""
    path = find_weights(folder, names)
    if path is None:
        others = [name for name in names[1:] if not name.endswith(".index.json")]
        alternatives = f" (or {', '.join(others)}, or shards with their .index.json)" if others else ""
        return [f"{folder / names[0]}{alternatives}; get it: {how}"]
    if path.name.endswith(".index.json"):
        return [f"{shard}; {path.name} lists it as a shard" for shard in shards_of(path) if not shard.is_file()]
    return []


def missing_file(path: Path, how: str) -> list[str]:
    """One line if `path` is missing, with how to get it."""
    return [] if path.is_file() else [f"{path}; get it: {how}"]


def find_tower(folder: Path, name: str, tag: str) -> tuple[str, Path | None]:
    """(architecture, weights) of the open_clip model in `folder`, else of open_clip's name/tag in the hub's cache.

    The architecture is that of the folder's open_clip_config.json, or `name` if there is none. weights is None if they
    are in neither place: nothing is downloaded.
    """
    has_config = (folder / OPEN_CLIP_CONFIG).is_file()
    weights = find_weights(folder, OPEN_CLIP_FILES + TRANSFORMERS_FILES)
    if not has_config and weights is None:
        repository = open_clip.get_pretrained_cfg(name, tag)["hf_hub"].rstrip("/")
        cached = [try_to_load_from_cache(repository, file) for file in TOWER_FILES]
        weights = next((Path(path) for path in cached if isinstance(path, str)), None)
    return (f"local-dir:{folder}" if has_config else name), weights


def missing_tower(folder: Path, name: str, tag: str, how: str) -> list[str]:
    """One line for each missing file of the tower: what it is, where it belongs and how to get it."""
    architecture, weights = find_tower(folder, name, tag)
    if weights is None and architecture == name:
        return [f"open_clip {name} ({tag}) in the hub's cache, or an open_clip folder at {folder}; get it: {how}"]
    if weights is None or weights.parent == folder:
        how = f"put it beside {OPEN_CLIP_CONFIG}, or delete that file to use the released weights: {how}"
        return missing_weights(folder, OPEN_CLIP_FILES + TRANSFORMERS_FILES, how)
    return []


# Reading files.


def shards_of(index: Path) -> list[Path]:
    """The shards that a `….index.json` of transformers names. Raises UserError if it is damaged."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [index.parent / Path(name).name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: expected an index of shards (weight_map), as transformers writes it; fetch it again"
        ) from error


def read_clip(weights: Path, anchor: str, wanted: str) -> dict[str, Tensor]:
    """The state dict of a network in a weight file, or in the shards of an index, without prefixes.

    anchor: the name of one of its weights, by which it is found among others in the file. wanted: what it is called in
    error messages. Raises UserError if the file cannot be read or does not hold such a network.
    """
    if weights.name.endswith(".index.json"):
        states = [State((), {name: value for path in shards_of(weights) for name, value in read_weights(path).items()})]
    else:
        states = read_states(weights)
    renamed = [State(keys, _flatten(tensors)) for keys, tensors in states]
    state = pick_network(find_networks(renamed, (anchor,)), renamed, weights, wanted)
    used = {id(value) for value in state.values()}
    for _, tensors in states:
        unused = [name for name, value in tensors.items() if id(value) not in used]
        if unused and len(unused) < len(tensors):
            logger.warning(f"{weights}: not used: {', '.join(unused[:3])}{' …' if len(unused) > 3 else ''}")
    return state


def _flatten(tensors):
    """Restore transformers 4's names: later versions may repeat `text_model.` or `vision_model.`."""
    return {re.sub(r"\b(text|vision)_model\.(\1_model\.)+", r"\1_model.", name): tensors[name] for name in tensors}


def build_empty(make: Callable[[], Network]) -> Network:
    """make() with its parameters on the meta device, which takes no memory and no random numbers; buffers are real."""
    with init_empty_weights(include_buffers=False):
        return make()


def fill(network: Network, state: dict[str, Tensor], path: Path) -> Network:
    """Give a network from build_empty the weights in `state`, read from `path`, in fp32.

    Tensors that are fp32 already are not copied. Raises UserError, which names the weights that do not fit.
    """
    own = network.state_dict()
    state = {name: value for name, value in state.items() if name in own or not HARMLESS.search(name)}
    for name in own.keys() & state.keys():
        if not state[name].is_floating_point():
            raise UserError(f"{path}: {name} holds {state[name].dtype} numbers, expected floats, not quantised")
        if own[name].numel() == state[name].numel() == 1:  # logit_scale has shape () or (1,)
            state[name] = state[name].reshape(own[name].shape)
        state[name] = state[name].to(own[name].dtype).contiguous()
    load_strictly(network, state, path, assign=True)
    return network


def load_open_clip(name: str, scale: float, architecture: str, weights: Path) -> OpenClipReward:
    """The reward `name`: an open_clip model in fp32 on the CPU, with every weight from the file `weights`.

    `architecture` is a name known to open_clip, or `local-dir:FOLDER` for the one in FOLDER/open_clip_config.json.
    Raises UserError if the configuration cannot be used, or the weights or the tokenizer do not fit it.
    """
    model = build_open_clip(architecture)
    fill(model, read_open_clip(model, weights), weights)
    tokenizer = load_open_clip_tokenizer(architecture, model)
    return OpenClipReward(name, scale, model, tokenizer, open_clip_normalization(architecture))


def load_open_clip_visual(architecture: str, weights: Path) -> nn.Module:
    """Only the image tower of an open_clip model, loaded as in load_open_clip; the file needs no text tower."""
    model = build_open_clip(architecture)
    state = read_open_clip(model, weights)
    state = {name.removeprefix("visual."): state[name] for name in state if name.startswith("visual.")}
    return fill(model.visual, state, weights)


def build_open_clip(architecture: str) -> open_clip.CLIP:
    """The model on the meta device. Raises UserError if its configuration cannot be used."""
    try:
        return build_empty(lambda: open_clip.CLIP(**open_clip.get_model_config(architecture)))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:  # damaged JSON, unknown options
        raise UserError(f"{architecture}: {OPEN_CLIP_CONFIG} does not describe a CLIP model ({error})") from error


def read_open_clip(model: open_clip.CLIP, weights: Path) -> dict[str, Tensor]:
    """The state dict for `model` in the file `weights`."""
    names = [name for name in model.state_dict() if name.startswith("visual.")]
    anchor = "visual.conv1.weight" if "visual.conv1.weight" in names else names[0]
    state = read_clip(weights, anchor, "CLIP model under open_clip's names")
    return {name.removeprefix("text."): state[name] for name in state}  # where it was saved as a CustomTextCLIP


def load_transformers(folder: Path) -> tuple[CLIPModel, PreTrainedTokenizerBase, Normalization]:
    """The CLIPModel in a transformers folder, in fp32 on the CPU, with its tokenizer and pixel normalisation.

    Raises UserError if the configuration cannot be used, or the weights or the tokenizer do not fit it.
    """
    try:
        model = build_empty(lambda: CLIPModel(CLIPConfig.from_pretrained(folder, local_files_only=True)))
    except Exception as error:  # damaged JSON and unusable values raise many kinds
        raise UserError(f"{folder}/config.json: does not describe a CLIPModel ({first_line(error)})") from error
    weights = find_weights(folder, TRANSFORMERS_FILES)
    state = read_clip(weights, "vision_model.embeddings.class_embedding", "transformers CLIPModel")
    own = dict(zip(_flatten(model.state_dict()), model.state_dict(), strict=True))
    fill(model, {own.get(name, name): value for name, value in state.items()}, weights)
    return model, load_transformers_tokenizer(folder, model), transformers_normalization(folder)


# What else belongs to a model: tokenizer and pixel normalisation.


def load_open_clip_tokenizer(architecture: str, model: open_clip.CLIP):
    """The tokenizer of `architecture`: the folder's own if its configuration names one, else CLIP's.

    Raises UserError if it cannot be loaded or its vocabulary is not the model's.
    """
    try:
        tokenizer = open_clip.get_tokenizer(architecture)
    except (ValueError, OSError) as error:
        raise UserError(f"{architecture}: its tokenizer cannot be loaded ({first_line(error)})") from error
    words = tokenizer.vocab_size if isinstance(tokenizer, open_clip.SimpleTokenizer) else len(tokenizer.tokenizer)
    if words != model.vocab_size:
        raise UserError(
            f"{architecture}: the tokenizer has {words} tokens, the model {model.vocab_size}; if the folder has "
            f'tokenizer files of its own, {OPEN_CLIP_CONFIG} needs "hf_tokenizer_name" in text_cfg'
        )
    return tokenizer


def load_transformers_tokenizer(folder: Path, model: CLIPModel) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder` if it has one, else CLIP's. Raises UserError if its vocabulary is not the model's."""
    own_files = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True) if own_files else clip_tokenizer()
    except Exception as error:  # damaged files raise many kinds
        raise UserError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)})") from error
    if len(tokenizer) != model.config.text_config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.text_config.vocab_size}; "
            "put the model's own tokenizer files into the folder"
        )
    return tokenizer


def size_of(visual: nn.Module) -> tuple[int, int]:
    """(height, width) of the images that an open_clip image tower takes."""
    size = visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def open_clip_normalization(architecture: str) -> Normalization:
    """That of preprocess_cfg in the folder of `local-dir:FOLDER`; OpenAI's if it says nothing or the name is known."""
    if not architecture.startswith("local-dir:"):
        return OPENAI
    path = Path(architecture.removeprefix("local-dir:"), OPEN_CLIP_CONFIG)
    config = _read_json(path).get("preprocess_cfg") or {}
    return _normalization(config, "mean", "std", path)


def transformers_normalization(folder: Path) -> Normalization:
    """That of the image processor in `folder`, as transformers 4 or 5 saved it; OpenAI's if there is none."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        config = _read_json(path) if path.is_file() else {}
        config = config.get("image_processor", config)
        if "image_mean" not in config and "image_std" not in config:
            continue
        if not config.get("do_rescale", True) or abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 0.01:
            raise UserError(f"{path}: expected pixels scaled to [0, 1] (do_rescale, rescale_factor 1/255)")
        if not config.get("do_normalize", True):
            return Normalization((0.0,) * 3, (1.0,) * 3)
        return _normalization(config, "image_mean", "image_std", path)
    return OPENAI


def _normalization(config, mean, std, path):
    values = [config.get(key) or default for key, default in zip((mean, std), OPENAI, strict=True)]
    try:
        found = Normalization(*(tuple(map(float, channels)) for channels in values))
        usable = len(found.mean) == len(found.std) == 3 and torch.tensor(found).isfinite().all() and min(found.std) > 0
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise UserError(f"{path}: {mean} {values[0]} and {std} {values[1]}; expected three numbers each, std above 0")
    return found


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content
