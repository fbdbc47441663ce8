"""The benchmark programs from their command line to their files, on tiny models."""

import copy
import csv
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from rewards import load_reward
from rewards.hpsv2 import prepare
from textcraftor.benchmark import batches, images, sources
from textcraftor.benchmark.batches import start_worker, threads_per_worker, work_through
from textcraftor.benchmark.extend import extend_prompt, load_extender
from textcraftor.benchmark.options import parse_options
from textcraftor.benchmark.program import evaluate
from textcraftor.benchmark.prompt_lists import HPSV2, PARTI
from textcraftor.benchmark.results import Table, style_scores
from textcraftor.benchmark.scores import _read, find_image, score_files, score_images, whole_view
from textcraftor.errors import UserError
from textcraftor.hashes import weights_hash
from textcraftor.mixing import Weighted
from textcraftor.models import latent_shape, load_model, make_networks
from textcraftor.sampling import make_images, make_scheduler, prompt_noise
from textcraftor.weight_files import save_text_encoder

ROOT = Path(__file__).parents[1]
COLUMNS = ["clip", "aesthetic", "pickscore", "hps_v2.0"]
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
THINGS = ("fox", "cat", "car", "hat", "sea")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder, with a few prompts of both benchmarks."""
    monkeypatch.chdir(tmp_path)
    kinds = ("Animals", "Animals", "Things", "Things", "Things")
    lines = [f"a {thing}, {i}\t{kind}\tBasic" for i, (thing, kind) in enumerate(zip(THINGS, kinds, strict=True))]
    (tmp_path / "parti.tsv").write_text("\n".join(["Prompt\tCategory\tChallenge", *lines]) + "\n")
    for style in ("anime", "photo"):
        tiny.write_json(tmp_path / "styles" / f"{style}.json", [f"{style} of a {thing}" for thing in THINGS[:3]])
    return tmp_path


@pytest.fixture
def models(stable_diffusion, rewards_root):
    how = ["--step", "3", "--grad_steps", "2", "--mixed_precision", "no"]
    return ["--model", stable_diffusion, "--weights", rewards_root, *how]


@pytest.fixture
def parti(work, models):
    """A function that runs test_parti.py on five prompts; its arguments are added."""
    return lambda *more: run(PARTI, *models, "--prompts", "parti.tsv", "--output_path", "out", "--batch-size", 2, *more)


@pytest.fixture
def hpsv2(work, models):
    """A function that runs test_hpsv2.py on two styles of three prompts; its arguments are added."""
    return lambda *more: run(HPSV2, *models, "--prompts", "styles", "--output_path", "out", "--batch-size", 2, *more)


def run(benchmark, *arguments):
    AcceleratorState._reset_state(True)
    evaluate(benchmark, "", [str(argument) for argument in arguments])


def table(folder="out"):
    return pd.read_csv(Path(folder) / "scores.csv")


def summary(folder="out"):
    return json.loads((Path(folder) / "summary.json").read_text())


def contents(folder):
    """{file: bytes} of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def pixels(path):
    return np.asarray(Image.open(path)).astype(float)


# A whole run


def test_parti_scores_the_decoders_output(parti, rewards_root, monkeypatch, capsys):
    made, real = {}, sources.generate  # batches by their first prompt's number

    def remembered(pipeline, tuned, prompts, indices, **how):
        made[indices[0]] = real(pipeline, tuned, prompts, indices, **how)
        return made[indices[0]]

    monkeypatch.setattr(sources, "generate", remembered)
    parti()
    images, rows = torch.cat([made[first] for first in sorted(made)]), table()
    assert list(rows.columns) == ["index", "prompt", "category", "challenge", "file", *COLUMNS]
    assert rows["index"].tolist() == [0, 1, 2, 3, 4] and rows["prompt"][4] == "a sea, 4"
    for name, column in zip(("clip", "aesthetic", "pickscore", "hpsv2"), COLUMNS, strict=True):
        expected = load_reward(name, rewards_root, "cpu")(images, rows["prompt"].tolist())
        np.testing.assert_allclose(rows[column], expected.numpy(), rtol=1e-5, atol=1e-6)
        assert rows[column].std() > 0
    for image, file in zip(images, rows["file"], strict=True):
        assert np.abs(pixels(f"out/{file}") - 255 * image.permute(1, 2, 0).numpy()).max() <= 0.5001

    found = summary()
    assert found["images"] == {"scored": 5, "of": 5, "unreadable": {}, "prompts_cut": 0}
    for column in COLUMNS:
        assert found["scores"][column]["mean"] == pytest.approx(rows[column].mean())
        means = rows.groupby("category")[column].mean()
        assert {name: group[column] for name, group in found["category"].items()} == pytest.approx(means.to_dict())
    assert found["category"]["Animals"]["count"] == 2 and found["challenge"]["Basic"]["count"] == 5
    assert found["settings"]["seed"] == 2023 and found["settings"]["hps_version"] == "2.0"
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "5 of 5 images scored" in capsys.readouterr().out


