"""Download the released models and prompts to the folders where training looks for them."""

import errno
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers

from textcraftor.errors import UserError, first_line
from textcraftor.files import free_bytes
from textcraftor.options import REPOSITORY

CACHE = None  # as a Source's folder: the Hugging Face cache (HF_HOME), where open_clip looks


class Source(NamedTuple):
    """Files of one Hugging Face repository, or one web address (kind "url"), and the folder where they belong."""

    repo: str
    files: tuple[str, ...]  # for the cache: alternatives, of which the first that the repository has is fetched
    folder: str | None
    kind: str = "model"


class File(NamedTuple):
    """A file of a source, with its size in bytes and its sha256, None where not known."""

    source: Source
    name: str
    size: int | None
    sha256: str | None


STABLE_DIFFUSION_FILES = (  # in fp32, without the safety checker and the single-file checkpoints
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
TOWER_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HEAD = Source(
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
    ("sac+logos+ava1-l14-linearMSE.pth",),
    "aesthetic",
    "url",
)
HEAD_SIZE, HEAD_SHA256 = 3_714_759, "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"

# Errors of the local disk, which no other attempt mends.
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)

SOURCES = {
    "sd": [Source("stable-diffusion-v1-5/stable-diffusion-v1-5", STABLE_DIFFUSION_FILES, "stable-diffusion-v1-5")],
    "prompts": [Source("krea-ai/open-prompts", ("openprompts.csv",), ".", "dataset")],
    "clip": [Source("laion/CLIP-ViT-g-14-laion2B-s34B-b88K", TOWER_FILES, CACHE)],
    "aesthetic": [HEAD, Source("timm/vit_large_patch14_clip_224.openai", TOWER_FILES, CACHE)],
    "pickscore": [Source("yuvalkirstain/PickScore_v1", ("config.json", "model.safetensors"), "pickscore/pickmodel")],
    "hpsv2": [Source("xswu/HPSv2", ("HPS_v2_compressed.pt",), "hpsv2")],
    "hpsv2.1": [Source("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), "hpsv2")],
}
ON_REQUEST = {"hpsv2.1"}


def command(name, root=REPOSITORY):
    """The command that downloads `name` (a key of SOURCES) into `root`, for messages."""
    elsewhere = "" if Path(root).resolve() == REPOSITORY else f" --root {root}"
    return f"python download_models.py --only {name}{elsewhere}"


def download(names, root, say=print):
    """Download the files of `names` (keys of SOURCES) that are missing, into `root` or the Hugging Face cache.

    A file that exists with the right size is skipped. A file gets its final name only when it is complete and its
    sha256 is right; an interrupted download stays beside it as a .part file, and the next call continues it.
    Raises UserError before downloading if the disk is too small, and at the end with one line per failed download.
    """
    root, problems, files = Path(root), [], []
    if root.exists() and not root.is_dir():
        raise UserError(f"--root {root}: is a file, expected a folder; choose another")
    for source in (source for name in names for source in SOURCES[name]):
        try:
            files += [file for file in look_up(source, root) if not is_there(file, root)]
        except Exception as problem:  # see explain
            problems.append(explain(problem, source, root))
    check_disk(files, root, say)
    for file in files:
        try:
            say(fetch(file, root))
        except Exception as problem:
            problems.append(explain(problem, file.source, root))
    if problems := list(dict.fromkeys(problems)):
        raise UserError("\n  ".join([f"downloads that failed: {len(problems)}", *problems]))
    say("all files are in place")


def look_up(source, root):
    """The files of a source, with the sizes and sha256 that Hugging Face reports (sha256 for large files only).

    With HF_HUB_OFFLINE set: the local files, or UserError if one is missing.
    """
    if source.kind == "url":
        return [File(source, source.files[0], HEAD_SIZE, HEAD_SHA256)]
    names = source.files
    if constants.HF_HUB_OFFLINE:
        here = [name for name in names if is_there(File(source, name, None, None), root)]
        lacking = [name for name in names if name not in here] if source.folder is not CACHE or not here else []
        if lacking:
            raise UserError(f"{lacking[0]} is missing and HF_HUB_OFFLINE is set; unset it to download the file")
        return [File(source, name, None, None) for name in here]
    found = {info.path: info for info in HfApi().get_paths_info(source.repo, list(names), repo_type=source.kind)}
    if source.folder is CACHE:
        names = [name for name in names if name in found][:1] or names
    if lacking := [name for name in names if name not in found]:
        raise UserError(f"the repository has no file {lacking[0]}")
    large = {name: info.lfs.sha256 for name, info in found.items() if info.lfs}
    return [File(source, name, found[name].size, large.get(name)) for name in names]


def is_there(file, root):
    """Whether the file is in its place, with the right size if that is known."""
    if file.source.folder is CACHE:
        cached = try_to_load_from_cache(file.source.repo, file.name)
        path = Path(cached) if isinstance(cached, str) else None
    else:
        path = root / file.source.folder / file.name
    return path is not None and path.is_file() and file.size in (None, path.stat().st_size)


def check_disk(files, root, say):
    """Report the size of the download and the free space; UserError if it does not fit."""
    needed = {}  # per file system, as folders on the same one share its space
    for file in files:
        folder = (Path(constants.HF_HUB_CACHE) if file.source.folder is CACHE else root).absolute()
        folder = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        first, size = needed.get(folder.stat().st_dev, (folder, 0))
        part = part_of(place_of(file, root))
        begun = part.stat().st_size if part.exists() else 0
        needed[folder.stat().st_dev] = first, size + file.size - (begun if begun <= file.size else 0)
    for folder, size in needed.values():
        free = free_bytes(folder)
        say(f"{size / 1e9:.2f} GB to download, {free / 1e9:.2f} GB free in {folder}")
        if size > free:
            raise UserError(
                f"{folder} has {free / 1e9:.2f} GB free, but the download needs {size / 1e9:.2f} GB; free some space, "
                "or choose another disk with --root and HF_HOME"
            )


def place_of(file, root):
    """Where the content of a file is stored."""
    repo, _, folder, kind = file.source
    if folder is CACHE:  # which stores contents by their sha256
        return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type=kind), "blobs", file.sha256)
    return root / folder / file.name


