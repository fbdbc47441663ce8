"""Runs of the training script with the terms that keep rewards from being gamed, on the miniature."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_train import command, same_weights, table, train, work  # noqa: F401 (fixtures)

import rewards
from rewards.constraint import load_constraint
from rewards.sum import RewardSum
from textcraftor.checkpoints import MARGIN, Trained, check_disk, has_room
from textcraftor.embeddings import embed_prompts
from textcraftor.errors import UserError
from textcraftor.models import load_model, make_networks
from textcraftor.objective import training_objective
from textcraftor.training_options import REPOSITORY, parse_options

MINIATURE = REPOSITORY / "miniature"
RUN = [
    "--model", "miniature", "--monitor", "clip", "--clip", 0, "--hpsv2", 0, "--batch-size", 2, "--val_count", 2,
    "--step", 4, "--grad_steps", 2, "--save_every", 0, "--val_every", 0, "--sample_every", 0, "--lr_text", "1e-4",
    "--mixed_precision", "no",
]  # fmt: skip
TERMS = ["--clip_constraint", 0.5, "--anchor", 0.1, "--shared_text", 0.3, "--smooth", 0.01, "--ema", 0.9]


def test_objective_is_the_sum_of_its_terms():
    """Against the definitions written out, in float64, on random images and a changed text encoder."""
    model = load_model(str(MINIATURE / "stable-diffusion"))
    constraint = load_constraint(MINIATURE, model.text_encoder, "cpu", torch.float64)
    encoder = load_model(str(MINIATURE / "stable-diffusion")).text_encoder.double().requires_grad_()
    model.text_encoder.double()
    with torch.no_grad():
        for number, weight in enumerate(encoder.parameters()):
            generator = torch.Generator().manual_seed(number)
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    prompts = ["a large fox on grass", "a rocket"]
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    aesthetic = rewards.load_reward("aesthetic", MINIATURE, "cpu", torch.float64)
    summed = RewardSum([(aesthetic, 2.0)])
    conditions = embed_prompts(make_networks(model, encoder), prompts)
    args = SimpleNamespace(clip_constraint=0.5, anchor=0.1, shared_text=1.0, smooth=0.01)
    objective, scores = training_objective(args, summed, constraint, model.tokenizer, images, prompts, conditions)

    at = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(aesthetic(at, prompts).sum(), at)
    moved = torch.stack([
        (image - 0.01 * g / (g**2).mean().sqrt()).clamp(0, 1) for image, g in zip(images, gradient, strict=True)
    ])  # fmt: skip
    ids = [model.tokenizer(prompt).input_ids for prompt in prompts]
    before, after = conditions[0]["encoder_hidden_states"][2:], conditions[1]["encoder_hidden_states"][2:]
    pooled = torch.stack([row[len(tokens) - 1] for row, tokens in zip(after, ids, strict=True)])
    text = torch.nn.functional.normalize(pooled @ constraint.projection, dim=-1)
    cosine = (constraint.image_features(moved) * text).sum(dim=-1)
    distance = 1 - ((before * after).sum(dim=-1) / (before.norm(dim=-1) * after.norm(dim=-1))).mean()
    expected = 2 * 3 * aesthetic(moved, prompts) + 0.5 * 100 * cosine - 0.1 * distance
    torch.testing.assert_close(objective, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores["aesthetic"], aesthetic(images, prompts).detach())
    weights = list(encoder.parameters())
    ours = torch.autograd.grad(objective.sum(), [images, *weights], allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(expected.sum(), [images, *weights], allow_unused=True)
    largest = max(b.norm() for b in theirs[1:] if b is not None)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() < 1e-9 * (largest if index else b.norm())


def test_a_resumed_run_with_all_terms_equals_one_never_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(*RUN, *TERMS, "--max_steps", 4, "--output-path", "whole")
    train(*RUN, *TERMS, "--max_steps", 2, "--output-path", "parts")
    train(*RUN, *TERMS, "--max_steps", 4, "--output-path", "parts", "--resume")
    for name in ("tc_text", "tc_text_ema"):
        assert same_weights(f"whole/{name}.safetensors", f"parts/{name}.safetensors")
    rows = table("whole")
    for name in ("clip_constraint", "anchor"):
        assert [row[name] for row in rows[1:]] == [row[name] for row in table("parts")[1:]]
    assert float(rows[1]["anchor"]) < 1e-5  # nothing has moved yet
    assert float(rows[4]["anchor"]) > float(rows[1]["anchor"])
    # What has changed is said before the checkpoint is read, which would fail without the average.
    for changed, message in ((["--anchor", 0], "has anchor = 0.1, not 0.0"), (["--ema", 0], "has ema = 0.9, not 0.0")):
        with pytest.raises(UserError, match=message):
            train(*RUN, *TERMS, *changed, "--max_steps", 5, "--output-path", "parts", "--resume")


def test_moving_average_is_what_is_validated(work, command):  # noqa: F811
    """The average after each step by hand, from the checkpoints; the best weights and the scores are the average's."""
    train(*command, "--ema", 0.5, "--max_steps", 4, "--save_every", 1, "--keep_checkpoints", 0, "--val_every", 0)
    weights = [load_file(*Path("output").glob(f"tc_text_e_*_iter_{step}.safetensors")) for step in range(1, 5)]
    average = load_file("output/tc_text_ema.safetensors")
    for name, value in average.items():
        expected = weights[0][name].double()
        for number, later in enumerate(weights[1:], 1):
            decay = min(0.5, (1 + number) / (10 + number))
            expected = decay * expected + (1 - decay) * later[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert same_weights("output/tc_text_ema.safetensors", "output/tc_text_best.safetensors")
    # A run of no steps that starts from the average has its scores.
    train(*command, "--text_path", "output/tc_text_ema.safetensors", "--max_steps", 1, "--output-path", "from_average")
    assert float(table("from_average")[0]["val_total"]) == pytest.approx(
        float(table("output")[4]["val_total"]), rel=1e-5
    )


def test_a_term_does_not_hide_that_no_reward_has_a_gradient(work, command):  # noqa: F811
    own = ["--reward", "own.py:constant=1", "--reward", "own.py:redness=0"]
    for term in ("--anchor", "--smooth"):
        with pytest.raises(UserError, match="no reward is differentiable"):
            train(*command, *own, term, "0.1", "--output-path", term.strip("-"))


def test_disk_for_a_moving_average_is_counted(tmp_path, monkeypatch):
    """Three checkpoints, the best, one more while it is written; with the average two more files and larger states."""
    network = torch.nn.Linear(999, 1000)
    trained, size = [Trained("text_encoder", network, 1e-6)], 4 * 1000 * 1000
    accelerator = SimpleNamespace(is_main_process=True)
    for averages, run, one in ((False, 5 * size + 2 * 2 * size, 3 * size), (True, 7 * size + 2 * 3 * size, 5 * size)):
        for spare in (0, -1):
            monkeypatch.setattr("textcraftor.checkpoints.free_bytes", lambda _, free=one + MARGIN + spare: free)
            assert has_room(accelerator, tmp_path, trained, averages) == (spare == 0)
            monkeypatch.setattr("textcraftor.checkpoints.free_bytes", lambda _, free=run + MARGIN + spare: free)
            if spare:
                with pytest.raises(UserError, match="GB free"):
                    check_disk(tmp_path, trained, 3, averages)
            else:
                check_disk(tmp_path, trained, 3, averages)


def test_options_that_make_no_sense_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parse_options(["--model", "miniature"]).grad_steps == "5"  # as recorded when it is spelled out
    for options, message in (
        (["--reward", "own.py:anchor=1"], "two columns named anchor"),
        (["--ema", "1"], "--ema 1.0: must be below 1"),
        (["--anchor", "0.1", "--lr_text", "0", "--lr_unet", "1e-6"], "the text encoder is frozen"),
        (["--smooth", "-1"], "--smooth -1.0: must be at least 0"),
        (["--clip_constraint", "nan"], "--clip_constraint nan"),
        (["--shared_text", "inf"], "--shared_text inf"),
    ):
        with pytest.raises(UserError, match=message):
            parse_options(["--model", "miniature", *options])
