"""The forms in which other programs read a tuned text encoder, one function each.

All take original and tuned text encoders as state dicts under public names (weight_files.read_text_encoder).
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import diffusers
import safetensors
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextConfig

from textcraftor import models
from textcraftor.errors import UserError, first_line
from textcraftor.exporting.lora import lora_of_difference
from textcraftor.exporting.original_names import LDM_TEXT, LDM_UNET, LDM_VAE, original_text, original_unet, original_vae
from textcraftor.files import write_whole
from textcraftor.lora_files import diffusers_lora, kohya_lora, kohya_metadata
from textcraftor.recorded import record
from textcraftor.weight_files import load_public_state
from textcraftor.weights import read_states, save_tensors

LDM_EMA = "model_ema."
SCHEDULER_CONFIG = "scheduler_config.json"
State = dict[str, torch.Tensor]


def export(
    form: str, model: str, original: State, tuned: State, output: Path, dtype: torch.dtype, rank: int, settings: dict
) -> str:
    """Write `tuned` to `output` in the form (options.FILE_FORMS, FOLDER_FORMS) -> a line for the user on how to use it.

    model: the base model as load_model takes it; dtype: of all weights written; rank: of a LoRA; settings: how the
    encoder was trained to sample, for the file's metadata (recorded.record).
    """
    metadata = record(settings) if settings else {}
    output = Path(output)
    if form == "diffusers":
        with write_folder(output) as folder:
            save_pipeline(model, tuned, folder, dtype, metadata)
        return "all steps use the tuned encoder; to keep the original one in the first steps, see the README"
    if form == "text_encoder":
        with write_folder(output) as folder:
            save_encoder_folder(model_configs(model) / "text_encoder", tuned, folder, dtype, metadata)
        return "load it with transformers' CLIPTextModel.from_pretrained"
    if form == "clip_l":
        save_tensors(cast(tuned, dtype), output, metadata)
        return "ComfyUI: models/text_encoders, node Load CLIP, type stable_diffusion"
    if form == "checkpoint":
        state, note = checkpoint_state(model, tuned, dtype)
        save_tensors(state, output, metadata)
        return f"ComfyUI: models/checkpoints; A1111: models/Stable-diffusion{note}"
    factors, error = lora_of_difference(original, tuned, rank)
    if form == "lora":
        save_tensors(cast(diffusers_lora("text_encoder", factors), dtype), output, metadata)
        return f"LoRA of rank {rank}: {error}"
    save_tensors(cast(kohya_lora("text_encoder", factors), dtype), output, metadata | kohya_metadata(rank, rank))
    return f"LoRA of rank {rank}: {error}"


def cast(state: State, dtype: torch.dtype) -> State:
    """Floating-point weights in `dtype`. Raises UserError for weights that are too large for it."""
    result = {}
    for name, value in state.items():
        result[name] = value.to(dtype) if value.is_floating_point() else value
        if dtype == torch.float16 and value.is_floating_point() and not result[name].isfinite().all():
            raise UserError(f"--half: {name} is too large for fp16; leave out --half")
    return result


def model_configs(model: str) -> Path:
    """The folder that holds the configurations of the model's parts."""
    path = Path(model)
    if path.is_file():
        return models.SD_V1_CONFIGS
    return path if path.is_dir() else models.fetch_model(model)


def save_encoder_folder(
    configs: Path, tuned: State, folder: Path, dtype: torch.dtype, metadata: dict[str, str]
) -> None:
    """config.json and model.safetensors of the text encoder, as CLIPTextModel.from_pretrained reads them.

    configs: folder with the original's config.json. The names of the weights are those of transformers 4, which both
    versions know.
    """
    config = CLIPTextConfig.from_pretrained(configs)
    config.architectures, config.dtype = ["CLIPTextModel"], dtype
    config.save_pretrained(folder)
    # "dtype" is what transformers 5 calls it; transformers 4 knows "torch_dtype" alone, and ignores the other.
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["torch_dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(cast(tuned, dtype), folder / "model.safetensors", metadata)


def save_pipeline(model: str, tuned: State, folder: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """A whole StableDiffusionPipeline with the tuned text encoder, for from_pretrained; no safety checker."""
    configs = model_configs(model)
    tokenizer, text_encoder, unet, vae, scheduler_config = models.load_model(model)
    load_public_state(text_encoder, tuned, "--text_path")
    name = scheduler_config.get("_class_name", "PNDMScheduler")
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(
            f"{model}: diffusers {diffusers.__version__} has no scheduler {name}; name another in {SCHEDULER_CONFIG}"
        )
    parts = [part.to(dtype=dtype, memory_format=torch.contiguous_format) for part in (vae, text_encoder, unet)]
    vae, text_encoder, unet = parts
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, kind.from_config(scheduler_config), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    # What the constructor or transformers 5 write otherwise: the scheduler's own settings, and for transformers 4 the
    # tokenizer's vocabulary and the text encoder's names.
    shutil.copyfile(configs / "scheduler" / SCHEDULER_CONFIG, folder / "scheduler" / SCHEDULER_CONFIG)
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    save_encoder_folder(configs / "text_encoder", tuned, folder / "text_encoder", dtype, metadata)


def checkpoint_state(model: str, tuned: State, dtype: torch.dtype) -> tuple[State, str]:
    """A whole SD v1 under the original code's names with the tuned text encoder -> (state dict, note for the user).

    If the base is itself such a file, everything else in it stays as it is, except that the networks become fp16 if
    dtype is.
    """
    text = original_text(cast(tuned, dtype))
    if Path(model).is_file():
        state = max(read_states(model), key=lambda state: len(state.tensors)).tensors
        if all(any(name.startswith(prefix) for name in state) for prefix in (LDM_TEXT, LDM_UNET, LDM_VAE)):
            # Pickles may hold tensors that share memory, which safetensors refuses.
            kept = {name: value.clone() for name, value in state.items() if not name.startswith(LDM_TEXT)}
            networks = {name: value for name, value in kept.items() if name.startswith((LDM_UNET, LDM_VAE, LDM_EMA))}
            # The noise schedule, which lies beside the networks, keeps its precision.
            return kept | (cast(networks, dtype) if dtype == torch.float16 else {}) | text, ""
    loaded = models.load_model(model)
    networks = cast(original_unet(loaded.unet) | original_vae(loaded.vae), dtype)
    prediction = loaded.scheduler_config.get("prediction_type", "epsilon")
    note = "" if prediction == "epsilon" else f". This model's prediction type is {prediction}: choose it there"
    return networks | text, note


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """write_whole for a folder: nobody ever sees half of it."""
    with write_whole(path) as unfinished:
        try:
            unfinished.mkdir()
            yield unfinished
        except BaseException as problem:
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(problem, safetensors.SafetensorError):  # its word for a full disk
                raise UserError(f"{path}: cannot be written ({first_line(problem)})") from problem
            raise
