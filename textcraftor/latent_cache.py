"""A VAE's latents of pictures, computed once and kept in files that every later run maps into memory.

They lie in $TEXTCRAFTOR_CACHE/latents, by default ~/.cache/textcraftor/latents (XDG_CACHE_HOME is honoured), in a
folder for each VAE and picture size. A picture is known by the sha256 of its file's content, wherever the file lies, so
other data sets that hold it use the same entry, and a changed picture gets a new one. A shard is a safetensors file:

    mean, std    (N, C, h, w) fp16: the posterior of the VAE, not yet multiplied by its scaling factor
    sha256       (N, 32) uint8: which pictures
    checksum     in its metadata: CRC-32 of the three

fp16 halves the cache, to 64 KB for a picture of 512 x 512 pixels. Its rounding error, at most 2^-11 of a value, is far
below the smallest noise that training adds (a standard deviation of 0.03 at t = 0, where latents are about 1).

Shards are written whole and never changed, so an interrupted run leaves the finished ones, and runs that encode the
same pictures at the same time do no harm. The cache may be deleted whenever no run uses it.
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from textcraftor.errors import UserError
from textcraftor.files import free_bytes, write_whole
from textcraftor.hashes import weights_hash
from textcraftor.image_formats import Pair, decode_picture, in_threads, open_pictures

PREPARATION = "1"  # of pictures (image_formats.decode_picture); another number makes every cache anew
SHARD = 128  # pictures, at most
BATCH = 4  # pictures that the VAE encodes at once
MARGIN = 2**26  # bytes that stay free on the disk
TENSORS = ("mean", "std", "sha256")


class Encoded(NamedTuple):
    """What encode_pictures found and made."""

    kept: list[int]  # which pairs have latents; those below have one entry for each of them
    digests: list[bytes]  # sha256 of the pictures' content
    files: list[str]  # shards
    places: np.ndarray  # (len(kept), 2) int32: which of the files, and the row in it
    skipped: list[tuple[str, str]]  # (name, reason) of pictures that cannot be used
    folder: Path
    new: int  # pictures that were encoded now
    bytes: int  # size of all latents in use


class Latents(Sequence):
    """Posterior means and standard deviations in memory-mapped shards; all processes of a node share the pages."""

    def __init__(self, files: list[str], places: np.ndarray):
        self._files, self._places = files, places
        self._open = functools.cache(lambda file: safe_open(file, "pt"))

    def __len__(self):
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, std) of picture `index`, each (C, h, w) fp32 on the CPU."""
        shard, row = map(int, self._places[index])
        file = self._open(self._files[shard])
        return tuple(file.get_slice(name)[row].float() for name in ("mean", "std"))


def picture_size(vae: torch.nn.Module, shape: tuple[int, int, int]) -> tuple[int, int]:
    """(height, width) in pixels of the pictures whose latents have `shape` (C, h, w)."""
    return shape[1] * _scale(vae), shape[2] * _scale(vae)


def _scale(vae):
    return 2 ** (len(vae.config.block_out_channels) - 1)


