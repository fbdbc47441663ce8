"""HPS v2 against the scores of the authors' own package."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image

from rewards import hpsv2, load_reward
from textcraftor.benchmark.scores import score_files

PACKAGE = "hpsv2==1.2.0"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Folder with the authors' package from PyPI, without its dependencies: what it imports is here or not needed."""
    folder = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--retries", "1", "--timeout", "20"]
    pip += ["--target", str(folder), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be installed from PyPI: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow
def test_scores_are_those_of_the_authors_package(package, rewards_root, tmp_path):
    """Same weights, image files and prompts. Images of the tower's own size have the same scores in training."""
    generator = np.random.default_rng(0)
    sizes = [(tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)] * 2 + [(96, 64), (50, 70), (512, 512)]
    paths = [tmp_path / f"{number:05d}.{kind}" for number, kind in enumerate(("png", "png", "png", "jpg", "jpg"))]
    for path, (width, height) in zip(paths, sizes, strict=True):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    prompts = ["a small fox at the left", "An Owl, 4k!", "", "fox " * 100, "\u00e9t\u00e9 &amp; hiver"]
    (tmp_path / "HPS_v2_compressed.pt").symlink_to(rewards_root / "hpsv2" / "HPS_v2_compressed.pt")
    tiny.write_json(tmp_path / "ViT-H-14.json", tiny.OPEN_CLIP)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("hpsv2_package.py"), package, tmp_path],
        input=json.dumps([(str(path), prompt) for path, prompt in zip(paths, prompts, strict=True)]),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)

    with torch.device("meta"):
        real = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    assert {name: list(value.shape) for name, value in real.state_dict().items()} == expected["shapes"]

    reward = load_reward("hpsv2", rewards_root, "cpu")
    view = partial(hpsv2.prepare, size=tiny.IMAGE_SIZE)
    scores = [row["hpsv2"] for row in score_files({"hpsv2": reward}, paths, prompts, view)]
    np.testing.assert_allclose(scores, expected["scores"], rtol=0, atol=1e-4)
    assert np.std(expected["scores"]) > 0.01
    same_size = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255 for path in paths[:2]])
    np.testing.assert_allclose(reward(same_size, prompts[:2]), expected["scores"][:2], rtol=0, atol=1e-4)
