"""The trajectory bank: first sampling steps computed once change no result."""

import copy
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from test_train import ROOT, command, same_weights, table, train, two_processes, work  # noqa: F401

from textcraftor import bank as banks
from textcraftor import sampling
from textcraftor.benchmark.images import generate, load_pipeline, open_bank_of
from textcraftor.benchmark.options import parse_options
from textcraftor.benchmark.prompt_lists import PARTI
from textcraftor.errors import UserError
from textcraftor.sampling import make_scheduler, training_sampler
from textcraftor.stream import reused, samples_shown


def linear(z, t, conditions):
    """A stand-in for the UNet whose prediction depends on everything."""
    row = conditions["c"][len(z) :].view(-1, 1, 1, 1)
    return 0.3 * z + 0.001 * float(t) * torch.tanh(z) + row


@pytest.mark.parametrize("gradient, count", [("last_k", (1, 4)), ("drtune", (2, 2)), ("refl", (1, 1))])
def test_a_sampler_from_the_bank_is_the_sampler(gradient, count):
    scheduler = make_scheduler({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, 10)
    noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    original, tuned = {"c": torch.arange(6.0)}, {"c": torch.arange(6.0) * 2}
    tuned["c"].requires_grad_()
    bank = banks.memory_bank(banks.bank_stops(gradient, 10, count[1], driven=6))
    calls = []

    def predict(z, t, conditions):
        calls.append(int(t))
        return linear(z, t, conditions)

    for step in range(1, 8):
        sampler, tuned_steps = training_sampler(gradient, count, 6, 0, step)
        plain = sampler(predict, scheduler, noise, original, tuned, tuned_steps)
        (wanted,) = torch.autograd.grad(plain.square().sum(), tuned["c"])
        calls.clear()
        wrapped = banks.with_bank(bank, sampler, ["a", "b", "c"], noise)
        kept = wrapped(predict, scheduler, noise, original, tuned, tuned_steps)
        (found,) = torch.autograd.grad(kept.square().sum(), tuned["c"])
        assert torch.equal(kept, plain) and torch.equal(found, wanted)
    longest = {"last_k": 4, "drtune": 6, "refl": 1}[gradient]
    assert len(calls) <= longest and len(bank.memory) == 3  # the first steps are not run again


def test_samples_are_shown_the_same_number_of_times():
    assert reused(range(5, 100), 7, 1, seed=0) == list(range(5, 100))
    images, times = 3, 4
    shown = reused(range(2 * 12 * times), images, times, seed=0)
    assert Counter(shown) == dict.fromkeys(range(24), times)
    assert set(shown[: 12 * times]) == set(range(12)) and shown[:12] == list(range(12))
    assert shown[12:24] != shown[24:36] and sorted(shown[12:24]) == list(range(12))
    assert shown == [reused([n], images, times, seed=0)[0] for n in range(len(shown))]
    for updates in (1, 3, 4, 5, 17, 40):
        assert samples_shown(updates, images, times) == len(set(reused(range(updates * images), images, times, 0)))


@pytest.fixture
def evaluations(monkeypatch):
    """How many images the UNet has seen, twice each for guidance."""
    seen = []
    plain = sampling.predict_noise

    def counted(unet, guidance, z, t, conditions, **how):
        seen.append(len(z))
        return plain(unet, guidance, z, t, conditions, **how)

    for module in (sampling, banks):
        monkeypatch.setattr(module, "predict_noise", counted)
    return seen


def quiet(command, step, grad_steps):  # noqa: F811
    """A run of `step` sampling steps without recomputation, that validates at its ends only and draws no samples."""
    how = ["--gradient_checkpointing", "none", "--step", step, "--grad_steps", grad_steps]
    return [*command, *how, "--val_every", 0, "--sample_every", 0]


def spent(evaluations):
    total = sum(evaluations)
    evaluations.clear()
    return total


def test_a_run_with_a_bank_is_the_run_without(work, command, evaluations):  # noqa: F811
    run = [*quiet(command, 20, 2), "--save_every", 2]
    train(*run, "--output-path", "plain")
    plain = spent(evaluations)
    train(*run, "--output-path", "banked", "--bank", "bank")
    assert same_weights("plain/tc_text.safetensors", "banked/tc_text.safetensors")
    assert spent(evaluations) == plain  # nothing to reuse yet
    train(*run, "--output-path", "again", "--bank", "bank", "--max_steps", 2)
    spent(evaluations)
    train(*run, "--output-path", "again", "--bank", "bank", "--resume")
    assert spent(evaluations) == 2 * 2 * 2 + 2 * 20  # two steps of two images, and the last validation
    assert same_weights("plain/tc_text.safetensors", "again/tc_text.safetensors")

    # Damaged entries are made again; other settings have another bank.
    (folder,) = Path("bank").iterdir()
    first, second, *others = sorted(folder.rglob("*.safetensors"))
    assert len(others) == 6
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:50])
    shutil.copytree("bank", "damaged")
    train(*run, "--output-path", "mended", "--bank", "damaged")
    assert same_weights("plain/tc_text.safetensors", "mended/tc_text.safetensors")
    assert load_file(next(Path("damaged").rglob(first.name)))["latents"].dtype == torch.float32
    train(*run, "--output-path", "guided", "--bank", "bank", "--guidance", 3)
    assert len([*Path("bank").iterdir()]) == 2


