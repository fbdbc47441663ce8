"""Find, read and write the files of text encoders and UNets, whatever common names their weights have.

Files are written under the names that transformers 4 and 5, diffusers and ComfyUI know. States of a run should use
public_state and load_public_state: the names in CLIPTextModel.state_dict() differ among versions of transformers.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from torch import nn
from transformers import CLIPTextModel

from textcraftor.errors import UserError, first_line
from textcraftor.lora_files import check_lora, is_lora, with_lora
from textcraftor.weights import (
    State,
    check_finite,
    check_model_family,
    find_networks,
    load_strictly,
    pick_network,
    read_states,
    save_tensors,
    without_wrappers,
)

TEXT_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")  # of CLIP's text encoder
WEIGHT_FILE = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model)(\.(?P<variant>[a-z]\w*))?"
    r"(-(?P<shard>\d+)-of-(?P<shards>\d+))?(\.(?P<late_variant>[a-z]\w*))?\.(?P<suffix>safetensors|bin)"
)
VARIANTS = ("", "fp32", "bf16", "fp16", "ema", "non_ema")  # in the order of preference: full precision first
WEIGHT_SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}
# Weights by whose names a network is recognised.
TEXT_ENCODER = ("embeddings.token_embedding.weight", "final_layer_norm.weight")
DIFFUSERS_UNET = ("time_embedding.linear_1.weight", "conv_out.weight")
ORIGINAL_UNET = ("time_embed.0.weight", "out.2.weight")
VAE = ("encoder.conv_in.weight", "decoder.conv_in.weight")
LDM_UNET, LDM_VAE = "model.diffusion_model.", "first_stage_model."  # prefixes that diffusers' converters expect
LDM_NAME_PART = re.compile(
    r"time_embed|(?:in|out)put_blocks\d+|middle_block|(?:in|out|emb)_layers|skip_connection|transformer_blocks"
    r"|attn\d|to_out|to_[qkv]|ff|net|proj_in|proj_out|proj|norm\d?|op|conv|out|weight|bias|\d"
)
INPUTS = {9: "an inpainting UNet", 8: "an InstructPix2Pix UNet", 5: "a depth-to-image UNet"}


def public_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network's state dict under names that do not depend on versions or wrappers; the tensors are the same.

    These are `text_model.…` for a CLIPTextModel, as in transformers 4, and diffusers' own for a UNet2DConditionModel.
    """
    is_text_encoder = any(name.endswith("embeddings.token_embedding.weight") for name in state)
    rename = _text_name if is_text_encoder else without_wrappers
    return {rename(name): value for name, value in state.items()}


def load_public_state(network: nn.Module, state: dict[str, torch.Tensor], path: Path | str) -> None:
    """Load a state dict from public_state strictly and in place, whichever version of transformers it came from.

    path: where it was read, for messages. Raises UserError if it does not fit or holds NaN or infinity.
    """
    own = network.state_dict()
    names = dict(zip(public_state(own), own, strict=True))
    load_strictly(network, {names.get(name, name): value for name, value in state.items()}, path)


def _text_name(name):
    return f"text_model.{without_wrappers(name).removeprefix('text_model.')}"


