"""What the experiments share: runs and scores are made once, and tables say what they should."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import empty_prompt, figure6, over_optimisation, runs, table1, table4, ways
from textcraftor.errors import UserError
from textcraftor.training_options import parse_options


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """The commands of all trainings, each of which leaves what a real one does."""
    commands = []

    def run(command):
        commands.append(command)
        options = parse_options(command[2:])
        folder = Path(options.output_path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "options.json").write_text("{}")
        (folder / "metrics.csv").touch()
        for part in ("tc_text", "tc_unet"):
            (folder / f"{part}_e_0_iter_{options.max_steps}.safetensors").write_text(json.dumps([part, *command]))

    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    monkeypatch.setattr(runs, "run_training", run)
    return commands


def test_a_run_is_trained_once_goes_on_and_is_another_with_other_flags(trainings):
    short, long = runs.train("a", updates=20), runs.train("a", updates=40)
    assert runs.train("a", updates=20) == short and short.parent == long.parent and len(trainings) == 2
    assert "--resume" not in trainings[0] and "--resume" in trainings[1]
    folders = {short.parent, runs.train("a", seed=1).parent, runs.train("a", "--clip", "0").parent}
    assert runs.train("a", "--clip", "0.5").parent not in folders and len(folders) == 3 and len(trainings) == 5
    assert all("--resume" not in command for command in trainings[2:])


def test_a_run_without_the_weights_asked_for_says_what_to_do(trainings, monkeypatch):
    monkeypatch.setattr(runs, "run_training", lambda command: None)
    with pytest.raises(UserError, match="no weights of update 40.* run this experiment again"):
        runs.train("a", updates=40)


def test_ctrl_c_waits_for_the_training_to_save(tmp_path):
    """The terminal's Ctrl-C reaches both processes; the training may take longer than a moment to save."""
    saves = "import signal, time, pathlib\n"
    saves += f"def save(*_):\n time.sleep(2)\n pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n raise SystemExit\n"
    saves += f"signal.signal(signal.SIGINT, save)\npathlib.Path({str(tmp_path / 'begun')!r}).touch()\ntime.sleep(60)"
    code = f"import sys; from experiments.runs import run_training; run_training([sys.executable, '-c', {saves!r}])"
    experiment = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a script's "&" ignores it
        stderr=subprocess.DEVNULL,
    )
    until = time.time() + 120
    while not (tmp_path / "begun").exists() and time.time() < until:
        time.sleep(0.1)
    os.killpg(experiment.pid, signal.SIGINT)
    assert experiment.wait(60) in (-signal.SIGINT, 1) and (tmp_path / "saved").exists()


def test_a_training_that_fails_is_named():
    with pytest.raises(UserError, match="training failed, see above: .* 'raise SystemExit"):
        runs.run_training([sys.executable, "-c", "raise SystemExit(3)"])


def test_scores_are_computed_once_for_a_key(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    made = []

    def compute():
        made.append(True)
        return {"right": torch.tensor([1.0, 0.0])}

    for key in (["a", 1], ["a", 1], ["a", 2]):
        assert runs.kept(key, compute)["right"].tolist() == [1, 0]
    assert len(made) == 2


def test_a_row_has_the_paired_change_in_the_columns_units():
    before = {"right": torch.tensor([0.0, 0.0, 1.0, 1.0]), "total": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    after = {"right": torch.tensor([1.0, 0.0, 1.0, 1.0]), "total": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    row = runs.changes("a", look=runs.mean([after, after]), before=before, scores=("right", "total"))
    # Student's t of four prompts: 25 ± 3.182 * 50 / 2, and no spread at all.
    assert row == "| a | +25.0 [−54.6, +104.6] | −1.00 [−1.00, −1.00] |"
    assert runs.means("a", look=after, scores=("right",)) == "| a | 75.0 |"
    assert runs.header("way", scores=("right",)) == "| way | right |\n| --- | --- |"


@pytest.mark.parametrize("way", ways.WAYS)
def test_ways_are_runs_of_their_own_with_options_that_training_takes(way):
    assert [ways.folder(other) for other in ways.WAYS].count(ways.folder(way)) == 1
    args = parse_options(["--model", "miniature", "--output-path", "x", *ways.WAYS[way]])
    assert args.gradient in way and (f"used {args.reuse} times" in way or args.reuse == 1 and "used" not in way)


def test_what_a_way_costs_counts_the_first_steps_of_each_sample_once(monkeypatch):
    """16 images an update, in pools of 64 that --reuse 4 shows four times: 40 updates show 192 of their 640 anew."""
    monkeypatch.setattr(ways, "flops", lambda *flags, updates=1, banked=False: 1.0 if banked else 3.0)
    default, reused = "last_k, K = 5", "last_k, K = 5, used 4 times"
    assert ways.spent(default, 40) == 640 * 3 and ways.spent(reused, 40) == 192 * 3 + 448
    assert ways.updates_for(default, 640 * 3) == 40
    most = ways.updates_for(reused, 640 * 3)
    assert ways.spent(reused, most) <= 640 * 3 < ways.spent(reused, most + 1)


@pytest.mark.parametrize(
    "program, rows",
    ((table1, 26), (table4, 25), (figure6, 13), (over_optimisation, 16), (ways, 49), (empty_prompt, 3)),
)
def test_programs_train_what_they_need_and_print_every_row(program, rows, trainings, tmp_path, monkeypatch, capsys):
    """Every run and test has scores of its own here: rows that are alike would be the same weights twice."""

    def kept(key, compute):
        generator = torch.Generator().manual_seed(int(runs.short_hash(key), 16))
        names = {"scores": runs.SCORES, "diversity": ["diversity"], "flops": ["flops"]}[key[0]]
        return {name: torch.rand(runs.PROMPTS, generator=generator) for name in names}

    monkeypatch.setattr(runs, "kept", kept)
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    for module in (table1, figure6):
        monkeypatch.setattr(module, "draw", lambda shown, to: to.touch())
    monkeypatch.setattr(table1, "pictures", lambda: tmp_path)
    for module in (table1, ways):
        monkeypatch.setattr(module, "flops", lambda *flags, updates=1, banked=False: 1.0 if banked else 2 + len(flags))
    program.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    starts = [number - 1 for number, line in enumerate(lines) if line.startswith("| ---")]
    tables = [lines[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert sum(len(table) - 2 for table in tables) == rows
    for header, _, *body in tables:
        scores = [line.split(" | ")[-3:] for line in body if " | 0 | " not in line]
        assert "clean" not in header or all(scores.count(row) == 1 for row in scores), header