def test_a_bank_filled_beforehand_saves_the_first_steps(work, command, evaluations):  # noqa: F811
    run = [*quiet(command, 10, 2), "--max_steps", 16]
    run += ["--bank", "bank", "--reuse", 4]
    train(*run, "--fill")
    assert spent(evaluations) == 8 * 8 and not Path("output").exists()  # 4 updates of 2 images, 8 steps each
    train(*run)
    assert spent(evaluations) == 16 * 2 * 2 + 2 * 2 * 10
    assert len({row["total"] for row in table("output")[1:]}) == 16


def test_a_disk_that_fills_up_ends_filling_and_nothing_else(work, command, monkeypatch, capsys):  # noqa: F811
    run, save, kept = [*quiet(command, 10, 2), "--max_steps", 4], banks.save_tensors, []

    def full(tensors, path):
        if len(kept) == 3:
            raise UserError(f"{path}: no space left on device")
        kept.append(path)
        save(tensors, path)

    train(*run, "--output-path", "plain")
    monkeypatch.setattr(banks, "save_tensors", full)
    with pytest.raises(UserError, match="--fill: .* no space left .* repeat the command"):
        train(*run, "--bank", "bank", "--fill")
    assert len(kept) == 3 and all(path.exists() for path in kept)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="--fill: stopped; .* repeat the command"):
        patched.setattr(banks, "banked_latents", Mock(side_effect=KeyboardInterrupt))
        train(*run, "--bank", "bank", "--fill")
    capsys.readouterr()
    kept.pop()
    train(*run, "--bank", "other")
    assert capsys.readouterr().out.count("NOT KEPT") == 1
    assert same_weights("plain/tc_text.safetensors", "output/tc_text.safetensors")


def test_two_processes_share_a_bank(work, command):  # noqa: F811
    run = [*command, "--step", 10, "--grad_steps", 2, "--val_every", 0, "--sample_every", 0, "--reuse", 2]
    train(*run, "--output-path", "one", "--max_steps", 10)  # in the run's own folder
    options = ["--output-path", "two", "--bank", "two_bank", "--batch-size", 1, "--max_steps", 10]
    done = two_processes(ROOT / "train_textcraftor.py", *run, *options)
    assert done.returncode == 0, done.stderr
    entries = [
        {path.relative_to(bank) for path in Path(bank).rglob("*.safetensors")} for bank in ("one/bank", "two_bank")
    ]
    assert entries[0] == entries[1] and len(entries[0]) == 12
    for first, second in zip(table("one"), table("two"), strict=True):
        assert float(second["total"] or 0) == pytest.approx(float(first["total"] or 0), rel=1e-3)


def test_validation_runs_its_first_steps_once(work, command, evaluations):  # noqa: F811
    run = [*quiet(command, 25, 1), "--val_every", 1, "--max_steps", 3]
    train(*run)
    training, validations = 3 * 2 * 25, 4 * 2 * 15 + 2 * 10
    assert spent(evaluations) == training + validations


def test_tests_of_several_encoders_share_their_first_steps(stable_diffusion, tmp_path, evaluations):
    prompts, seen = ["a red fox", "a blue cat", "the sea"], []
    for number, bank in ((0, ""), (1, ""), (0, "bank"), (1, "bank")):
        pipeline, tuned = load_pipeline(str(stable_diffusion), "DDIM", 10)
        tuned = copy.deepcopy(pipeline.text_encoder)
        for weight in tuned.parameters():
            weight.mul_(1 + 0.1 * number)
        args = SimpleNamespace(bank=str(tmp_path / bank), step=10, grad_steps=6, guidance=3.0)
        options = {"seed": 5, "grad_steps": 6, "guidance": 3.0, "bank": open_bank_of(args, pipeline) if bank else None}
        seen.append((generate(pipeline, tuned, prompts, [0, 1, 2], **options), spent(evaluations)))
    (first, all_steps), (second, _), (first_banked, filling), (second_banked, banked) = seen
    assert torch.equal(first, first_banked) and torch.equal(second, second_banked) and not torch.equal(first, second)
    assert (all_steps, filling, banked) == (3 * 10, 3 * 10, 3 * 6)
    for options in (["--scheduler", "PNDM"], ["--grad_steps", "25"], ["--score_only", str(tmp_path)]):
        with pytest.raises(UserError, match="--bank .*leave --bank out"):
            parse_options(PARTI, "", ["--text_path", "", "--bank", str(tmp_path / "x"), *options])


def test_what_a_bank_cannot_be_used_for(work, command):  # noqa: F811
    for options, problem in (
        (["--bank", "bank", "--lr_unet", "1e-4"], "--bank and --reuse .* trains the UNet"),
        (["--fill"], "--fill .* --bank FOLDER"),
        (["--bank", "bank", "--reuse", 0], "--reuse 0"),
        (["--bank", "own.py"], "own.py"),
    ):
        with pytest.raises(UserError, match=problem):
            train(*command, *options)