def official_pixels(path, size):
    """The transform of the package hpsv2 1.2 (open_clip/transform.py, ResizeMaxSize), without torchvision."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255
    height, width = (round(side * size / max(pixels.shape[2:])) for side in pixels.shape[2:])
    if size != max(pixels.shape[2:]):
        pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    bottom, right = size - height, size - width
    pixels = torch.nn.functional.pad(pixels, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def test_hpsv2_scores_the_saved_files_as_its_own_program(hpsv2, rewards_root):
    hpsv2()
    rows = table()
    assert rows["file"].tolist() == [f"{style}/0000{i}.jpg" for style in ("anime", "photo") for i in range(3)]
    # open_clip's model, the diagonal, groups of a tenth of the style, as in hpsv2/evaluation.py.
    folder = rewards_root / "hpsv2"
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    model.load_state_dict(torch.load(folder / "HPS_v2_compressed.pt", weights_only=True)["state_dict"])
    images = torch.cat([official_pixels(f"out/{file}", 32) for file in rows["file"]])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(rows["prompt"].tolist())
    with torch.no_grad():
        features = model.eval().encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    expected = torch.diagonal(features[0] @ features[1].T).numpy()
    np.testing.assert_allclose(rows["hps_v2.0_jpeg"], expected, atol=1e-6)
    found = summary()
    for style, scores in zip(("anime", "photo"), 100 * expected.reshape(2, 3), strict=True):
        expected_style = {"mean": scores.mean(), "std": scores.std(), "count": 3}
        assert found["styles"][style] == pytest.approx(expected_style, abs=1e-3)
    assert found["average"] == pytest.approx(100 * expected.mean(), abs=1e-3)


def test_groups_are_tenths_of_the_whole_list():
    """With 800 prompts, as hpsv2/evaluation.py: np.mean and np.std of the means of scores[i : i + 80]."""
    scores = np.random.default_rng(0).normal(0.27, 0.02, 800)
    rows = [{"category": "anime", "file": f"anime/{i:05d}.jpg", "hps": score} for i, score in enumerate(scores)]
    groups = [np.mean(100 * scores[i : i + 80]) for i in range(0, 800, 80)]
    styles, average = style_scores(rows, "hps", {"anime": 800})
    assert styles["anime"] == pytest.approx({"mean": np.mean(groups), "std": np.std(groups), "count": 800})
    assert average == pytest.approx(np.mean(groups))
    part, _ = style_scores(rows[:160], "hps", {"anime": 800})  # --limit 160: two groups of 80
    assert part["anime"]["std"] == pytest.approx(np.std(groups[:2]))
    del rows[100]["hps"]
    rows[100]["problem"] = "no such file"
    styles, _ = style_scores(rows, "hps", {"anime": 800})  # the other groups keep their members
    groups[1] = np.mean(100 * np.delete(scores[80:160], 20))
    assert styles["anime"]["std"] == pytest.approx(np.std(groups)) and styles["anime"]["count"] == 799


def test_hpsv2_files_are_read_as_by_its_own_program(tmp_path):
    for size in (64, 48), (30, 50), (32, 32), (301, 200), (128, 128):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        picture.save(tmp_path / "a.png")
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        ours = (prepare(picture, 32) - mean) / std
        torch.testing.assert_close(ours[None], official_pixels(tmp_path / "a.png", 32), rtol=0, atol=1e-5)
        if size[0] == size[1]:  # PIL's bicubic resizing and centre crop, up to its rounding to 8 bits
            expected = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)(picture)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1.01 / 255 / min(STD))  # per direction


# The same images and scores whatever happens


@pytest.mark.parametrize("program, how", [("parti", "killed"), ("hpsv2", "stopped")])
def test_an_interrupted_run_continues_to_the_same_bytes(program, how, request, monkeypatch, capsys):
    program = request.getfixturevalue(program)
    program("--output_path", "whole")
    real, calls = sources.generate, []

    def interrupted(pipeline, tuned, prompts, indices, **options):
        calls.append(indices)
        if indices == [2, 3] and calls.count([2, 3]) == 1:  # the second batch of two, for the first time
            if how == "killed":
                raise RuntimeError("killed")
            os.kill(os.getpid(), signal.SIGTERM)
        return real(pipeline, tuned, prompts, indices, **options)

    monkeypatch.setattr(sources, "generate", interrupted)
    if how == "killed":
        with pytest.raises(RuntimeError, match="killed"):
            program()
        with open("out/scores.csv", "a") as file:
            file.write('2,"a car')  # half a row
    else:
        program()
        assert "stopped with 4 images done; the same command continues the run" in capsys.readouterr().out
    assert not Path("out/summary.json").exists()
    calls.append("again")
    program()
    program()  # with nothing left to do
    again = sorted(calls[calls.index("again") + 1 :])  # batches that were not done, and no others
    assert [first for first, *_ in again] == ([2, 4] if how == "killed" else [4])
    assert contents("out") == contents("whole")


def test_damaged_images_and_rows_are_made_again(parti, hpsv2, capsys):
    parti()
    good = contents("out")

    def change_rows(*changes):
        lines = good["scores.csv"].split(b"\r\n")
        for line, old, new in changes:
            assert old in lines[line]
            lines[line] = lines[line].replace(old, new, 1)
        Path("out/scores.csv").write_bytes(b"\r\n".join(lines))

    def images():
        for i, content in enumerate((
            good["00000.png"][:-500], good["00001.png"][:-20] + bytes(20), b"", b"no image", good["00004.png"]
        )):  # fmt: skip
            Path(f"out/{i:05d}.png").write_bytes(content)
        Image.open("out/00004.png").resize((32, 64)).save("out/00004.png")

    def other_images():
        Path("out/summary.json").write_bytes(b"[")
        Path("out/00000.png").unlink()
        Image.open("out/00001.png").convert("RGBA").save("out/00001.png")
        Image.open("out/00002.png").save("out/00002.png", "JPEG")

    for damage in (
        images,
        other_images,
        lambda: Path("out/scores.csv").write_bytes(b""),
        lambda: Path("out/scores.csv").write_bytes(good["scores.csv"][:300] + bytes(200)),  # after a power failure
        lambda: change_rows(
            (1, b"Animals", b"Things"), (2, b"cat", b"dog"), (3, b"00002.png", b"x.png"), (4, b"3,", b"x,")
        ),
        lambda: change_rows(
            (1, b".png,", b".png,much"), (2, b".png,", b".png,,"), (3, b"Basic,", b""), (4, b"a ", b'"a')
        ),
    ):
        damage()
        parti()
        assert contents("out") == good, damage
    assert "missing, damaged or of another size, to be made again: 5, first out/00000.png" in (capsys.readouterr().out)
    # Edited by a spreadsheet, which adds a byte-order mark: still the same table.
    Path("out/scores.csv").write_bytes(b"\xef\xbb\xbf" + good["scores.csv"])
    parti()
    assert contents("out") == good and "5 of them done before" in capsys.readouterr().out

    hpsv2("--output_path", "styles_out")
    good = contents("styles_out")
    for style, content in (("anime", good["anime/00000.jpg"][:-300]), ("photo", good["photo/00000.jpg"][:-2])):
        Path(f"styles_out/{style}/00000.jpg").write_bytes(content)
    hpsv2("--output_path", "styles_out")
    assert contents("styles_out") == good


def test_damaged_runs_are_refused_before_models_are_loaded(parti, monkeypatch):
    parti("--limit", 1)
    good = contents("out")
    load_pipeline = sources.load_pipeline
    monkeypatch.setattr(sources, "load_pipeline", None)
    table = good["scores.csv"]
    for name, content, message in (
        ("settings.json", b"", "settings.json: cannot be read"),
        ("settings.json", good["settings.json"][:50], "settings.json: cannot be read"),
        ("settings.json", b"[]", "settings.json: expected a JSON object, found list"),
        ("settings.json", b"{}", "settings.json: holds no settings of a run"),
        ("settings.json", b"\xff", "settings.json: cannot be read"),
        ("settings.json", None, "out holds scores.csv, but no settings.json"),
        ("scores.csv", table.replace(b",", b";"), "scores.csv, line 1: found 'index;.* expected the columns index,p"),
        ("scores.csv", table.replace(b"clip", b"klip", 1), "scores.csv, line 1: found"),
        ("scores.csv", table.decode().encode("utf-16"), "scores.csv: cannot be read .*restore it, or remove it"),
        ("scores.csv", table.replace(b"a fox", b"a f\xe4x"), "scores.csv: cannot be read .*codec"),
    ):  # fmt: skip
        if content is None:
            Path("out", name).unlink()
        else:
            Path("out", name).write_bytes(content)
        refused(lambda: parti("--limit", 1), message)
        Path("out", name).write_bytes(good[name])
    # A precision of another shape is no reason for a traceback: auto chooses again.
    settings = json.loads(good["settings.json"])
    tiny.write_json(Path("out/settings.json"), settings | {"precision": ["float32"]})
    monkeypatch.setattr(sources, "load_pipeline", load_pipeline)
    refused(lambda: parti("--limit", 1, "--mixed_precision", "auto"), r"with precision = \['float32'\], not")


def refused(call, message):
    with pytest.raises(UserError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)


def test_a_limit_can_be_raised_and_lowered(parti, monkeypatch):
    parti("--output_path", "whole")
    parti("--limit", 2)
    assert len(table()) == 2 and summary()["images"]["of"] == 2
    with monkeypatch.context() as patch:

        def killed(pipeline, tuned, prompts, indices, **how):
            raise RuntimeError("killed")

        patch.setattr(sources, "generate", killed)
        with pytest.raises(RuntimeError, match="killed"):
            parti()
    assert not Path("out/summary.json").exists() and len(table()) == 2  # a run that is not finished has no summary
    parti()
    assert contents("out")["scores.csv"] == contents("whole")["scores.csv"]
    note = b"\n\nMy own note, \xff"  # from an editor of another encoding
    Path("out/results.md").write_bytes(Path("out/results.md").read_bytes().rstrip() + note)
    parti("--limit", 1)
    assert contents("out")["scores.csv"] == contents("whole")["scores.csv"] and summary()["images"]["of"] == 1
    results = Path("out/results.md").read_bytes()
    assert results.count(b"| PartiPrompts |") == 3 and note + b"\n| PartiPrompts | 1 of 1 |" in results
    parti("--limit", 1)
    assert Path("out/results.md").read_bytes() == results


@pytest.mark.parametrize("program, columns", [("parti", COLUMNS), ("hpsv2", ["hps_v2.0_jpeg"])])
def test_an_image_that_overflowed_is_named_counted_and_made_again(program, columns, request, monkeypatch, capsys):
    program = request.getfixturevalue(program)
    program("--output_path", "whole")
    real = sources.generate

    def overflowed(pipeline, tuned, prompts, indices, **how):
        images = real(pipeline, tuned, prompts, indices, **how).clone()
        for image, index in zip(images, indices, strict=True):
            if index in broken:
                image[0, 0, 0] = broken[index]
        return images

    monkeypatch.setattr(sources, "generate", overflowed)
    broken = {2: torch.inf, 3: torch.nan}  # of two images in a batch, both
    program()
    found, rows = summary(), table()
    files = rows["file"].tolist()
    assert found["images"]["scored"] == len(rows) - 2 and found["images"]["of"] == len(rows)
    assert list(found["images"]["unreadable"]) == files[2:4] and not any(
        Path("out", file).exists() for file in files[2:4]
    )
    assert f"{files[3]}: its pixels are NaN or infinite in float32: no score" in capsys.readouterr().out
    assert "NaN" not in Path("out/summary.json").read_text().replace("are NaN or", "")
    assert rows[columns].isna().all(axis=1).tolist() == [i in broken for i in range(len(rows))]
    for column in columns:
        assert found["scores"][column]["mean"] == pytest.approx(rows[column].mean())
    broken = {}
    program()
    assert contents("out")["scores.csv"] == contents("whole")["scores.csv"] and summary() == summary("whole")
    broken = dict.fromkeys(range(9), torch.nan)
    with pytest.raises(UserError, match="none of the . images has a score; the first: its pixels are NaN"):
        program("--output_path", "nothing")
    assert summary("nothing")["images"]["scored"] == 0 and summary("nothing")["scores"] == {}


def test_a_score_that_is_not_finite_is_no_score(rewards_root):
    scorers = {"aesthetic": load_reward("aesthetic", rewards_root, "cpu")}
    scorers["aesthetic"].score = lambda features, prompts: torch.tensor([1.0, torch.nan, -torch.inf])
    scores = score_images(scorers, torch.zeros(3, 3, 8, 8), ["a"] * 3)
    assert scores == [
        {"aesthetic": 1.0},
        *({"problem": f"aesthetic is {value}: no score"} for value in ("nan", "-inf")),
    ]


def test_a_disk_that_is_too_small_or_full_is_one_line(parti, monkeypatch, capsys):
    parti("--output_path", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(images, "free_bytes", lambda folder: 5 * 3 * 64 * 64)
        refused(parti, r"out: 0\.00 GB free, but the 5 images to generate need about 0\.00 GB; free some space")
    assert not Path("out").exists()

    real, limits = sources.generate, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(pipeline, tuned, prompts, indices, **how):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000 if indices[0] else limits[0], limits[1]))
        return real(pipeline, tuned, prompts, indices, **how)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(sources, "generate", full)
            patch.setattr(batches, "WORKERS", 1)
            refused(
                parti, r"out/0000[23].png: cannot be written \(File too large\); the same command continues the run"
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(contents("out")) == ["00000.png", "00001.png", "scores.csv", "settings.json"]
    parti()
    assert contents("out") == contents("whole")


def test_the_batch_size_changes_nothing(parti):
    parti("--scheduler", "EulerAncestral")
    parti("--scheduler", "EulerAncestral", "--batch-size", 5, "--output_path", "five")
    for column in COLUMNS:
        np.testing.assert_allclose(table()[column], table("five")[column], atol=1e-4)
    for file in table()["file"]:
        assert np.abs(pixels(f"out/{file}") - pixels(f"five/{file}")).max() <= 1


def test_two_batches_are_in_work_at_once_and_finish_in_order(tmp_path):
    """Each batch waits for the other; the second is ready first."""
    rows = [{"index": i, "prompt": "a", "file": f"{i}.png"} for i in range(7)]
    both, threads, cores = threading.Barrier(2, timeout=30), [], torch.get_num_threads()

    def work(batch):
        threads.append(torch.get_num_threads())
        both.wait()
        time.sleep(0.2 if batch[0]["index"] % 4 == 0 else 0)
        return [row | {"clip": 0.5} for row in batch]

    scores, done = Table(tmp_path / "scores.csv", ["index", "prompt", "file"], ["clip"]), {}
    scores.write([])
    try:
        torch.set_num_threads(2)
        assert work_through(Accelerator(cpu=True), rows, done, 2, work, scores)
        assert threads == [1] * 4 and torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            work_through(Accelerator(cpu=True), rows, {}, 2, lambda batch: 1 / 0, scores)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(cores)
    assert list(done) == pd.read_csv(tmp_path / "scores.csv")["index"].tolist() == list(range(7))


def test_workers_get_at_least_one_core_and_their_processs_gpu(monkeypatch):
    """accelerate sets OMP_NUM_THREADS=1 for several processes, and its device has an index only if there are several;
    torch refuses a device without one."""
    found = [threads_per_worker(cores, workers) for cores, workers in ((1, 2), (2, 2), (3, 2), (16, 2), (1, 1))]
    assert found == [1, 1, 1, 8, 1]
    went = []

    def set_device(device):
        if device.index is None:
            raise ValueError("Expected a torch.device with a specified index")
        went.append(device.index)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    for name in ("cpu", "cuda", "cuda:0", "cuda:3"):
        start_worker(torch.device(name), torch.get_num_threads())
    assert went == [0, 3]


@pytest.mark.xdist_group("processes")
@pytest.mark.slow
def test_two_processes_make_the_same_bytes(parti, models):
    parti("--output_path", "one")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [ROOT / "test_parti.py", *models]
    command += ["--prompts", "parti.tsv", "--output_path", "two", "--batch-size", "2"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([str(part) for part in command], env=os.environ | threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents("two") == contents("one")


# One folder, one run


def test_another_setting_in_the_same_folder_is_refused_by_name(parti, stable_diffusion, tmp_path):
    parti("--limit", 1)
    encoder = load_model(str(stable_diffusion))[1]
    next(encoder.parameters()).data += 1
    save_text_encoder(encoder.state_dict(), tmp_path / "tc_text.safetensors")
    before = contents("out")
    for flag, value, message in (
        ("--seed", 7, "with seed = 2023, not 7"), ("--grad_steps", 1, "with grad_steps = 2, not 1"),
        ("--scheduler", "UniPC", "with scheduler = DDIM, not UniPC"), ("--guidance", 3, "with guidance = 7.5, not 3.0"),
        ("--text_path", tmp_path / "tc_text.safetensors", r"with text_path \(sha256\) = "),
        ("--score_only", "out", "with scheduler = DDIM, not None"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            parti("--limit", 1, flag, value)
    Path("parti.tsv").write_text("Prompt\tCategory\tChallenge\na dog\tAnimals\tBasic\n")
    with pytest.raises(UserError, match=r"with prompts \(sha256\) = "):
        parti("--limit", 1)
    assert contents("out") == before
    Path("unknown").mkdir()
    Path("unknown/00000.png").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="unknown holds 00000.png, but no settings.json of the run that made it"):
        parti("--output_path", "unknown")
    assert contents("unknown") == {"00000.png": b"somebody's"}


# --score_only


def test_images_of_any_model_are_scored_and_bad_files_counted(parti, rewards_root, capsys):
    parti("--output_path", "made")
    folder = Path("theirs")
    folder.mkdir()
    shutil.copy("made/00000.png", folder)
    Image.open("made/00001.png").convert("RGBA").save(folder / "00001.webp", lossless=True)
    Image.open("made/00002.png").resize((40, 56)).save(folder / "00002.png")
    (folder / "00003.png").write_bytes(Path("made/00003.png").read_bytes()[:500])
    capsys.readouterr()
    run(PARTI, "--score_only", "theirs", "--weights", rewards_root, "--prompts", "parti.tsv")
    rows, made, found = table("theirs"), table("made"), summary("theirs")
    assert rows["file"].tolist() == ["00000.png", "00001.webp", "00002.png", "00003.png", "00004.png"]
    for column in COLUMNS:
        # 8 bits of the files against the decoder's floats.
        np.testing.assert_allclose(rows[column][:2], made[column][:2], atol=2e-2)
        assert rows[column].isna().tolist() == [False, False, False, True, True]
        assert found["scores"][column]["mean"] == pytest.approx(rows[column].mean())
    unreadable = found["images"]["unreadable"]
    assert found["images"]["scored"] == 3 and found["images"]["of"] == 5
    assert found["images"]["prompts_cut"] is None
    assert unreadable["00004.png"] == "no such file" and "cannot be decoded" in unreadable["00003.png"]
    output = capsys.readouterr().out
    assert "3 of 5 images scored" in output and "00003.png: cannot be decoded" in output

    # Images may have been mended and changed when they are scored again.
    shutil.copy("made/00003.png", folder)
    shutil.copy("made/00001.png", folder / "00000.png")
    run(PARTI, "--score_only", "theirs", "--weights", rewards_root, "--prompts", "parti.tsv")
    assert summary("theirs")["images"]["scored"] == 4 and table("theirs")[COLUMNS].iloc[3].notna().all()
    assert (table("theirs")["aesthetic"][:2] == rows["aesthetic"][1]).all()


def test_scoring_hpsv2s_files_again_gives_the_same(hpsv2, rewards_root):
    hpsv2()
    run(HPSV2, "--score_only", "out", "--output_path", "again", "--weights", rewards_root, "--prompts", "styles")
    np.testing.assert_allclose(table("again")["hps_v2.0_jpeg"], table()["hps_v2.0_jpeg"], atol=1e-6)
    again, first = summary("again"), summary()
    assert again["styles"]["anime"] == pytest.approx(first["styles"]["anime"], abs=1e-4)


def test_versions_of_hpsv2_are_told_apart(hpsv2, rewards_root, tmp_path, capsys):
    with pytest.raises(UserError, match=r"hpsv2: .*HPS_v2.1_compressed.pt.*; get it: .*--only hpsv2.1"):
        hpsv2("--hps_version", "2.1")
    shutil.copytree(rewards_root / "hpsv2", tmp_path / "hpsv2")
    shutil.move(tmp_path / "hpsv2" / "HPS_v2_compressed.pt", tmp_path / "hpsv2" / "HPS_v2.1_compressed.pt")
    hpsv2("--hps_version", "2.1", "--weights", tmp_path, "--limit", 1)
    assert "hps_v2.1_jpeg" in table().columns and summary()["settings"]["hps_version"] == "2.1"
    assert "hps_version 2.1" in Path("out/results.md").read_text()
    with pytest.raises(UserError, match="2.1, not 2.0; .* score its images again with --score_only out --output_path"):
        hpsv2("--limit", 1)
    with pytest.raises(UserError, match="2.1, not 2.0; .* choose another --output_path$"):
        hpsv2("--limit", 1, "--seed", 1)


# --prompt_eng


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """A tiny GPT-2 over single bytes."""
    folder = tmp_path_factory.mktemp("gpt2")
    alphabet = [*(chr(code) for code in range(33, 127)), "Ġ", "<|endoftext|>"]
    tiny.write_json(folder / "vocab.json", {token: index for index, token in enumerate(alphabet)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tiny.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 128})
    size = {"vocab_size": len(alphabet), "n_positions": 128, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**size, bos_token_id=len(alphabet) - 1, eos_token_id=len(alphabet) - 1)
    tiny.seeded(8, lambda: GPT2LMHeadModel(config)).save_pretrained(folder)
    return folder


def test_prompts_are_extended_before_generation_and_both_are_kept(parti, language_model, rewards_root, monkeypatch):
    seen, real = {}, sources.generate

    def noted(pipeline, tuned, prompts, indices, **how):
        seen.update(zip(indices, prompts, strict=True))
        return real(pipeline, tuned, prompts, indices, **how)

    monkeypatch.setattr(sources, "generate", noted)
    parti("--prompt_eng", language_model)
    rows, asked = table(), [seen[index] for index in sorted(seen)]
    assert rows["extended"].tolist() == asked
    for prompt, extended in zip(rows["prompt"], asked, strict=True):
        assert extended.startswith(f"{prompt},")
    # Long and different, but for those that the random model happens to end early.
    assert sum(len(extended) > len(prompt) + 20 for prompt, extended in zip(rows["prompt"], asked, strict=True)) >= 3
    assert len({extended[-20:] for extended in asked}) == 5
    found = summary()
    assert found["prompt_eng"] == str(language_model) and found["settings"]["score_prompt"] == "extended"

    # Each prompt's own seed: batches, an interruption and a limit change nothing.
    parti("--prompt_eng", language_model, "--batch-size", 5, "--limit", 4, "--output_path", "other")
    assert table("other")["extended"].tolist() == asked[:4]
    parti("--prompt_eng", language_model, "--output_path", "other")
    assert table("other")["extended"].tolist() == asked

    extender = load_extender(language_model, "cpu")
    assert [extend_prompt(*extender, rows["prompt"][0], seed, 0) == asked[0] for seed in (2023, 1)] == [True, False]

    # The same images, scored with the other prompts.
    parti("--prompt_eng", language_model, "--score_prompt", "original", "--output_path", "original")
    assert contents("original")["00001.png"] == contents("out")["00001.png"]
    assert summary("original")["settings"]["score_prompt"] == "original"
    for folder, column in (("out", "extended"), ("original", "prompt")):
        clip = load_reward("clip", rewards_root, "cpu")
        pictures = torch.stack([whole_view(Image.open(f"{folder}/{file}")) for file in rows["file"]])
        expected = clip(pictures, rows[column].tolist())
        np.testing.assert_allclose(table(folder)["clip"], expected.numpy(), atol=2e-3)
    assert (table("original")["clip"] - rows["clip"]).abs().max() > 1e-2


def test_a_language_model_without_a_longest_text_extends_prompts(tmp_path, language_model):
    """Bloom's positions have no limit, and its config no max_position_embeddings."""
    config = BloomConfig(vocab_size=49408, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(language_model).save_pretrained(tmp_path)
    assert extend_prompt(*load_extender(str(tmp_path), "cpu"), "a fox", 1, 0).startswith("a fox,")


# Parts


def test_the_default_folder_says_what_is_tested():
    for arguments, folder in (
        ("", "original_parti"),
        ("--text_path checkpoints/tc_text_e_0_iter_10000.pth", "paper_ckpt_parti"),
        ("--text_path /home/me/runs/v1.5/ --prompt_eng", "runs_v1.5_prompt_eng_parti"),
        ("--text_path ../tc_text.safetensors --unet_path a/tc_unet.safetensors", "tc_text_a_tc_unet_parti"),
        ("--model miniature --text_path output/tc_text.safetensors", "miniature_output_tc_text_parti"),
        ("--text_path a/tc.safetensors=0.6 --text-path=user/b=-0.3", "a_tc_0.6_user_b_-0.3_parti"),
        ("--hps_version 2.1 --limit 8", "original_parti_v2.1"),
        ("--prompt_eng --score_prompt original", "original_prompt_eng_parti_score_original"),
        ("--model ./models/other --scheduler UniPC --seed 7", "other_parti_UniPC_seed_7"),
        ("--model ..", f"{Path('..').resolve().name}_parti"),
    ):  # fmt: skip
        assert parse_options(PARTI, "", arguments.split()).output_path == f"tests/{folder}"
        assert parse_options(PARTI, "", [*arguments.split(), "--output_path", "mine"]).output_path == "mine"
    for model, extender in (("miniature", str(ROOT / "miniature" / "extender")), ("other", "daspartho/prompt-extend")):
        assert parse_options(PARTI, "", ["--model", model, "--prompt_eng"]).prompt_eng == extender
        assert parse_options(PARTI, "", ["--model", model, "--prompt_eng", "mine"]).prompt_eng == "mine"


def test_several_encoders_are_mixed(parti, stable_diffusion, capsys):
    model, mixed = load_model(str(stable_diffusion)), []
    for name, weight in (("a", 0.75), ("b", -0.5)):
        encoder = copy.deepcopy(model.text_encoder)
        generator = torch.Generator().manual_seed(ord(name))
        for value in encoder.parameters():
            value.data += 0.02 * torch.randn(value.shape, generator=generator)
        save_text_encoder(encoder.state_dict(), f"{name}.safetensors")
        mixed.append(Weighted(encoder, weight))
    both = ("--text_path", "a.safetensors=0.75", "--text_path", "b.safetensors=-0.5")
    parti(*both, "--prompt_weighting", 0.5)
    scheduler = make_scheduler(model.scheduler_config, 3)
    rows, noise = table(), prompt_noise(2023, range(5), latent_shape(model))
    how = {"tuned_steps": 2, "guidance": 7.5, "weighting": 0.5}
    with torch.no_grad():
        wanted = make_images(make_networks(model, mixed), scheduler, rows["prompt"].tolist(), noise, **how)
    for file, image in zip(rows["file"], wanted, strict=True):
        np.testing.assert_allclose(pixels(f"out/{file}"), 255 * image.permute(1, 2, 0), rtol=0, atol=1)
    assert summary()["text_path"] == "a.safetensors=0.75 b.safetensors=-0.5"
    # Other weights are another setting; one encoder of weight 1 is the same as one without a weight.
    refused(lambda: parti("--text_path", "a.safetensors=0.75", "--prompt_weighting", 0.5), r"with text_path \(sha256\)")
    parti("--text_path", "a.safetensors", "--output_path", "alone", "--limit", 2)
    parti("--text_path", "a.safetensors=1", "--output_path", "alone")
    assert "2 of them done before" in capsys.readouterr().out
    for specs, message in (
        (("a.safetensors", "b.safetensors=0.3"), "a.safetensors: has no weight"),
        (("a.safetensors=0.5", "c.safetensors=0.5"), "c.safetensors: no such weights"),
        (("a.safetensors=some",), "some is not a weight"),
    ):
        words = ["--output_path", "new", *(word for spec in specs for word in ("--text_path", spec))]
        refused(partial(parti, *words), message)


@pytest.fixture(scope="module")
def speed():
    """speed/eval.py as a module."""
    spec = importlib.util.spec_from_file_location("speed_eval", ROOT / "speed" / "eval.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_the_benchmark_of_speed_refuses_what_its_plain_loop_cannot_do(work, models, speed, monkeypatch):
    for arguments in (
        "--unet_path u.pth", "--scheduler UniPC", "--prompt_weighting 0.5", "--prompt_eng", "--score_only .",
        "--grad_steps 25", "--text_path a.safetensors=0.5",
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{arguments.split()[0]} .*: the plain loop"):
            speed.main(arguments.split())

    def other_noise(seed, indices, shape):
        return images.prompt_noise(seed + 1, indices, shape)

    monkeypatch.setattr(speed, "prompt_noise", other_noise)
    with pytest.raises(SystemExit, match="different images"):
        speed.main([*map(str, models), "--prompts", "parti.tsv", "--limit", "1"])


def test_the_benchmark_of_speed_makes_the_same_images_and_scores(work, models, speed, capsys):
    speed.main([*map(str, models), "--prompts", "parti.tsv", "--batch-size", "2", "--limit", "0"])
    *head, differences = capsys.readouterr().out.splitlines()
    assert any(line.startswith("5 images on ") for line in head)
    found = re.match(r"largest difference: ([01]) of 255 grey levels, (.*)", differences)[2]
    columns, values = zip(*(item.split() for item in found.split(", ")), strict=True)
    assert list(columns) == COLUMNS and max(map(float, values)) < 1e-4


def test_what_cannot_work_is_said_before_models_are_loaded(work, models, monkeypatch):
    monkeypatch.setattr(sources, "load_pipeline", None)
    Path("file").write_text("")
    Path("link").symlink_to("nowhere")
    Path("empty").mkdir()
    Path("style_is_file").mkdir()
    Path("style_is_file/photo").write_text("")
    Path("odd/scores.csv").mkdir(parents=True)
    Path("half.json").write_text('["a fox", "\\ud83d"]')
    for arguments, message in (
        ("--step 10", "grad_steps <= step"),
        ("--guidance 0.5", "--guidance 0.5: must be at least 1"),
        ("--scheduler Karras", "invalid choice"),
        ("--score_prompt original", "--score_prompt original: only works with --prompt_eng"),
        ("--score_only none", "--score_only none: no such folder"),
        ("--score_only empty", "holds no image of this benchmark; expected anime/00000.jpg, photo/00002.jpg"),
        ("--score_only . --prompt_eng", "prompts are extended only where images are generated"),
        ("--model ./none", "no such model"),
        ("--text_path none.pth", "none.pth: no such weights"),
        ("--mixed_precision fp16", "fp16: needs a GPU"),
        ("--prompts half.json", r"half.json, entry 2: the prompt holds half of a surrogate pair \(U\+D83D\)"),
        ("--prompts half.json --score_only empty", "half.json, entry 2"),
        ("--output_path file", "--output_path .*file is a file; choose a folder"),
        ("--output_path file/a/b", "file is a file; choose a folder"),
        ("--output_path link", "link is a file; choose a folder"),
        ("--output_path /dev/null/x", "/dev/null is a file; choose a folder"),
        ("--output_path /proc/x", "cannot write in /proc .*; choose another folder"),
        (f"--output_path {'x' * 300}", "cannot write in .*name too long"),
        ("--output_path style_is_file", "photo is a file; choose a folder"),
        ("--output_path odd", "odd/scores.csv is not a file"),
        ("--score_only empty --output_path file", "file is a file; choose a folder"),
    ):  # fmt: skip
        before = sorted(Path().rglob("*"))
        refused(partial(run, HPSV2, *models[:4], "--prompts", "styles", *arguments.split()), message)
        assert sorted(Path().rglob("*")) == before, arguments


def test_help_and_mistakes_need_no_torch(tmp_path):
    """Both programs answer with torch out of reach."""
    (tmp_path / "torch.py").write_text("raise ImportError('too slow')")
    for program, arguments, answer in (
        ("test_parti.py", ["--help"], "--grad_steps"), ("test_hpsv2.py", ["--help"], "STYLE/00000.jpg"),
        ("test_parti.py", ["--step", "0"], "--step 0: must be at least 1"),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, ROOT / program, *arguments], env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert answer in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_rows_of_a_table_survive_commas_quotes_and_line_breaks(tmp_path):
    prompts = ['a "b", c', "two\nlines", "ü"]
    rows = [{"index": i, "prompt": prompt, "file": f"{i}.png"} for i, prompt in enumerate(prompts)]
    scores = Table(tmp_path / "scores.csv", ["index", "prompt", "file"], ["clip"])
    scores.write([])
    scores.add([row | {"clip": 0.25 + row["index"]} for row in rows[:2]])
    scores.add([rows[2] | {"problem": "no such file"}])
    assert scores.read(rows) == {0: rows[0] | {"clip": 0.25}, 1: rows[1] | {"clip": 1.25}}
    prompts = ["a\u2028b", "a\x85b", "a\x0cb", "a\x1cb", "a\rb", "a\r\nb"]
    odd = [{"index": 3 + i, "prompt": prompt, "file": "-", "clip": 0.5} for i, prompt in enumerate(prompts)]
    more = Table(tmp_path / "more.csv", ["index", "prompt", "file"], ["clip"])
    more.write(odd)
    assert list(more.read(odd).values()) == odd
    with open(tmp_path / "scores.csv", newline="") as file:
        assert [row["clip"] for row in csv.DictReader(file)] == ["0.25", "1.25", ""]
    # A full disk: rows are added whole or not at all.
    before, limits = (tmp_path / "more.csv").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(UserError, match="more.csv: cannot be written"):
            more.add(odd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "more.csv").read_bytes() == before


def test_files_of_any_size_and_order_are_scored_one_by_one(rewards_root, tmp_path):
    scorers = {"aesthetic": load_reward("aesthetic", rewards_root, "cpu")}
    rng = np.random.default_rng(0)
    for i, size in enumerate([(64, 64), (40, 60), (64, 64)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in (0, 1, 9, 2)]
    together = score_files(scorers, paths, ["a"] * 4, whole_view)
    alone = [score_files(scorers, [path], ["a"], whole_view)[0] for path in paths]
    assert together[2] == alone[2] == {"problem": "no such file"}
    for i in (0, 1, 3):
        assert together[i] == pytest.approx(alone[i], abs=1e-5)


def test_a_hash_is_of_the_values_alone(stable_diffusion):
    first, second = load_model(str(stable_diffusion))[1], load_model(str(stable_diffusion))[1]
    assert weights_hash(first) == weights_hash(second)
    list(second.parameters())[-1].data[3] += 1e-6
    assert weights_hash(first) != weights_hash(second)


def test_pytest_takes_the_programs_for_no_tests():
    """Not even if every function were a test."""
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-o", "python_functions=*"]
    code = pytest.main([*options, f"--ignore={ROOT / 'tests'}", str(ROOT)])
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED


def test_pictures_are_read_as_a_person_sees_them(tmp_path):
    """16-bit grey, transparency over white, EXIF rotation, palettes, CMYK and suffixes in upper case."""
    grey = Image.fromarray(np.arange(4, dtype=np.uint16).reshape(2, 2) * 16448)  # 0, 64, 128, 192 of 255
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    turned, exif = Image.new("RGB", (4, 2)), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 255, 0])
    grey.save(tmp_path / "0.PNG")
    clear.save(tmp_path / "1.png")
    turned.save(tmp_path / "2.jpg", exif=exif)
    palette.convert("RGB").save(tmp_path / "3.webp", lossless=True)
    Image.new("CMYK", (2, 2), (0, 0, 0, 0)).save(tmp_path / "4.Jpeg")
    clear.quantize().save(tmp_path / "5.png")
    Image.new("F", (2, 2)).save(tmp_path / "6.tiff")
    read = [_read(tmp_path / find_image(tmp_path, f"{number}.png"), whole_view) for number in range(6)]
    assert (read[0][0].flatten() * 255).tolist() == [0, 64, 128, 192]
    assert (read[1][:, 0, 0] * 255).tolist() == [0, 0, 255] and (read[1][:, 1, 1] == 1).all()
    assert read[2].shape == (3, 4, 2)
    assert (read[3][:, 0, 0] * 255).tolist() == [0, 255, 0]
    assert (read[4] > 0.98).all()
    assert (read[5][:, 1, 1] == 1).all()
    assert "floating-point" in _read(tmp_path / "6.tiff", whole_view)
