"""Direct fine-tuning as a run of the training script."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_train import command, same_weights, table, train, work  # noqa: F401 (fixtures)

from textcraftor.errors import UserError


@pytest.fixture
def pictures(work, monkeypatch):  # noqa: F811
    """Ten captioned pictures in an image folder, one of them broken."""
    monkeypatch.setenv("TEXTCRAFTOR_CACHE", str(work / "cache"))
    folder, rng = work / "pictures", np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"picture number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "4.png").write_bytes(b"no picture")
    return ["--method", "direct", "--images", "pictures"]


def test_a_resumed_run_equals_one_never_stopped_and_learns(work, command, pictures, capsys):  # noqa: F811
    """Its reward, redness, rises; the cache serves all three runs; the broken picture is named."""
    run = [*command, *pictures, "--t_max", 300, "--lr_text", "1e-3", "--lr_unet", "1e-4"]
    train(*run, "--max_steps", 6, "--output-path", "whole")
    assert "pictures with captions to train on, 2 prompts held out" in capsys.readouterr().out
    assert "4.png" in Path("whole/bad_pictures.txt").read_text()
    train(*run, "--max_steps", 3, "--output-path", "parts")
    said = capsys.readouterr().out
    assert "0 pictures encoded now" in said
    train(*run, "--max_steps", 6, "--output-path", "parts", "--resume")
    for name in ("tc_text", "tc_unet"):
        assert same_weights(f"whole/{name}.safetensors", f"parts/{name}.safetensors")
    rows = table("whole")
    assert float(rows[-1]["val_total"]) > float(rows[0]["val_total"])
    with pytest.raises(UserError, match="t_max = 300, not 400"):
        train(*run, "--t_max", 400, "--max_steps", 7, "--output-path", "parts", "--resume")
    Image.new("RGB", (64, 64), "red").save("pictures/7.png")
    with pytest.raises(UserError, match="had different training pictures"):
        train(*run, "--max_steps", 7, "--output-path", "parts", "--resume")


def test_accumulated_batches_make_the_whole_one(work, command, pictures):  # noqa: F811
    run = [*command, *pictures, "--max_steps", 2, "--lr_text", "1e-3"]
    train(*run, "--batch-size", 2, "--output-path", "one")
    train(*run, "--batch-size", 1, "--gradient_accumulation_steps", 2, "--output-path", "two")
    for name in ("total", "grad_norm"):
        assert float(table("one")[2][name]) == pytest.approx(float(table("two")[2][name]), rel=1e-3)


def test_options_that_do_not_belong_together_are_refused(work, command):  # noqa: F811
    for options, message in (
        (["--images", "pictures"], "--method direct and --images FOLDER belong together"),
        (["--method", "direct"], "belong together"),
        (["--method", "direct", "--images", "nowhere"], "nowhere"),
        (["--method", "direct", "--images", "x", "--t_min", 5, "--t_max", 4], "t_min <= t_max"),
    ):
        with pytest.raises(UserError, match=message):
            train(*command, *options)
