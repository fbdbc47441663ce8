"""Merge the weights of several tuned text encoders into one, for tools that take only one."""

import json
from pathlib import Path

import torch

from textcraftor.errors import UserError
from textcraftor.hashes import file_hash
from textcraftor.mixing import Weighted, original_share
from textcraftor.recorded import record, shared_settings
from textcraftor.weight_files import read_text_encoder
from textcraftor.weights import check_finite, check_fit, save_tensors


def merge(encoders: list[Weighted], base: str, output: Path | str) -> str:
    """Write Σ wᵢ Wᵢ + (1 − Σ wᵢ) W₀ as fp32 safetensors, with what was merged in its metadata -> the formula.

    encoders: paths, as load_text_encoder takes them, and their weights; base: a model whose text encoder is W₀, read
    only if the weights do not add up to 1, or for LoRAs. Raises UserError if names or shapes differ, if the encoders
    were trained to sample in different ways (recorded.py), and for NaN or infinity.
    """
    advice = "merge encoders that were trained alike, or mix their embeddings in test_parti.py"
    settings = record(shared_settings([path for path, _ in encoders], set(), advice))
    share = original_share([weight for _, weight in encoders])
    terms = [*encoders, Weighted(base, share)] if share else encoders
    states = [read_text_encoder(path, base) for path, _ in terms]
    for (path, _), state in zip(terms[1:], states[1:], strict=True):
        check_same(state, path, states[0], terms[0].encoder)
    weighted = [(weight, state) for (_, weight), state in zip(terms, states, strict=True)]
    merged = {name: sum(weight * state[name].float() for weight, state in weighted) for name in states[0]}
    check_finite(merged, output)
    save_tensors(merged, output, {"merged": json.dumps([describe(*term) for term in terms])} | settings)
    return " + ".join(f"{weight:.6g} * {path}" for path, weight in terms)


def describe(path: str, weight: float) -> dict:
    """What the merged file's metadata say of one of its parts."""
    return {"path": str(path), "weight": weight} | ({"sha256": file_hash(path)} if Path(path).is_file() else {})


def check_same(
    state: dict[str, torch.Tensor], path: Path | str, other: dict[str, torch.Tensor], other_path: Path | str
) -> None:
    """Raise UserError unless two text encoders have weights of the same names and shapes."""
    width, other_width = (each["text_model.embeddings.token_embedding.weight"].shape[1] for each in (state, other))
    if width != other_width:
        raise UserError(
            f"{path}: hidden size {width}, but {other_path} has {other_width}; expected encoders of the same model"
        )
    check_fit(path, f"text encoder in {other_path}", state, other)
