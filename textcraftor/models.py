"""The parts of a Stable Diffusion model, from a folder, the hub or a single file."""

import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import diffusers
import open_clip
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from textcraftor.downloads import command
from textcraftor.embeddings import Conditions, encode_prompts
from textcraftor.errors import UserError, first_line
from textcraftor.weight_files import fill_text_encoder
from textcraftor.weights import load_strictly, read_weights

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
    """What an image is made by. Without a tuned encoder, `text_encoder` is `original_encoder`."""

    tokenizer: CLIPTokenizer
    original_encoder: CLIPTextModel
    text_encoder: torch.nn.Module
    unet: torch.nn.Module
    vae: AutoencoderKL
    unconditional: Conditions  # of the original encoder, one row; computed once

    @property
    def device(self) -> torch.device:
        return self.vae.device


def make_networks(model: Model, text_encoder: torch.nn.Module | None = None) -> Networks:
    """The Networks of a model, on the devices and in the types that they have now, with a tuned encoder or its own."""
    with torch.no_grad():
        unconditional = encode_prompts(model.tokenizer, model.text_encoder, [""])
    tuned = model.text_encoder if text_encoder is None else text_encoder
    return Networks(model.tokenizer, model.text_encoder, tuned, model.unet, model.vae, unconditional)


def latent_shape(model: Model) -> tuple[int, int, int]:
    """(C, h, w) of the latents of the pictures that the model was trained on.

    The UNet's sample_size is a number or a pair; without one it follows from the autoencoder's picture size.
    """
    size = model.unet.config.sample_size
    if size is None:
        size = model.vae.config.sample_size // 2 ** (len(model.vae.config.block_out_channels) - 1)
    height, width = (size, size) if isinstance(size, int) else size
    return model.unet.config.in_channels, height, width


def quiet_libraries():
    """Leave the screen to the program's own lines: no bars while weights load, errors only."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # accelerate knows DistributedDataParallel's option by its old name only.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)


def check_model(model):
    """Raise UserError if `model` is no whole diffusers folder, no file, and no name that could be a hub id."""
    folder = Path(model)
    if folder.is_file():
        return
    if folder.is_dir():
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            raise UserError(f"{model}: not a whole Stable Diffusion folder: no {', '.join(missing)}/ in it")
    elif folder.is_absolute() or str(model).startswith(".") or str(model).count("/") != 1:
        raise UserError(
            f"{model}: no such model. Get Stable Diffusion v1.5, into stable-diffusion-v1-5/: {command('sd')} "
            "(or name another folder, single file or hub id with --model, or train the one that ships here: "
            "--model miniature)"
        )


def load_model(model):
    """Load a diffusers folder, hub id or SD v1 single file -> Model.

    The three networks are fp32 whatever their files hold, channels last, in eval mode, and frozen.
    Raises UserError if there is no such model or a part of it lacks weights.
    """
    try:
        tokenizer, *networks, scheduler_config = (_load_file if Path(model).is_file() else _load_folder)(model)
    except UserError:
        raise
    except Exception as problem:  # tokenizers, safetensors, json and configurations each raise their own kinds
        raise UserError(f"{model}: could not be loaded: {first_line(problem)}") from problem
    for network in networks:
        network.to(memory_format=torch.channels_last)  # convolutions are a tenth faster, also on CPUs
        network.float().eval().requires_grad_(False)
    return Model(tokenizer, *networks, dict(scheduler_config))


def _load_folder(model):
    where = {"local_files_only": Path(model).is_dir()}
    weights = [path.name for path in Path(model, "unet").glob("diffusion_pytorch_model*")]
    if weights and all(".fp16." in name for name in weights):
        where["variant"] = "fp16"
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer", **where)
    networks = []
    for part, kind in NETWORKS.items():
        network, info = kind.from_pretrained(model, subfolder=part, output_loading_info=True, **where)
        if info["missing_keys"]:
            raise UserError(f"{model}/{part}: its weights lack {sorted(info['missing_keys'])[0]} and perhaps more")
        networks.append(network)
    return tokenizer, *networks, DDIMScheduler.load_config(model, subfolder="scheduler", **where)


def _load_file(path):
    """A checkpoint in the original layout (model.diffusion_model.…, first_stage_model.…, cond_stage_model.…).

    Converted as diffusers' from_single_file does, which cannot tell what is missing or too much.
    """
    state = read_weights(path)
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(SD_V1_CONFIGS / "text_encoder"))
    prefix = "cond_stage_model.transformer."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    fill_text_encoder(text_encoder, own, path)
    # Averaged weights where there are both, as in the diffusers folder.
    unet = _fill(UNet2DConditionModel, "unet", partial(convert_ldm_unet_checkpoint, state, extract_ema=True), path)
    vae = _fill(AutoencoderKL, "vae", partial(convert_ldm_vae_checkpoint, state), path)
    return clip_tokenizer(), text_encoder, unet, vae, DDIMScheduler.load_config(SD_V1_CONFIGS, subfolder="scheduler")


def _fill(kind, part, convert, path):
    config = kind.load_config(SD_V1_CONFIGS, subfolder=part)
    with torch.device("meta"):  # no time spent on random weights
        network = kind.from_config(config)
    network.to_empty(device="cpu")
    load_strictly(network, convert(config=config), path)
    return network


def clip_tokenizer():
    """CLIP's tokenizer of 49,408 tokens, which SD v1 and PickScore use, from the vocabulary that open_clip ships."""
    bpe = open_clip.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): index for token, index in bpe.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks), model_max_length=bpe.context_length)
