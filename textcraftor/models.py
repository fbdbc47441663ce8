"""Check and load Stable Diffusion v1 from a diffusers folder, the hub or a single file."""

import json
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import diffusers
import open_clip
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from packaging.version import Version
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from textcraftor.downloads import command
from textcraftor.embeddings import Conditions, encode_prompts
from textcraftor.errors import UserError, first_line
from textcraftor.mixing import Weighted
from textcraftor.weight_files import (
    check_inputs,
    check_unet_states,
    choose_files,
    fetch,
    fill_text_encoder,
    read_folder,
    text_encoder_state,
    unet_state,
    vae_state,
)
from textcraftor.weights import load_strictly, read_states

NETWORKS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
PARTS = ("tokenizer", *NETWORKS, "scheduler")
SD_V1_CONFIGS = Path(__file__).with_name("stable_diffusion_v1")  # a single file carries none


class Model(NamedTuple):
    """A Stable Diffusion model as load_model returns it."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler_config: dict


class Networks(NamedTuple):
    """The networks that make an image. Without a tuned encoder, `text_encoder` is `original_encoder`.

    Several tuned encoders with their weights are mixed, see embeddings.embed_prompts.
    """

    tokenizer: CLIPTokenizer
    original_encoder: CLIPTextModel
    text_encoder: torch.nn.Module | list[Weighted]
    unet: torch.nn.Module
    vae: AutoencoderKL
    unconditional: Conditions  # the original encoder's, one row, computed once
    tune_unconditional: bool = True  # whether the tuned encoder drives the unconditional branch of guidance, too

    @property
    def device(self) -> torch.device:
        return self.vae.device


def make_networks(
    model: Model, text_encoder: torch.nn.Module | list[Weighted] | None = None, tune_unconditional: bool = True
) -> Networks:
    """The networks of `model` as they are now (device, dtype), with tuned text encoders if there are any."""
    with torch.no_grad():
        unconditional = encode_prompts(model.tokenizer, model.text_encoder, [""])
    tuned = model.text_encoder if text_encoder is None else text_encoder
    return Networks(
        model.tokenizer, model.text_encoder, tuned, model.unet, model.vae, unconditional, tune_unconditional
    )


def latent_shape(model: Model) -> tuple[int, int, int]:
    """(C, h, w) of the latents of the pictures that the model makes, the same as in diffusers' own pipeline.

    The UNet's sample_size is a number, a pair (height, width), or null, which means 64. Configurations from before
    diffusers 0.9 with a smaller number, such as 32, are known conversion mistakes and mean 64 as well.
    """
    config = model.unet.config
    size = config.sample_size
    version = Version(getattr(config, "_diffusers_version", diffusers.__version__)).release
    if size is None or isinstance(size, int) and size < 64 and version < (0, 9):
        size = 64
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def quiet_libraries():
    """Hide the libraries' progress bars and warnings; errors still show."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # accelerate still uses an old name of an option of DistributedDataParallel.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)


def check_model(model: str) -> None:
    """Raise UserError unless `model` is a Stable Diffusion v1, judging by file names, configurations and weight names.

    model: diffusers folder, single file, or hub id, of which only the form is checked here. Quick: reads no weights.
    """
    path = Path(model)
    if path.is_file():
        states = read_states(path, meta=True)
        check_unet_states(states, path)
        text_encoder_state(states, path)
        vae_state(states, AutoencoderKL.load_config(SD_V1_CONFIGS, subfolder="vae"), path)
    elif path.is_dir():
        check_folder(path)
    elif path.is_absolute() or str(model).startswith(".") or str(model).count("/") != 1:
        raise UserError(
            f"{model}: no such model. Get Stable Diffusion v1.5, into stable-diffusion-v1-5/: {command('sd')} "
            "(or name another folder, single file or hub id with --model, or use the small model in this repository: "
            "--model miniature)"
        )