def part_of(place):
    """The file that holds what has been downloaded so far."""
    return place.with_name(f"{place.name}.part")


def fetch(file, root):
    """Download one file and return its path; UserError if its content is not as expected."""
    place = place_of(file, root)
    part = part_of(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    receive(file, part)
    verify(file, part)
    os.replace(part, place)
    in_cache = file.source.folder is CACHE
    # In the cache, the library finds the content and links the file's name to it.
    return hf_hub_download(file.source.repo, file.name) if in_cache else place


def receive(file, part):
    """Append the missing rest of `file` to `part`, reconnecting as long as each connection brings something.

    hf_hub_download does not serve here: it starts again from the first byte.
    """
    repo, _, _, kind = file.source
    url, headers = (repo, {}) if kind == "url" else (hf_hub_url(repo, file.name, repo_type=kind), build_hf_headers())
    while True:
        begun = part.stat().st_size if part.exists() else 0
        with open(part, "ab" if begun <= file.size else "wb") as stream:
            try:
                http_get(
                    url, stream, resume_size=stream.tell(), headers=headers, expected_size=file.size,
                    displayed_filename=file.name,
                )  # fmt: skip
                return
            except Exception:  # huggingface_hub has several HTTP clients, each with its own exceptions
                if not begun < stream.tell() < file.size:
                    raise


def verify(file, path):
    """Check the size of `path`, and its sha256 if known; if one is wrong, remove the file and raise UserError."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    found = path.stat().st_size, digest.hexdigest()
    expected = file.size, file.sha256 or found[1]
    if found != expected:
        path.unlink()
        raise UserError(
            f"{file.name}: received {found[0]} bytes with sha256 {found[1]}, expected {expected[0]} bytes with sha256 "
            f"{expected[1]}; the file was removed. Run the same command again; if that does not help, "
            f"{_elsewhere(file)}"
        )


def _elsewhere(file):
    """Advice for a server that keeps sending something else."""
    if file.source.kind == "url":
        return "the file has changed at its address: get it from elsewhere"
    return "try another mirror (HF_ENDPOINT)"


def explain(problem, source, root):
    """One line about what went wrong with a source, and what to do about it. The libraries raise many exceptions."""
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, UserError):
        what = str(problem)
    elif status in (401, 403):
        page = f"{constants.ENDPOINT}/{source.repo}"
        what = f"access refused ({status}); log in with `hf auth login` or set HF_TOKEN, and accept the terms on {page}"
    elif status == 404:
        what = f"not found (404) on {source.repo if source.kind == 'url' else constants.ENDPOINT}"
    elif isinstance(problem, OSError) and problem.errno in LOCAL:
        what = f"cannot be written: {problem.strerror} ({problem.filename or source.folder or constants.HF_HUB_CACHE})"
    else:
        cause = problem.__cause__ or problem
        what = f"{type(cause).__name__}: {first_line(cause)}; the same command continues the download"
    if source.folder is not CACHE:
        what += f". If you have the files from elsewhere, put them into {Path(root, source.folder)}"
    return f"{source.repo}: {what}"
