"""python -m rewards.check: records what nobody has measured, and then notices what changes."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from rewards import REWARDS, check
from textcraftor.errors import UserError


def test_pictures_are_the_same_bits_everywhere():
    pictures = check.pictures()
    assert all(picture.shape == (3, check.SIZE, check.SIZE) for picture in pictures.values())
    pixels = (torch.stack(list(pictures.values())) * 255).round().to(torch.uint8)
    assert torch.equal(pixels / 255, torch.stack(list(pictures.values())))
    assert (
        hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        == "9292109f0cdb275838af19480e9527ec0c90aeb994bcba8bb8d0a8ced938f913"
    )


def test_golden_file_has_a_place_for_each_score():
    golden = json.loads(check.GOLDEN.read_text())
    assert set(golden) == {*REWARDS, "recorded on"} and set(check.TOLERANCE) == set(REWARDS)
    assert all(list(golden[name]) == list(check.pictures()) for name in REWARDS)


def test_scores_are_recorded_once_and_compared_from_then_on(rewards_root, tmp_path, capsys):
    golden, root = shutil.copy(check.GOLDEN, tmp_path), shutil.copytree(rewards_root, tmp_path / "root")
    arguments = ["--weights", str(root), "--golden", str(golden)]
    check.main(arguments)
    assert capsys.readouterr().out.count("now recorded") == 16
    recorded = json.loads((tmp_path / "golden.json").read_text())
    assert f"torch {torch.__version__}" in recorded["recorded on"]
    prompt = "a sunset over the sea"
    assert recorded["aesthetic"][prompt]["recorded"] == pytest.approx(
        check.load_reward("aesthetic", root, "cpu")(check.pictures()[prompt][None], [prompt]).item(), abs=1e-5
    )

    check.main(arguments)
    output = capsys.readouterr().out
    assert output.count("agrees with recorded") == 16 and output.count("the own prompt is the nearest for") == 3
    assert json.loads((tmp_path / "golden.json").read_text()) == recorded

    recorded["clip"][prompt]["reference"] = recorded["clip"][prompt]["recorded"] + 0.002  # goes before what is recorded
    (tmp_path / "golden.json").write_text(json.dumps(recorded))
    with pytest.raises(UserError, match="^1 scores differ"):
        check.main(arguments)
    assert capsys.readouterr().out.count("DIFFERS from reference") == 1


def test_other_models_than_the_released_ones_are_not_recorded_as_those(rewards_root):
    before = check.GOLDEN.read_text()
    with pytest.raises(UserError, match="clip takes 32 x 32 pixels, the released model 224 x 224"):
        check.main(["--weights", str(rewards_root)])
    assert check.GOLDEN.read_text() == before


@pytest.mark.parametrize("confused", [True, False])
def test_models_that_confuse_the_pictures_are_not_recorded(monkeypatch, tmp_path, confused):
    class Model:
        image_size = (224, 224)

        def __init__(self, name, *_):
            self.name = name

        def __call__(self, images, prompts):
            return torch.arange(4.0)

        def image_features(self, images):
            return torch.eye(4)

        def text_features(self, prompts):
            return torch.eye(4).flip(0) if confused and self.name == "clip" else torch.eye(4)

    golden = Path(shutil.copy(check.GOLDEN, tmp_path))
    before = golden.read_text()
    monkeypatch.setattr(check, "GOLDEN", golden)
    monkeypatch.setattr(check, "check_files", lambda *_: None)
    monkeypatch.setattr(check, "load_reward", Model)
    arguments = ["--golden", str(golden)]
    if confused:
        with pytest.raises(UserError, match="1 of the models take another prompt's picture for their own"):
            check.main(arguments)
        assert golden.read_text() == before
    else:
        check.main(arguments)
        assert golden.read_text() != before


def test_missing_weights_are_said_with_the_command_that_fetches_them(tmp_path):
    with pytest.raises(UserError, match="download_models.py --only pickscore"):
        check.main(["--weights", str(tmp_path)])
