"""Fetching the released models and prompts, each to the place where training looks for it."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers

from textcraftor.errors import UserError, first_line

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = None  # as a folder: the hub's own cache (HF_HOME), where open_clip looks


class Source(NamedTuple):
    """Files of one hub repository, or of one web address (kind "url"), and the folder they belong in."""

    repo: str
    files: tuple[str, ...]  # in the cache only the first of them that the hub has
    folder: str | None
    kind: str = "model"


class File(NamedTuple):
    """A file of a source; size in bytes and sha256 are None where nobody says them."""

    source: Source
    name: str
    size: int | None
    sha256: str | None


STABLE_DIFFUSION_FILES = (  # fp32, once; neither the safety checker nor the single-file checkpoints
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
    """What to type to fetch `name` (of SOURCES) to below `root`, for messages."""
    elsewhere = "" if Path(root).resolve() == REPOSITORY else f" --root {root}"
    return f"python download_models.py --only {name}{elsewhere}"


def download(names, root, say=print):
    """Fetch what is not there yet of `names` (of SOURCES) to below the folder `root`, or to the hub's cache.

    A file that is there with the hub's size is left alone. Files appear under their final name whole and verified;
    a download that broke off is a .part beside it, from which the next call goes on.
    Raises UserError if the disk is too small, before anything is fetched; and at the end, naming all that failed.
    """
    root, problems, files = Path(root), [], []
    for source in (source for name in names for source in SOURCES[name]):
        try:
            files += [file for file in look_up(source, root) if not is_there(file, root)]
        except Exception as problem:  # see explain
            problems.append(explain(problem, source))
    check_disk(files, root, say)
    for file in files:
        try:
            say(fetch(file, root))
        except Exception as problem:
            problems.append(explain(problem, file.source))
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} of the downloads failed:", *problems]))
    say("all there")


def look_up(source, root):
    """The source's files with size and sha256 as the hub says them. Offline: as they lie here, UserError if they don't.

    The hub knows the sha256 of large files only.
    """
    if source.kind == "url":
        return [File(source, source.files[0], HEAD_SIZE, HEAD_SHA256)]
    names = source.files
    if constants.HF_HUB_OFFLINE:
        here = [name for name in names if is_there(File(source, name, None, None), root)]
        lacking = [name for name in names if name not in here] if source.folder is not CACHE or not here else []
        if lacking:
            raise UserError(f"HF_HUB_OFFLINE is set, and {lacking[0]} is not here; unset it to fetch")
        return [File(source, name, None, None) for name in here]
    found = {info.path: info for info in HfApi().get_paths_info(source.repo, list(names), repo_type=source.kind)}
    if source.folder is CACHE:
        names = [name for name in names if name in found][:1] or names
    if lacking := [name for name in names if name not in found]:
        raise UserError(f"the repository has no file {lacking[0]}")
    large = {name: info.lfs.sha256 for name, info in found.items() if info.lfs}
    return [File(source, name, found[name].size, large.get(name)) for name in names]


def is_there(file, root):
    """Whether the file is in its place, with its size if that is known."""
    if file.source.folder is CACHE:
        cached = try_to_load_from_cache(file.source.repo, file.name)
        path = Path(cached) if isinstance(cached, str) else None
    else:
        path = root / file.source.folder / file.name
    return path is not None and path.is_file() and file.size in (None, path.stat().st_size)


def check_disk(files, root, say):
    """Say how much there is to fetch and how much room; UserError if it will not fit."""
    needed = {}  # folders on one file system share its room
    for file in files:
        folder = (Path(constants.HF_HUB_CACHE) if file.source.folder is CACHE else root).absolute()
        folder = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        first, size = needed.get(folder.stat().st_dev, (folder, 0))
        part = part_of(place_of(file, root))
        begun = part.stat().st_size if part.exists() else 0
        needed[folder.stat().st_dev] = first, size + file.size - (begun if begun <= file.size else 0)
    for folder, size in needed.values():
        free = shutil.disk_usage(folder).free
        say(f"{size / 1e9:.2f} GB to fetch, {free / 1e9:.2f} GB free in {folder}")
        if size > free:
            raise UserError(f"{folder} has {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are needed; make room")


def place_of(file, root):
    """Where the content of a file belongs."""
    repo, _, folder, kind = file.source
    if folder is CACHE:  # the library names contents by their sha256 there
        return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type=kind), "blobs", file.sha256)
    return root / folder / file.name


def part_of(place):
    """Where a file lies while it is not whole."""
    return place.with_name(f"{place.name}.part")


def fetch(file, root):
    """Fetch one file to its place, and return the place; UserError if it is not what was promised."""
    place = place_of(file, root)
    part = part_of(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    receive(file, part)
    verify(file, part)
    os.replace(part, place)
    in_cache = file.source.folder is CACHE
    return hf_hub_download(file.source.repo, file.name) if in_cache else place  # finds the content, and links to it


def receive(file, part):
    """Append to the file `part` what it lacks of `file`, in new connections as long as each brings something.

    Not hf_hub_download: called again, it starts from nothing.
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
            except Exception:  # the library has several HTTP clients, each with its own kinds
                if not begun < stream.tell() < file.size:
                    raise


def verify(file, path):
    """Remove `path` and raise UserError unless it has the file's sha256, if that is known, and size."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    found = path.stat().st_size, digest.hexdigest()
    expected = file.size, file.sha256 or found[1]
    if found != expected:
        path.unlink()
        raise UserError(
            f"{file.name} came as {found[0]} bytes with sha256 {found[1]}, expected {expected[0]} with {expected[1]}; "
            "removed. Fetch it again, and if that does not help, from another HF_ENDPOINT"
        )


def explain(problem, source):
    """One line about what went wrong with a source, and what to do. The hub's client raises many kinds."""
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, UserError):
        what = str(problem)
    elif status in (401, 403):
        page = f"{constants.ENDPOINT}/{source.repo}"
        what = f"refused ({status}): log in with `hf auth login` or set HF_TOKEN, and accept the terms on {page} if any"
    elif status == 404:
        what = f"not found (404) on {source.repo if source.kind == 'url' else constants.ENDPOINT}"
    else:
        cause = problem.__cause__ or problem
        what = f"{type(cause).__name__}: {first_line(cause)}; the same command goes on from here"
    if source.folder is not CACHE:
        what += f". If you have it from elsewhere, it belongs in {source.folder}/"
    return f"{source.repo}: {what}"