def cache_root() -> Path:
    """The folder of TextCraftor's caches."""
    if folder := os.environ.get("TEXTCRAFTOR_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "textcraftor"


def cache_folder(vae: torch.nn.Module, height: int, width: int) -> Path:
    """Where the latents of pictures of this size lie that this VAE, in the type its weights have now, encodes."""
    key = f"{weights_hash(vae)} {vae.dtype} {height} {width} {PREPARATION}"
    return cache_root() / "latents" / hashlib.sha256(key.encode()).hexdigest()[:16]


def encode_pictures(vae, pairs: list[Pair], height: int, width: int, progress: bool = True) -> Encoded:
    """Encode all pictures that the cache does not hold yet; pictures that cannot be read are left out.

    vae: an AutoencoderKL, which computes in the type and on the device it has; its latents are then those of fp32 if it
    comes as load_model returns it. Pictures become height x width pixels. progress: whether to show progress bars.
    Raises UserError if the disk has no room, cannot be written to, or if the VAE gives anything that is not finite.
    """
    folder, skipped = cache_folder(vae, height, width), []
    digests = _read_digests(pairs, skipped, progress)
    needed = set(digests) - {None}
    places = _find(folder, needed, progress)
    missing, seen = [], set(places)
    for pair, digest in zip(pairs, digests, strict=True):
        if digest and digest not in seen:
            seen.add(digest)
            missing.append((pair, digest))
    new, broken = 0, {}
    if missing:
        _check_room(folder, vae, len(missing), height, width)
        with tqdm(total=len(missing), desc="encoding pictures", disable=not progress, dynamic_ncols=True) as bar:
            for file, encoded in _encode(vae, folder, missing, height, width, broken, bar):
                places |= {digest: (file, row) for row, digest in enumerate(encoded)}
                new += len(encoded)
    skipped += [(pair.name, broken[digest]) for pair, digest in zip(pairs, digests, strict=True) if digest in broken]
    kept = [number for number, digest in enumerate(digests) if digest in places]
    files = sorted({file for file, _ in places.values()})
    numbers = {file: number for number, file in enumerate(files)}
    rows = [(numbers[file], row) for file, row in (places[digests[number]] for number in kept)]
    size = sum(os.path.getsize(file) for file in files)
    table = np.array(rows, np.int32).reshape(-1, 2)
    return Encoded(kept, [digests[number] for number in kept], files, table, skipped, folder, new, size)


def _read_digests(pairs, skipped, progress):
    def digest(read):
        try:
            return hashlib.sha256(read()).digest()
        except (OSError, ValueError) as problem:
            return problem

    digests = []
    with tqdm(total=len(pairs), desc="reading pictures", disable=not progress, dynamic_ncols=True) as bar:
        for pair, found in zip(pairs, in_threads(digest, open_pictures(pairs)), strict=True):
            if not isinstance(found, bytes):
                skipped.append((pair.name, _reason(found)))
            digests.append(found if isinstance(found, bytes) else None)
            bar.update()
    return digests


def _reason(problem):
    return f"unreadable: {getattr(problem, 'strerror', None) or problem}"


def _find(folder, needed, progress):
    """{sha256: (shard, row)} of what the cache holds. Damaged shards are deleted: their pictures are encoded again."""
    places = {}
    shards = sorted(str(path) for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    for shard in tqdm(shards, desc="checking latents", disable=not progress or not shards, dynamic_ncols=True):
        try:
            with safe_open(shard, "numpy") as file:
                rows = {digest.tobytes(): row for row, digest in enumerate(file.get_tensor("sha256"))}
                if rows.keys().isdisjoint(needed):
                    continue
                whole = file.metadata()["checksum"] == _checksum({name: file.get_tensor(name) for name in TENSORS})
        except (SafetensorError, OSError, KeyError, TypeError):
            whole = False
        if whole:
            places |= {digest: (shard, row) for digest, row in rows.items() if digest in needed}
        else:
            tqdm.write(f"{shard}: damaged; its pictures are encoded again")
            Path(shard).unlink(missing_ok=True)
    return places


def _checksum(tensors):
    crc = 0
    for name in TENSORS:
        crc = crc32(np.ascontiguousarray(tensors[name]), crc)
    return str(crc)


def _check_room(folder, vae, count, height, width):
    size = 2 * 2 * vae.config.latent_channels * (height // _scale(vae)) * (width // _scale(vae))  # two fp16 each
    if (free := free_bytes(folder)) < count * size + MARGIN:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB free, the latents of {count} pictures need {count * size / 1e9:.2f} GB; "
            "free some space, or put the cache on another disk with the variable TEXTCRAFTOR_CACHE"
        )


def _encode(vae, folder, missing, height, width, broken, bar):
    """Encode pictures and write shards -> yields (shard, its sha256s). broken: gets {sha256: reason}."""

    def decode(read):
        try:
            return np.asarray(decode_picture(read(), height, width))
        except (OSError, ValueError) as problem:
            return problem

    decoded = zip(missing, in_threads(decode, open_pictures([pair for pair, _ in missing])), strict=True)
    while chunk := list(islice(decoded, SHARD)):
        good = [(pair, digest, pixels) for (pair, digest), pixels in chunk if isinstance(pixels, np.ndarray)]
        broken |= {digest: _reason(bad) for (_, digest), bad in chunk if not isinstance(bad, np.ndarray)}
        means, stds = [], []
        for start in range(0, len(good), BATCH):
            batch = good[start : start + BATCH]
            for found, kept in zip(
                posterior(vae, np.stack([pixels for *_, pixels in batch])), (means, stds), strict=True
            ):
                kept.append(found.to("cpu", torch.float16).contiguous().numpy())
            if not np.isfinite(means[-1]).all() or not np.isfinite(stds[-1]).all():
                names = ", ".join(pair.name for pair, *_ in batch)
                raise UserError(f"the VAE's latents are not finite, or too large for fp16, for one of {names}")
            bar.update(len(batch))
        bar.update(len(chunk) - len(good))
        if good:
            digests = [digest for _, digest, _ in good]
            tensors = {"mean": np.concatenate(means), "std": np.concatenate(stds)}
            tensors["sha256"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
            shard = folder / f"{hashlib.sha256(b''.join(digests)).hexdigest()[:32]}.safetensors"
            with write_whole(shard) as unfinished:
                safetensors.numpy.save_file(tensors, unfinished, {"checksum": _checksum(tensors)})
            yield str(shard), digests


@torch.inference_mode()
def posterior(vae, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, H, W, 3) uint8 -> mean and standard deviation of their latents, each (B, C, h, w), not scaled."""
    # Channels last as they are: this is the memory format of the networks, too.
    images = torch.from_numpy(pixels).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    found = vae.encode(images.to(vae.dtype)).latent_dist
    return found.mean, found.std
