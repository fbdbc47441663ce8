"""Content hashes of files and networks, whatever their paths and names."""

import hashlib
from pathlib import Path

import torch


def file_hash(path: Path | str) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def weights_hash(network: torch.nn.Module) -> str:
    """sha256 of a network's weights in fp32, in order, independent of their file and names."""
    digest = hashlib.sha256()
    for weight in network.state_dict().values():
        digest.update(str(tuple(weight.shape)).encode())
        digest.update(weight.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def run_content(model, text_encoder, rewards, functions) -> dict:
    """Hashes of the models that a training run uses, so that --resume can detect changes.

    model: a models.Model; text_encoder: where training starts; rewards: those trained on; functions:
    {path/to/file.py:name: a user's own reward}.
    """
    content = {"model": [weights_hash(network) for network in (model.text_encoder, model.unet, model.vae)]}
    content["text_path"] = weights_hash(text_encoder)
    content["rewards"] = {reward.name: weights_hash(reward) for reward in rewards}
    for spec in functions:
        file, _, name = spec.rpartition(":")
        content[name] = file_hash(file)
    return content