def check_folder(folder: Path) -> None:
    """Raise UserError unless a diffusers folder holds all parts of a text-to-image Stable Diffusion v1.

    Class names, channels and the width of the text embeddings decide; the networks may have any size.
    """
    check_configs(folder)
    for part in NETWORKS:
        if not choose_files([path.name for path in (folder / part).iterdir()]):
            raise UserError(f"{folder / part}: no weights in it, such as model.safetensors; fetch them into it")


def check_configs(folder: Path) -> None:
    """check_folder for the configurations alone."""
    top = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    index = _read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    alone = top.get("_class_name") or (top.get("architectures") or [top.get("model_type", "")])[0]
    kind = index.get("_class_name", "")
    if (folder / "adapter_config.json").is_file() or list(folder.glob("*lora*.safetensors")):
        alone = "LoRA"
    if (folder / "transformer").is_dir() or (folder / "prior").is_dir():
        raise UserError(f"{folder}: is a {kind or 'model with a transformer'}; expected a Stable Diffusion v1")
    if alone and not (folder / "unet").is_dir():
        raise UserError(f"{folder}: is only a {alone}; expected a whole Stable Diffusion v1 folder with {_parts()}")
    if (folder / "text_encoder_2").is_dir() or "XL" in kind:
        refiner = "" if (folder / "text_encoder").is_dir() else " refiner"
        raise UserError(f"{folder}: is a Stable Diffusion XL{refiner} (support is planned); expected a version 1")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{folder}: not a whole Stable Diffusion folder: no {', '.join(missing)}/ in it")
    text_encoder, unet, vae = (_read_json(folder / part / "config.json") for part in NETWORKS)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (tokenizer / name).is_file():
                raise UserError(f"{tokenizer}: no {name} and no tokenizer.json in it")
    for part, config, names in (
        ("text_encoder", text_encoder, ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")),
        ("unet", unet, ("UNet2DConditionModel",)),
        ("vae", vae, ("AutoencoderKL",)),
    ):
        found = config.get("_class_name") or (config.get("architectures") or [names[0]])[0]
        if found not in names:
            raise UserError(f"{folder / part}: is a {found}; expected a {names[0]}, as in Stable Diffusion v1")
    if unet.get("addition_embed_type"):
        raise UserError(f"{folder}: its UNet is of Stable Diffusion XL (support is planned); expected a version 1")
    check_inputs(unet.get("in_channels", 4), folder / "unet")
    if unet.get("use_linear_projection"):
        raise UserError(f"{folder}: is a Stable Diffusion 2.x (support is planned); expected a version 1")
    latents = vae.get("latent_channels", 4)
    if not unet.get("in_channels", 4) == unet.get("out_channels", 4) == latents:
        raise UserError(
            f"{folder}: its UNet has {unet.get('in_channels', 4)} input and {unet.get('out_channels', 4)} output "
            f"channels, its VAE {latents} latent channels; for text to image they must be equal"
        )
    text_config = text_encoder.get("text_config") or text_encoder
    width, expected = text_config.get("hidden_size", 512), unet.get("cross_attention_dim", 1280)
    if width != expected:
        raise UserError(
            f"{folder}: its text encoder has hidden size {width}, its UNet expects {expected} (cross_attention_dim): "
            "they belong to different models"
        )
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        raise UserError(f"{folder}: its UNet needs class labels, as upscalers do; expected one for text to image")
    if vae.get("shift_factor") or vae.get("latents_mean"):
        raise UserError(
            f"{folder / 'vae'}: shifts its latents (shift_factor, latents_mean), unlike Stable Diffusion v1's"
        )
    check_scheduler(scheduler, folder / "scheduler")


def check_scheduler(config: dict, path: Path) -> None:
    """Raise UserError unless a scheduler configuration describes a model that predicts noise, velocity or images."""
    name, prediction = config.get("_class_name", ""), config.get("prediction_type", "epsilon")
    if "FlowMatch" in name or prediction not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"{path}: is of a model with {name or 'a scheduler'} and prediction type {prediction}; expected epsilon, "
            "v_prediction or sample, as in Stable Diffusion v1"
        )


def _parts():
    return ", ".join(f"{part}/" for part in PARTS)


