"""Scores of images, from the decoder or from files."""

import math
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

_reading_prompts = Lock()  # tokenizers keep settings of the call at work: one thread at a time
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def load_scorers(names, root, device, hps_version, from_files=False):
    """{column: reward} of the rewards `names`, fp32. HPSv2's column names its version and what it saw.

    hps_v2.0 is HPSv2 of the decoder's output, pooled as in training (PartiPrompts); hps_v2.0_jpeg, with from_files, is
    HPSv2 of the saved file, resized bicubically as the authors' program does (the HPSv2 benchmark).
    """
    scorers = {}
    for name in names:
        if name == "hpsv2":
            column = f"hps_v{hps_version}" + ("_jpeg" if from_files else "")
            scorers[column] = hpsv2.load(Path(root), device, torch.float32, hps_version)
        else:
            scorers[name] = load_reward(name, root, device)
    return scorers


def check_scorers(names, root, hps_version):
    """Raise UserError naming every file that load_scorers needs and lacks."""

    def check_hpsv2():
        if missing := hpsv2.missing(Path(root), hps_version):
            raise UserError(f"reward weights are missing:\n  hpsv2: {missing[0]}")

    check_all([(check_files, [name for name in names if name != "hpsv2"], root), (check_hpsv2,)])


@torch.inference_mode()
def score_images(scorers, images, prompts):
    """Images (B, 3, H, W), in [0, 1] but for a bicubic overshoot, and B prompts -> B dicts {column: score}.

    Scores are rewards without their scale and weight; where one is not finite, as of colours that overflowed, it is
    {"problem": why} for that image. Threads may share the scorers.
    """
    features = [scorer.image_features(images.float()) for scorer in scorers.values()]
    with _reading_prompts:
        columns = [scorer.score(seen, prompts) for scorer, seen in zip(scorers.values(), features, strict=True)]
    columns = [column.tolist() for column in columns]
    # Rounded as scores.csv holds them, so that a run that was stopped and went on has the same means.
    rows = [[float(f"{value:.7g}") for value in values] for values in zip(*columns, strict=True)]
    return [_finite(dict(zip(scorers, row, strict=True))) for row in rows]


def _finite(scores):
    wrong = [f"{name} is {score}" for name, score in scores.items() if not math.isfinite(score)]
    return {"problem": f"{', '.join(wrong)}: no score"} if wrong else scores


def score_files(scorers, paths, prompts, view):
    """Score image files, each after view(PIL picture) -> (3, H, W): whole_view, or rewards.hpsv2.prepare.

    hpsv2.prepare reads a file as the authors' own program does, so that scores compare with published ones: it ignores
    EXIF rotation and transparency, and 16-bit grey is clipped.

    Returns one dict a file: {column: score}, or {"problem": why} for a file that is missing, cannot be decoded or
    has no finite score.
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
    """A picture as the decoder gave it: all its pixels, as a person sees them (see upright_rgb)."""
    return pil_to_tensor(upright_rgb(picture)) / 255


def _read(path, view):
    try:
        with Image.open(path) as picture:
            return view(picture)
    except FileNotFoundError:
        return "no such file"
    except Exception as problem:  # every format's decoder raises its own kinds
        return f"cannot be decoded ({first_line(problem)})"


def find_image(folder, file):
    """The name below `folder` of the image `file`, which may have another suffix there, in any case."""
    place = Path(folder, file)
    if place.is_file() or not place.parent.is_dir():
        return file
    others = sorted(path.name for path in place.parent.glob(f"{place.stem}.*") if path.suffix.lower() in SUFFIXES)
    return str(Path(file).with_name(others[0])) if others else file
