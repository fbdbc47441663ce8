"""python -m rewards.check: records scores that nobody has measured yet, and notices when they change."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rewards import REWARDS, check
from textcraftor.errors import UserError
from textcraftor.files import write_whole


def test_pictures_and_the_released_rewards_have_their_places_in_the_golden_file():
    """The pictures are the same bits everywhere. A new reward needs no place there."""
    pictures = check.pictures()
    assert all(picture.shape == (3, check.SIZE, check.SIZE) for picture in pictures.values())
    pixels = (torch.stack(list(pictures.values())) * 255).round().to(torch.uint8)
    assert torch.equal(pixels / 255, torch.stack(list(pictures.values())))
    assert (
        hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        == "9292109f0cdb275838af19480e9527ec0c90aeb994bcba8bb8d0a8ced938f913"
    )
    golden = json.loads(check.GOLDEN.read_text())
    assert set(golden) == {*check.TOLERANCE, "recorded on"} and set(check.TOLERANCE) <= set(REWARDS)
    assert all(list(golden[name]) == list(pictures) for name in check.TOLERANCE)


def test_scores_are_recorded_once_and_compared_from_then_on(rewards_root, tmp_path, capsys):
    golden, root = shutil.copy(check.GOLDEN, tmp_path), shutil.copytree(rewards_root, tmp_path / "root")
    arguments = ["--weights", str(root), "--golden", str(golden)]
    check.main(arguments)
    assert capsys.readouterr().out.count("nothing to compare with yet") == 16
    recorded = json.loads((tmp_path / "golden.json").read_text())
    assert f"torch {torch.__version__}" in recorded["recorded on"]
    prompt = "a sunset over the sea"
    assert recorded["aesthetic"][prompt]["recorded"] == pytest.approx(
        check.load_reward("aesthetic", root, "cpu")(check.pictures()[prompt][None], [prompt]).item(), abs=1e-5
    )

    check.main(arguments)
    output = capsys.readouterr().out
    assert output.count("agrees with recorded") == 16 and output.count("pictures are closest to their own prompt") == 3
    assert json.loads((tmp_path / "golden.json").read_text()) == recorded

    recorded["clip"][prompt]["reference"] = recorded["clip"][prompt]["recorded"] + 0.002  # takes precedence
    (tmp_path / "golden.json").write_text(json.dumps(recorded))
    with pytest.raises(UserError, match="^1 scores differ"):
        check.main(arguments)
    assert capsys.readouterr().out.count("DIFFERS from reference") == 1


def test_models_that_confuse_the_pictures_are_not_recorded(monkeypatch, tmp_path):
    class Model:
        image_size = (224, 224)

        def __init__(self, name, *_):
            self.name = name

        def __call__(self, images, prompts):
            return torch.arange(4.0)

        def image_features(self, images):
            return torch.eye(4)

        def text_features(self, prompts):
            return torch.eye(4).flip(0) if self.name == confused else torch.eye(4)

    golden = Path(shutil.copy(check.GOLDEN, tmp_path))
    before = golden.read_text()
    monkeypatch.setattr(check, "GOLDEN", golden)
    monkeypatch.setattr(check, "check_files", lambda *_: None)
    monkeypatch.setattr(check, "load_reward", Model)
    arguments = ["--golden", str(golden)]
    confused = "clip"
    with pytest.raises(UserError, match="1 of the models match pictures with the wrong prompts"):
        check.main(arguments)
    assert golden.read_text() == before
    confused = None
    check.main(arguments)
    assert golden.read_text() != before


def test_missing_and_other_weights_are_refused(tmp_path, rewards_root):
    before = check.GOLDEN.read_text()
    with pytest.raises(UserError, match="clip takes 32 x 32 pixels, the released model 224 x 224"):
        check.main(["--weights", str(rewards_root)])
    assert check.GOLDEN.read_text() == before
    with pytest.raises(UserError, match="download_models.py --only pickscore"):
        check.main(["--weights", str(tmp_path)])


def test_files_written_whole_have_the_permissions_of_any_new_file(tmp_path):
    """safetensors itself makes files that only their owner can read."""
    before = os.umask(0)
    try:
        for umask, permissions in [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)]:
            os.umask(umask)
            with write_whole(tmp_path / "new.safetensors") as unfinished:
                save_file({"weight": torch.zeros(2)}, unfinished)
            assert (tmp_path / "new.safetensors").stat().st_mode & 0o777 == permissions
            with write_whole(tmp_path / f"folder_{umask}") as unfinished:
                (unfinished / "inner").mkdir(parents=True)
                save_file({"weight": torch.zeros(2)}, unfinished / "inner" / "new.safetensors")
            assert (tmp_path / f"folder_{umask}" / "inner").stat().st_mode & 0o777 == 0o777 & ~umask
            assert (tmp_path / f"folder_{umask}").stat().st_mode & 0o777 == 0o777 & ~umask
            file = tmp_path / f"folder_{umask}" / "inner" / "new.safetensors"
            assert file.stat().st_mode & 0o777 == permissions
    finally:
        os.umask(before)
    with (
        pytest.raises(UserError, match="new.safetensors: cannot be written"),
        write_whole(tmp_path / "new.safetensors"),
    ):
        pass  # a block that writes nothing must not replace the file
    assert (tmp_path / "new.safetensors").stat().st_size > 0