def _read_json(path):
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Stable Diffusion folder has it") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"{path}: cannot be read as JSON ({first_line(problem)})") from problem
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def load_model(model: str) -> Model:
    """Load a diffusers folder, hub id or single file of Stable Diffusion v1.

    The networks are fp32 whatever their files hold, in the channels-last memory format, in eval mode, and frozen.
    Raises UserError if there is no such model, or a part of it is missing, damaged, of another kind of model, or holds
    NaN or infinity.
    """
    check_model(model)
    path = Path(model)
    if path.is_file():
        configs, tokenizer = SD_V1_CONFIGS, clip_tokenizer()
    else:
        path = path if path.is_dir() else fetch_model(model)
        configs, tokenizer = path, _library(CLIPTokenizer.from_pretrained, path / "tokenizer")
    scheduler_config = _read_json(configs / "scheduler" / "scheduler_config.json")
    networks = []
    whole = read_states(path) if path.is_file() else None
    for part, kind in NETWORKS.items():
        states, source = (whole, path) if whole else (read_folder(path / part), path / part)
        network = BUILDERS[part](kind, configs / part, states, source)
        network.to(memory_format=torch.channels_last)  # convolutions are a tenth faster, also on CPUs
        networks.append(network.eval().requires_grad_(False))
    fit_tokenizer(tokenizer, networks[0].config, model)
    return Model(tokenizer, *networks, scheduler_config)


def fetch_model(repo: str) -> Path:
    """Fetch a Stable Diffusion v1 from the hub -> its folder in the hub's cache; configurations first."""
    folder = fetch(repo, ["", *PARTS], weights=False)
    check_configs(folder)
    folder = fetch(repo, ["", *PARTS])
    check_folder(folder)
    return folder


def _load_text_encoder(kind, configs, states, path):
    config = _library(CLIPTextConfig.from_pretrained, configs)
    text_encoder = _empty(lambda: kind(config))
    # Not among the weights, so not in a file either: a constant.
    positions = torch.arange(config.max_position_embeddings)[None]
    for name, buffer in text_encoder.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(positions)
    fill_text_encoder(text_encoder, text_encoder_state(states, path), path)
    return text_encoder


def _load_with(read_state, kind, configs, states, path):
    config = _library(kind.load_config, configs)
    network = _empty(lambda: _library(kind.from_config, config))
    load_strictly(network, read_state(states, network.config, path), path)
    return network


def _empty(build):
    """A network with uninitialised weights: filling them with random numbers would take time for nothing."""
    with torch.device("meta"):
        network = build()
    return network.float().to_empty(device="cpu")


def _library(load, source):
    """load(source), a function of transformers or diffusers, with any of their exceptions turned into a UserError."""
    try:
        return load(source)
    except Exception as problem:
        place = source if isinstance(source, Path) else "its configuration"
        raise UserError(f"{place}: could not be loaded: {first_line(problem)}") from problem


BUILDERS = {
    "text_encoder": _load_text_encoder,
    "unet": partial(_load_with, unet_state),
    "vae": partial(_load_with, vae_state),
}


def fit_tokenizer(tokenizer: CLIPTokenizer, config: CLIPTextConfig, model: str) -> None:
    """Limit the tokenizer's model_max_length to what the text encoder reads; tokenizers without one report 1e30.

    Raises UserError if the tokenizer has tokens without an embedding in the text encoder, such as those that textual
    inversion adds: prompts with them could not be encoded.
    """
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    unknown = {token: index for token, index in tokenizer.get_vocab().items() if index >= config.vocab_size}
    if unknown:
        first = min(unknown, key=unknown.get)
        raise UserError(
            f"{model}: its text encoder has {config.vocab_size} token embeddings, none for {first!r} and "
            f"{len(unknown) - 1} more tokens of its tokenizer; use the tokenizer that belongs to the text encoder"
        )


def clip_tokenizer():
    """CLIP's tokenizer of 49,408 tokens, used by SD v1 and PickScore, from the vocabulary in the open_clip package."""
    bpe = open_clip.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): index for token, index in bpe.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks), model_max_length=bpe.context_length)
