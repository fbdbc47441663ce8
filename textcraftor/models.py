"""The parts of a Stable Diffusion model, and its text embeddings."""

from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from textcraftor.downloads import command
from textcraftor.errors import UserError, first_line

PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")


def quiet_libraries():
    """Leave the screen to the program's own lines: no bars while weights load, errors only."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def check_model(model):
    """Raise UserError if `model` is neither a whole diffusers folder nor a name that could be a hub id."""
    folder = Path(model)
    if folder.is_dir():
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            raise UserError(f"{model}: not a whole Stable Diffusion folder: no {', '.join(missing)}/ in it")
    elif folder.is_absolute() or str(model).startswith(".") or str(model).count("/") != 1:
        raise UserError(
            f"{model}: no such model. Get Stable Diffusion v1.5, into stable-diffusion-v1-5/: {command('sd')} "
            "(or name another folder or a hub id with --model, or train the one that ships here: --model miniature)"
        )


def load_model(model):
    """Load a diffusers folder or hub id -> (tokenizer, text_encoder, unet, vae, scheduler config).

    The three networks are fp32 whatever their files hold, channels last, in eval mode, and frozen.
    Raises UserError if there is no such model or a part of it lacks weights.
    """
    where = {"local_files_only": Path(model).is_dir()}
    try:
        tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer", **where)
        scheduler_config = DDIMScheduler.load_config(model, subfolder="scheduler", **where)
        networks = []
        for part, kind in (("text_encoder", CLIPTextModel), ("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            network, info = kind.from_pretrained(model, subfolder=part, output_loading_info=True, **where)
            if info["missing_keys"]:
                raise UserError(f"{model}/{part}: its weights lack {sorted(info['missing_keys'])[0]} and perhaps more")
            network.to(memory_format=torch.channels_last)  # convolutions are a tenth faster, also on CPUs
            networks.append(network.float().eval().requires_grad_(False))
    except UserError:
        raise
    except Exception as problem:  # tokenizers, safetensors, json and configurations each raise their own kinds
        raise UserError(f"{model}: could not be loaded: {first_line(problem)}") from problem
    return tokenizer, *networks, dict(scheduler_config)


def encode_prompts(tokenizer, text_encoder, prompts):
    """B prompts -> text embeddings (B, L, D): the last hidden state, prompts padded or cut to the model's L tokens."""
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text_encoder(tokens.to(text_encoder.device)).last_hidden_state


def embed_prompts(tokenizer, original_encoder, text_encoder, unconditional, prompts, weighting=1.0):
    """Text embeddings for both parts of the sampler, each (2B, L, D), the B unconditional rows first.

    unconditional: (1, L, D), the original encoder's embedding of "", computed once by the caller.
    Returns (original, without gradient; weighting * tuned + (1 - weighting) * original), the second from one forward
    pass of `text_encoder` over "" and all prompts, or the first again if both encoders are one.
    """
    with torch.no_grad():
        conditional = encode_prompts(tokenizer, original_encoder, prompts)
        original = guidance_pair(torch.cat([unconditional, conditional]))
    if text_encoder is original_encoder:
        return original, original
    tuned = guidance_pair(encode_prompts(tokenizer, text_encoder, ["", *prompts]))
    return original, torch.lerp(original, tuned, weighting)


def guidance_pair(embeddings):
    """(1+B, L, D), the unconditional embedding and B conditional ones -> (2B, L, D), B unconditional rows first."""
    conditional = embeddings[1:]
    return torch.cat([embeddings[:1].expand_as(conditional), conditional])


def count_cut(tokenizer, prompts):
    """How many of the prompts have more tokens than the model takes, and lose their end."""
    lengths = map(len, tokenizer(prompts, verbose=False).input_ids)
    return sum(length > tokenizer.model_max_length for length in lengths)
