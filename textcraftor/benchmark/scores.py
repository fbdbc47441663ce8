"""Scores of images, from the decoder's output or from files."""

import math
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Lock

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from rewards import check_files, hpsv2, load_reward
from textcraftor.errors import UserError, first_line
from textcraftor.image_files import upright_rgb
from textcraftor.options import check_all

_tokenizing = Lock()  # a tokenizer stores the settings of the current call: one thread at a time
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def score_columns(names, hps_version, from_files):
    """The columns of scores.csv for the rewards `names`. HPS v2's column names its version and what it scored.

    hps_v2.0 is the score of the decoder's output, pooled as in training (PartiPrompts); hps_v2.0_jpeg, from_files, is
    the score of the saved file, resized bicubically as in the authors' program (HPSv2 benchmark).
    """
    return [f"hps_v{hps_version}" + "_jpeg" * from_files if name == "hpsv2" else name for name in names]


def load_scorers(names, root, device, hps_version, from_files=False):
    """{column, see score_columns: reward} of the rewards `names`, in fp32."""
    return {
        column: hpsv2.load(Path(root), device, torch.float32, hps_version)
        if name == "hpsv2"
        else load_reward(name, root, device)
        for name, column in zip(names, score_columns(names, hps_version, from_files), strict=True)
    }


def check_scorers(names, root, hps_version):
    """Raise UserError with every file that load_scorers needs and does not find."""
    others = [name for name in names if name != "hpsv2"]
    checks = [(check_files, others, root)]
    if "hpsv2" in names:
        checks.append((_check_hpsv2, root, hps_version))
    check_all(checks)


def _check_hpsv2(root, hps_version):
    if missing := hpsv2.missing(Path(root), hps_version):
        raise UserError(f"reward weights are missing:\n  hpsv2: {missing[0]}")


def file_view(scorers, from_files):
    """How score_files prepares a PIL picture for the rewards `scorers`: a function picture -> (3, H, W) in [0, 1].

    from_files: as the authors' HPS v2 program reads a file, so that scores compare with published ones. It ignores EXIF
    rotation and transparency, and clips 16-bit grey. Otherwise: the whole picture, as the decoder's output is scored.
    """
    if not from_files:
        return whole_view
    (scorer,) = scorers.values()
    return partial(hpsv2.prepare, size=scorer.image_size[0])


@torch.inference_mode()
def score_images(scorers, images, prompts):
    """Images (B, 3, H, W) in [0, 1] (bicubic resizing may overshoot) and B prompts -> B dicts {column: score}.

    Scores are rewards without their scale and weight. An image with a score that is NaN or infinite gets
    {"problem": reason} instead. Threads may share the scorers.
    """
    features = [scorer.image_features(images.float()) for scorer in scorers.values()]
    with _tokenizing:
        columns = [scorer.score(seen, prompts) for scorer, seen in zip(scorers.values(), features, strict=True)]
    columns = [column.tolist() for column in columns]
    # Rounded as in scores.csv, so that a run that was interrupted and continued has the same means.
    rows = [[float(f"{value:.7g}") for value in values] for values in zip(*columns, strict=True)]
    return [_finite(dict(zip(scorers, row, strict=True))) for row in rows]


def _finite(scores):
    wrong = [f"{name} is {score}" for name, score in scores.items() if not math.isfinite(score)]
    return {"problem": f"{', '.join(wrong)}: no score"} if wrong else scores


def score_files(scorers, paths, prompts, view):
    """Score image files, each prepared by `view` (see file_view), for B prompts -> B dicts {column: score}.

    A file that is missing, cannot be decoded or has no finite score gets {"problem": reason} instead.
    """
    pixels = [_read(path, view) for path in paths]
    results = [{"problem": found} if isinstance(found, str) else {} for found in pixels]
    readable = [i for i, result in enumerate(results) if not result]
    for _, same_size in groupby(readable, key=lambda i: pixels[i].shape):
        batch = list(same_size)
        images, texts = torch.stack([pixels[i] for i in batch]), [prompts[i] for i in batch]
        for i, scores in zip(batch, score_images(scorers, images, texts), strict=True):
            results[i] = scores
    return results


def whole_view(picture):
    """All pixels of a picture, as a person sees them (see upright_rgb)."""
    return pil_to_tensor(upright_rgb(picture)) / 255


def _read(path, view):
    try:
        with Image.open(path) as picture:
            return view(picture)
    except FileNotFoundError:
        return "no such file"
    except Exception as problem:  # each image format's decoder raises its own kinds
        return f"cannot be decoded ({first_line(problem)})"


def find_image(folder, file):
    """The name of the image `file` in `folder`, where it may have another suffix, in upper or lower case."""
    place = Path(folder, file)
    if place.is_file() or not place.parent.is_dir():
        return file
    others = sorted(path.name for path in place.parent.glob(f"{place.stem}.*") if path.suffix.lower() in SUFFIXES)
    return str(Path(file).with_name(others[0])) if others else file