def save_text_encoder(
    state: dict[str, torch.Tensor], path: Path | str, metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a CLIPTextModel's state dict as fp32 safetensors under its public names."""
    save_tensors({name: value.float() for name, value in public_state(state).items()}, path, metadata)


save_unet = save_text_encoder  # public_state knows either network


def load_text_encoder(text_encoder: CLIPTextModel, path: Path | str) -> None:
    """Load tuned weights into a CLIPTextModel, strictly and in place.

    path: a weight file (ours, the paper's, a trainer's, a whole model's, or a LoRA, which is added to the weights that
    text_encoder has), or a folder or hub id of a whole model or of a text encoder alone. Raises UserError if there is
    no text encoder, it does not fit, or it holds NaN or infinity.
    """
    states = _read_tuned(path, "text_encoder")
    if is_lora(states):
        own = public_state(text_encoder.state_dict())
        load_public_state(text_encoder, with_lora(own, states, "text_encoder", path), path)
    else:
        fill_text_encoder(text_encoder, text_encoder_state(states, path), path)


def read_text_encoder(path: Path | str, base: Path | str) -> dict[str, torch.Tensor]:
    """The text encoder in `path`, anything that load_text_encoder takes, as a state dict under its public names.

    base: the model that a LoRA is added to; read only if `path` is a LoRA. Raises UserError if there is no text encoder
    or it holds NaN or infinity.
    """
    states = _read_tuned(path, "text_encoder")
    if is_lora(states):
        if path == base:
            raise UserError(f"{base}: is a LoRA; expected the whole model or text encoder that it was trained on")
        return with_lora(read_text_encoder(base, base), states, "text_encoder", path)
    state = text_encoder_state(states, path)
    check_finite(state, path)
    return public_state(state)


def needs_base(path: Path | str) -> bool:
    """Whether `path` is a LoRA, which read_text_encoder adds to a base model."""
    return Path(path).is_file() and is_lora(read_states(path, meta=True))


def fill_text_encoder(text_encoder: CLIPTextModel, state: dict[str, torch.Tensor], path: Path | str) -> None:
    """Load what text_encoder_state returned."""
    width, own_width = state["embeddings.token_embedding.weight"].shape[1], text_encoder.config.hidden_size
    if width != own_width:
        raise UserError(f"{path}: hidden size {width}, but the model's is {own_width}; expected its own text encoder")
    load_public_state(text_encoder, {_text_name(name): value for name, value in state.items()}, path)


def load_unet(unet: nn.Module, path: Path | str) -> None:
    """load_text_encoder for a UNet2DConditionModel."""
    states = _read_tuned(path, "unet")
    if is_lora(states):
        load_public_state(unet, with_lora(public_state(unet.state_dict()), states, "unet", path), path)
    else:
        load_public_state(unet, unet_state(states, unet.config, path), path)


def check_text_encoder(path: Path | str) -> None:
    """Raise UserError if load_text_encoder cannot load `path`, as far as the names of files and weights tell.

    Quick: reads no weights, and nothing from the hub.
    """
    if Path(path).exists():
        states = _read_tuned(path, "text_encoder", meta=True)
        if is_lora(states):
            return check_lora(states, "text_encoder", path)
        state = text_encoder_state(states, path)
        if state["embeddings.token_embedding.weight"].shape[1] == 1280:
            raise UserError(f"{path}: is the second text encoder of Stable Diffusion XL (support is planned)")
    else:
        _check_hub_id(path)


def check_unet(path: Path | str) -> None:
    """check_text_encoder for load_unet."""
    if Path(path).exists():
        states = _read_tuned(path, "unet", meta=True)
        if is_lora(states):
            return check_lora(states, "unet", path)
        check_unet_states(states, path)
    else:
        _check_hub_id(path)


def _check_hub_id(path):
    if Path(path).suffix in WEIGHT_SUFFIXES or str(path).startswith((".", "/")) or str(path).count("/") != 1:
        raise UserError(f"{path}: no such weights; expected a weight file, a folder or a hub id")


def text_encoder_state(states: list[State], path: Path | str) -> dict[str, torch.Tensor]:
    """The CLIP text encoder in a file, names without any prefix: embeddings.…, encoder.…, final_layer_norm.…

    Leaves out whatever else lies beside it, such as CLIP's projections, logit scale and image encoder, and the constant
    position_ids. Raises UserError if there is no text encoder, or only one of another kind of model.
    """
    wanted = "CLIP text encoder"
    check_model_family(states, path, wanted)
    state = pick_network(find_networks(states, TEXT_ENCODER), states, path, wanted)
    return {
        name: value
        for name, value in state.items()
        if name.startswith(TEXT_PARTS) and not name.endswith("position_ids")
    }


def unet_state(states: list[State], config: dict, path: Path | str) -> dict[str, torch.Tensor]:
    """The UNet in a file under diffusers' names, whether the file has these or those of the original code.

    config: of the UNet2DConditionModel. Averaged (EMA) weights are preferred, as in the diffusers folders of SD v1.
    Raises UserError if there is no UNet, or one with other inputs than latents.
    """
    original, state = check_unet_states(states, path)
    if not original:
        return state
    converted = convert_ldm_unet_checkpoint({f"{LDM_UNET}{name}": value for name, value in state.items()}, dict(config))
    used = {id(value) for value in converted.values()}
    return converted | {name: value for name, value in state.items() if id(value) not in used}  # refused on loading


def check_unet_states(states: list[State], path: Path | str) -> tuple[bool, dict[str, torch.Tensor]]:
    """(whether its names are those of the original code, state dict) of the UNet in a file.

    Raises UserError as unet_state does.
    """
    wanted = "UNet"
    check_model_family(states, path, wanted)
    states = [State(keys, _dotted_ema_names(tensors)) for keys, tensors in states]
    found = find_networks(states, DIFFUSERS_UNET)
    original = {} if found else find_networks(states, ORIGINAL_UNET)
    state = pick_network(found or original, states, path, wanted)
    first = state.get("input_blocks.0.0.weight" if original else "conv_in.weight")
    if first is not None:
        check_inputs(first.shape[1], path)
    return bool(original), state


def check_inputs(channels: int, path: Path | str) -> None:
    """Raise UserError for a UNet that takes an image, a mask or a depth map beside the 4 channels of latents."""
    if channels in INPUTS:
        raise UserError(
            f"{path}: is {INPUTS[channels]} ({channels} input channels); expected one for text to image (4)"
        )


def _dotted_ema_names(tensors):
    """Give averaged weights of the original code (LitEma, whose names have lost their dots) their dots back."""
    return {_dotted_ema_name(name): value for name, value in tensors.items()}


def _dotted_ema_name(name):
    """model_ema.diffusion_modelinput_blocks41norm1weight -> model_ema.diffusion_model.input_blocks.4.1.norm1.weight"""
    head, ema, flat = name.partition("model_ema.diffusion_model")
    if not ema or "." in flat:
        return name
    parts = []
    for part in LDM_NAME_PART.findall(flat):
        block = re.fullmatch(r"((?:in|out)put_blocks)(\d+)(\d)", part)
        parts += block.groups() if block else [part]
    return f"{head}{ema}.{'.'.join(parts)}" if "".join(parts) == flat else name


def vae_state(states: list[State], config: dict, path: Path | str) -> dict[str, torch.Tensor]:
    """The AutoencoderKL in a file under diffusers' present names; config: of the AutoencoderKL."""
    wanted = "VAE"
    state = pick_network(find_networks(states, VAE), states, path, wanted)
    if any(name.startswith("decoder.mid.") for name in state):
        return convert_ldm_vae_checkpoint({f"{LDM_VAE}{name}": value for name, value in state.items()}, dict(config))
    return {_vae_name(name): value for name, value in state.items()}


def _vae_name(name):
    """Attention weights had other names before diffusers 0.15."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", name)
    return name


def _read_tuned(path, part, meta=False):
    """The weights in a file, in a folder's part/ or the folder itself, or in those of a hub id."""
    if Path(path).is_file():
        return read_states(path, meta)
    folder = Path(path) if Path(path).is_dir() else fetch(path, [part, ""])
    return read_folder(folder / part if (folder / part).is_dir() else folder, meta)


def read_folder(folder: Path, meta: bool = False) -> list[State]:
    """read_states for the weights in a folder of transformers or diffusers, all shards in one State.

    Raises UserError if there are none or a shard is missing.
    """
    names = sorted(path.name for path in folder.iterdir())
    files = choose_files(names)
    if not files:
        found = (
            ", only a configuration" if "config.json" in names else f", only {', '.join(names[:4])}" if names else ""
        )
        raise UserError(
            f"{folder}: no weights in it{found}; expected model.safetensors, diffusion_pytorch_model.safetensors or "
            "the like (or name the weight file itself)"
        )
    shards = int(WEIGHT_FILE.fullmatch(files[0])["shards"] or 1)
    if len(files) != shards:
        raise UserError(f"{folder}: {len(files)} of the {shards} shards of {files[0]} are there; fetch the others")
    states = [state for file in files for state in read_states(folder / file, meta)]
    if shards == 1:
        return states
    return [State((), {name: value for state in states for name, value in state.tensors.items()})]


def choose_files(names: list[str]) -> list[str]:
    """The weight file to read among the names in a folder, or its shards.

    Full precision is preferred to variants with lower precision (fp16), complete files to ones with missing shards,
    and safetensors to pickles.
    """
    groups = {}
    for name in sorted(names):
        if match := WEIGHT_FILE.fullmatch(name):
            variant = match["variant"] or match["late_variant"] or ""
            rank = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
            groups.setdefault((rank, match["suffix"] == "bin", match["stem"], variant, match["shards"]), []).append(
                name
            )
    incomplete = {group: len(files) != int(group[-1] or 1) for group, files in groups.items()}
    best = min(groups, key=lambda group: (incomplete[group], *group[:4], group[4] or ""), default=None)
    return groups.get(best, [])


def fetch(repo: str, parts: list[str], weights: bool = True) -> Path:
    """Fetch parts of a hub repository into the hub's cache -> the folder there; "" is the repository's top level.

    Of each part, the small files and, with weights=True, those that choose_files prefers. Without a connection, what is
    in the cache. Raises UserError if the hub has no such repository, or cannot be reached and nothing is in the cache.
    """
    try:
        names = HfApi().list_repo_files(repo)
    except RepositoryNotFoundError as problem:
        raise UserError(
            f"{repo}: no such folder, and no such repository on the hub; if it is private, log in with `hf auth login`"
        ) from problem
    except Exception as problem:  # offline, or an error of one of the hub's several HTTP clients
        try:
            return Path(snapshot_download(repo, local_files_only=True))
        except LocalEntryNotFoundError:
            raise UserError(
                f"{repo}: no such folder, not in the hub's cache, and the hub cannot be reached ({first_line(problem)})"
            ) from problem
    wanted = []
    for part in parts:
        inside = [name.removeprefix(f"{part}/") for name in names if not part or name.startswith(f"{part}/")]
        inside = [name for name in inside if "/" not in name]
        small = [name for name in inside if name.endswith((".json", ".txt"))]
        chosen = choose_files(inside) if weights else []
        wanted += [f"{part}/{name}".lstrip("/") for name in (*small, *chosen)]
    return Path(snapshot_download(repo, allow_patterns=wanted))
