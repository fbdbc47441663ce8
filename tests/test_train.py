"""The training script from its command line to its files, on tiny models."""

import copy
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook

import rewards.training
import textcraftor.options
import train_textcraftor
from rewards import load_reward
from textcraftor import precision, processes, run_folder, training_options
from textcraftor.errors import UserError, run_program
from textcraftor.models import load_model, make_networks
from textcraftor.run_folder import only_run, read_rows
from textcraftor.sampling import make_images, make_scheduler
from textcraftor.stream import training_batch
from textcraftor.training_options import parse_options

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
STEPS = ["--step", "3", "--grad_steps", "2"]
NO_REWARDS = ["--clip", "0", "--aesthetic", "0", "--pickscore", "0", "--hpsv2", "0"]

# A user's own rewards. CALLS counts the calls of one process; an environment variable says when to misbehave.
OWN_REWARDS = """
import math, os, signal
CALLS = 0

def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 2].mean(dim=(1, 2))

def blueness(images, prompts):
    return -redness(images, prompts)

def moody(images, prompts):
    global CALLS
    CALLS += 1
    scores = redness(images, prompts)
    if CALLS in map(int, os.environ.get("NAN_AT", "").split()):
        scores = scores * math.nan
    if str(CALLS) == os.environ.get("SIGNAL_AT"):
        for _ in range(2 if os.environ["SIGNAL"] == "15" else 1):  # SIGTERM: from a job's manager and its launcher
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return scores

def mortal(images, prompts):
    global CALLS
    CALLS += 1
    if os.environ.get("RANK") == "1" and CALLS == 5 + 1 and "DIES" in os.environ:
        if os.environ["DIES"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("of an unknown cause")
    return redness(images, prompts)

def constant(images, prompts):
    return images.detach().mean(dim=(1, 2, 3))
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with ten prompts and the user's rewards, made the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN_REWARDS)
    prompts = [f"{colour} {thing}" for colour in ("a red", "a blue") for thing in ("fox", "cat", "car", "hat", "sea")]
    (tmp_path / "prompts.csv").write_text("prompt\n" + "\n".join(prompts) + "\n")
    return tmp_path


@pytest.fixture
def command(stable_diffusion):
    """Arguments of a run of seconds: one reward of our own, two images a step."""
    return [
        "--model", str(stable_diffusion), "--prompts", "prompts.csv", *STEPS, *NO_REWARDS,
        "--reward", "own.py:redness=1", "--lr_text", "1e-3", "--batch-size", "2", "--val_count", "2",
        "--max_steps", "4", "--val_every", "2", "--sample_every", "2", "--save_every", "0", "--mixed_precision", "no",
    ]  # fmt: skip


def train(*arguments):
    train_textcraftor.main([str(argument) for argument in arguments])


def script(*arguments, **environment):
    """The script in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train_textcraftor.py"), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def table(folder):
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_weights(first, second):
    first, second = load_file(first), load_file(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_ends_before_its_first_update_says_why_and_starts_again(work, command, capsys):
    (work / "large.py").write_text(
        "import torch\n\ndef large(images, prompts):\n    if images.requires_grad:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\\nmore')\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    failing = [*command, "--reward", "large.py:large=1"]
    with pytest.raises(SystemExit) as stopped:
        run_program(lambda: train(*failing))
    assert "\n" not in str(stopped.value) and "smaller --batch-size" in str(stopped.value)
    train(*command, "--batch-size", 1)
    assert [row["step"] for row in table("output")] == ["0", "1", "2", "3", "4"]
    with pytest.raises(UserError, match="holds a run"):
        train(*command)


def test_ctrl_c_anywhere_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    assert stopped.value.code == 130 and capsys.readouterr().err == "stopped\n"


# A whole run


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real prompts in shared/data")
def test_three_steps_on_real_prompts_with_all_four_rewards(stable_diffusion, rewards_root, tmp_path):
    done = script(
        "--model", stable_diffusion, "--weights", rewards_root, "--prompts", DATA / "open-prompts-1k.csv", "--step", 5,
        "--output_path", tmp_path, "--max-steps", 3, "--batch-size", 2, "--val-count", 3, "--val_every", 2, 
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "981 prompts to train on, 3 held out." in done.stdout
    assert "rows left out: 9 empty, 5 repeated" in done.stdout
    rows = table(tmp_path)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    for row in rows[1:]:
        total = (
            0.5 * 100 * float(row["clip"]) + 3 * float(row["aesthetic"]) + float(row["pickscore"])
            + 100 * float(row["hpsv2"])
        )  # fmt: skip
        assert math.isclose(float(row["total"]), total, rel_tol=1e-4)
        assert float(row["grad_norm"]) > 0 and float(row["images_per_second"]) > 0
    assert [bool(row["val_pickscore"]) for row in rows] == [True, False, True, True]
    for name in ("tc_text", "tc_text_best", "tc_text_e_0_iter_3"):
        assert "text_model.final_layer_norm.weight" in load_file(tmp_path / f"{name}.safetensors")
        assert name == "tc_text_e_0_iter_3" or str(tmp_path / "tc_text.safetensors") in done.stdout
    for name in ("before_after.png", "curves.png", "samples/step_000000.png", "samples/step_000003.png"):
        assert min(Image.open(tmp_path / name).size) > 200
    assert "before" in done.stdout and "Traceback" not in done.stderr


def test_a_run_learns_what_it_is_rewarded_for(work, command, capsys):
    more = ["--monitor", "own.py:blueness", "--report_to", "tensorboard"]
    train(*command, *more, "--lr_text", "3e-3", "--max_steps", 12, "--seed", 1)
    rows = table("output")
    assert float(rows[-1]["val_redness"]) > float(rows[0]["val_redness"])
    assert float(rows[-1]["val_blueness"]) == pytest.approx(-float(rows[-1]["val_redness"]), rel=1e-5)
    assert "blueness" not in rows[-1]
    assert "held out" in capsys.readouterr().out
    events = min(Path("output").glob("**/events.out.tfevents*"), key=lambda path: len(path.parts))  # others: options
    accumulator = EventAccumulator(str(events)).Reload()
    logged = {event.step: event.value for event in accumulator.Scalars("val_total")}
    assert logged == pytest.approx({int(row["step"]): float(row["val_total"]) for row in rows if row["val_total"]})
    assert [event.step for event in accumulator.Scalars("total")] == list(range(1, 13))
    best = max(rows, key=lambda row: float(row["val_total"] or "-inf"))
    assert best is rows[-1] and same_weights("output/tc_text_best.safetensors", "output/tc_text.safetensors")


@pytest.mark.parametrize("trains", ["tc_text", "tc_unet"])
def test_one_step_is_adamw_on_the_methods_gradient(work, command, stable_diffusion, trains):
    """All the script's wiring at once: its prompts, noise, encoders, sampler, reward, sign and optimizer."""
    rate = 1e-4
    rates = ["--lr_text", rate if trains == "tc_text" else 0, "--lr_unet", rate if trains == "tc_unet" else 0]
    train(*command, *rates, "--max_steps", 1, "--seed", 5)

    model = load_model(str(stable_diffusion))
    tuned = copy.deepcopy(model.text_encoder)
    network = {"tc_text": tuned, "tc_unet": model.unet}[trains].requires_grad_(True)
    rows = (work / "prompts.csv").read_text().splitlines()[3:]  # after the header and two held-out prompts
    prompts, noise = training_batch(rows, 5, (4, 8, 8), [0, 1])
    networks = make_networks(model, tuned)
    images = make_images(
        networks, make_scheduler(model.scheduler_config, 3), prompts, noise, tuned_steps=2, guidance=7.5
    )
    reward = images[:, 0].mean(dim=(1, 2)) - images[:, 2].mean(dim=(1, 2))
    (-reward.mean()).backward()

    assert float(table("output")[1]["total"]) == pytest.approx(reward.mean().item(), rel=1e-5)
    state = load_file(f"output/{trains}.safetensors")
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    checked = 0
    for name, weight in network.named_parameters():
        name = name.removeprefix("text_model.")  # which transformers has dropped
        # Adam's first step is rate * gradient / (|gradient| + eps), after a decay by rate * 0.01.
        certain = weight.grad.abs() > 1e-5
        expected = weight * (1 - rate * 0.01) - rate * weight.grad.sign()
        torch.testing.assert_close(state[name][certain], expected[certain], rtol=0, atol=rate / 100)
        checked += certain.sum().item()
    assert checked > 1000


def test_nothing_frozen_ever_has_a_gradient(work, command, rewards_root, monkeypatch):
    seen = []
    monkeypatch.setattr(train_textcraftor, "load_model", remember(load_model, seen))
    monkeypatch.setattr(rewards.training, "load_reward", remember(load_reward, seen))
    monkeypatch.setattr(torch.optim.AdamW, "step", remember(torch.optim.AdamW.step, seen, before=lambda: check(seen)))
    checked = []

    def check(seen):
        networks = list(filter(is_module, seen))
        assert len(networks) == 4  # original encoder, UNet, VAE, reward
        for network in networks:
            assert all(weight.grad is None and not weight.requires_grad for weight in network.parameters())
        checked.append(True)

    train(*command, "--weights", rewards_root, "--hpsv2", 1, "--max_steps", 2)
    assert len(checked) == 2


def is_module(item):
    return isinstance(item, torch.nn.Module)


def remember(function, seen, before=lambda: None):
    def wrapped(*arguments, **options):
        before()
        result = function(*arguments, **options)
        seen.extend(result if isinstance(result, tuple) else [result])
        return result

    return wrapped


def test_a_reward_of_weight_0_is_never_loaded(work, command, rewards_root, monkeypatch):
    names = []
    load = load_reward
    monkeypatch.setattr(rewards.training, "load_reward", lambda name, *more: names.append(name) or load(name, *more))
    train(*command, "--weights", rewards_root, "--aesthetic", 1, "--monitor", "clip,aesthetic", "--max_steps", 1)
    assert names == ["aesthetic", "clip"]
    assert "val_clip" in table("output")[0] and "clip" not in table("output")[0]


@pytest.mark.parametrize(
    "options, largest_update",
    [
        ([], 1e-3),  # Adam's first step is the learning rate, whatever the gradient
        (["--lr_warmup_steps", 4], 1e-3 / 4),
        (["--max_grad_norm", 1e-12], 0),  # a gradient far below Adam's epsilon
        (["--lr_scheduler", "linear"], 1e-3 / 2),  # step 1 of 1: half-way from step 0 to step 2, where it would be 0
    ],
)
def test_warm_up_and_gradient_clipping(work, command, stable_diffusion, options, largest_update):
    train(*command, "--max_steps", 1, *options)
    before = load_file(stable_diffusion / "text_encoder" / "model.safetensors")
    after = load_file("output/tc_text.safetensors")
    largest = max((after[name] - before[name]).abs().max().item() for name in after)
    assert largest == pytest.approx(largest_update, rel=0.1, abs=5e-5)


@pytest.mark.parametrize("trains", ["tc_text", "tc_unet"])
def test_low_precision_is_near_full_precision(work, command, rewards_root, monkeypatch, trains):
    rates = {"tc_text": ["--lr_text", "1e-4"], "tc_unet": ["--lr_text", "0", "--lr_unet", "1e-4"]}[trains]
    run = [*command, "--weights", rewards_root, "--hpsv2", 1, "--max_steps", 2, *rates]
    train(*run, "--output-path", "fp32")
    AcceleratorState._reset_state(True)
    seen = []
    monkeypatch.setattr(train_textcraftor, "load_model", remember(load_model, seen))
    monkeypatch.setattr(rewards.training, "load_reward", remember(load_reward, seen))
    train(*run, "--output-path", "bf16", "--mixed_precision", "bf16")
    kept_in = {type(item).__name__: {weight.dtype for weight in item.parameters()} for item in seen if is_module(item)}
    assert kept_in.pop("UNet2DConditionModel") == {torch.float32 if trains == "tc_unet" else torch.bfloat16}
    assert kept_in == dict.fromkeys(["CLIPTextModel", "AutoencoderKL", "OpenClipReward"], {torch.bfloat16})
    for full, low in zip(table("fp32")[1:], table("bf16")[1:], strict=True):
        assert float(low["redness"]) == pytest.approx(float(full["redness"]), abs=0.01)
        assert float(low["hpsv2"]) == pytest.approx(float(full["hpsv2"]), abs=0.03)
        assert float(low["grad_norm"]) == pytest.approx(float(full["grad_norm"]), rel=0.3)
        assert all(low[name] != full[name] for name in ("redness", "hpsv2", "grad_norm"))
    assert {value.dtype for value in load_file(f"bf16/{trains}.safetensors").values()} == {torch.float32}


def test_the_learning_rate_falls_along_a_cosine(work, command):
    rates = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    train(*command, "--max_steps", 6, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--val_every", 0)
    hook.remove()
    expected = [1e-3 * min(step / 2, (1 + math.cos(math.pi * (step - 2) / 5)) / 2) for step in range(1, 7)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("trains", ["tc_text", "tc_unet"])
def test_batches_can_be_accumulated(work, command, stable_diffusion, monkeypatch, trains):
    """Two micro-batches of two are one batch of four, whatever accelerate's own variable says."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    rates = {"tc_text": ["--lr_text", "1e-4"], "tc_unet": ["--lr_text", "0", "--lr_unet", "1e-4"]}[trains]
    run = [*command, *rates, "--max_steps", 3, "--mixed_precision", "no"]
    train(*run, "--batch-size", 4, "--output-path", "one")
    train(*run, "--batch-size", 2, "--gradient_accumulation_steps", 2, "--output-path", "two")
    close_weights(f"one/{trains}.safetensors", f"two/{trains}.safetensors", original(stable_diffusion, trains))
    for first, second in zip(table("one"), table("two"), strict=True):
        for name in ("total", "redness", "cut", "epoch", "val_total", "grad_norm"):
            if first[name]:
                assert float(second[name]) == pytest.approx(float(first[name]), rel=1e-4)


@pytest.mark.parametrize("trains", ["tc_text", "tc_unet"])
def test_what_saves_memory_or_time_changes_no_result(work, command, stable_diffusion, monkeypatch, trains):
    rates = {"tc_text": ["--lr_text", "1e-4"], "tc_unet": ["--lr_text", "0", "--lr_unet", "1e-4"]}[trains]
    run = [*command, *rates, "--max_steps", 2, "--val_every", 0]
    decoded, seen, decode_images = [], [], AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda vae, z: decoded.append(len(z)) or decode_images(vae, z))
    monkeypatch.setattr(train_textcraftor, "load_model", remember(load_model, seen))
    train(*run, "--output-path", "plain")
    assert decoded == [2] * 4  # a look, two steps, a look
    decoded.clear()
    train(*run, "--output-path", "vae", "--vae_checkpointing")
    assert decoded == [2, *[1] * (2 * 2 * 2), 2]  # in each step every image again for its gradient
    train(*run, "--output-path", "compiled", "--compile")
    torch._dynamo.reset()
    unets = [item for item in seen if isinstance(item, UNet2DConditionModel)]
    blocks = [[part for part in unet.modules() if isinstance(part, BasicTransformerBlock)] for unet in unets]
    compiled = [{part._compiled_call_impl is not None for part in parts} for parts in blocks]
    assert compiled == [{False}, {False}, {True}]

    for other in ("vae", "compiled"):
        for name in ("total", "grad_norm"):
            assert float(table(other)[2][name]) == pytest.approx(float(table("plain")[2][name]), rel=1e-4)
        before = original(stable_diffusion, trains)
        close_weights(f"plain/{trains}.safetensors", f"{other}/{trains}.safetensors", before)


def test_fp16s_loss_scale_is_found(work, command, monkeypatch):
    """Steps whose scaled gradient overflows are skipped until the scale fits, and then it trains.

    Accelerate offers fp16 on GPUs only; a processor's own scaler shows the same loop.
    """
    scalers = []

    class OnProcessor(accelerate.Accelerator):
        mixed_precision = "fp16"

        def __init__(self, mixed_precision, kwargs_handlers, **options):
            super().__init__(**options)
            assert mixed_precision == "fp16"
            (options,) = (handler for handler in kwargs_handlers if hasattr(handler, "init_scale"))
            assert options.init_scale == 2.0 ** (train_textcraftor.MOST_SKIPS - 1)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
            self.native_amp = True
            scalers.append(self.scaler)

    monkeypatch.setattr(processes, "Accelerator", OnProcessor)
    monkeypatch.setattr(precision, "HAS_FP16", {"cpu"})
    train(*command, "--mixed_precision", "fp16", "--max_steps", 8, "--lr_text", "1e-4")
    skipped = [row["skipped"] == "1" for row in table("output")[1:]]
    count = sum(skipped)
    assert 1 <= count <= 5 and skipped == [True] * count + [False] * (8 - count)
    assert scalers[0].get_scale() == 2.0 ** (30 - count + (8 - count) // 3)
    assert float(table("output")[-1]["val_redness"]) > float(table("output")[0]["val_redness"])
    assert {value.dtype for value in load_file("output/tc_text.safetensors").values()} == {torch.float32}


def test_second_stage_trains_the_unet_under_the_tuned_text_encoder(work, command, stable_diffusion):
    train(*command, "--max_steps", 2, "--output-path", "text", "--val_every", 0)
    second = [*command, "--text_path", "text/tc_text.safetensors", "--lr_text", 0, "--lr_unet", "1e-4"]
    train(*second, "--output-path", "unet", "--max_steps", 2, "--val_every", 0, "--grad_steps", 3)
    assert not list(Path("unet").glob("tc_text*"))
    assert {"tc_unet.safetensors", "tc_unet_best.safetensors", "tc_unet_e_0_iter_2.safetensors"} <= {
        path.name for path in Path("unet").iterdir()
    }
    # It starts where the first stage ended: all steps of 3 are tuned at test time.
    assert table("unet")[0]["val_total"] == pytest.approx(table("text")[-1]["val_total"])


def test_two_runs_never_write_to_one_folder(work, command):
    """Neither a new one while the first has made no update, nor one that resumes; when it ends, either may."""
    with only_run("output"), pytest.raises(UserError, match="output: another run is writing here"):
        train(*command)
    assert not Path("output").exists()
    train(*command, "--max_steps", 1)
    with only_run("output"):
        refused = script(*command, "--max_steps", 2, "--resume")
    assert refused.stderr.splitlines()[-1].startswith("error: output: another run is writing here")
    train(*command, "--max_steps", 2, "--resume")
    assert read_rows("output/metrics.csv")[-1]["step"] == 2


def test_validation_samples_as_at_test_time(work, command, monkeypatch):
    """The last 15 of 25 steps tuned, whatever the training's --grad_steps."""
    calls = []

    def note(networks, scheduler, *prompts_and_noise, tuned_steps, **options):
        calls.append((len(scheduler.timesteps), tuned_steps))
        return make_images(networks, scheduler, *prompts_and_noise, tuned_steps=tuned_steps, **options)

    monkeypatch.setattr(train_textcraftor, "make_images", note)
    train(*command, "--step", 25, "--grad_steps", 5, "--max_steps", 1)
    assert calls == [(25, 15), (25, 5), (25, 15)]


def test_miniatures_defaults_yield_to_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "miniature"
    monkeypatch.setattr(training_options, "REPOSITORY", tmp_path)
    monkeypatch.setattr(training_options, "MINIATURE", folder)
    monkeypatch.setattr(training_options, "MINIATURE_MODEL", str(folder / "stable-diffusion"))
    monkeypatch.setattr(textcraftor.options, "MINIATURE", folder)
    folder.mkdir()
    defaults = {"lr_text": 0.5, "grad_steps": 7, "prompts": "miniature/prompts_train.txt", "monitor": ["a.py:f"]}
    defaults["tune_unconditional"] = "off"
    (tmp_path / "miniature" / "defaults.json").write_text(json.dumps(defaults))
    args = parse_options(["--model", "miniature", "--grad-steps", "3", "--output_path", "x"])
    assert args.model == str(tmp_path / "miniature" / "stable-diffusion")
    assert args.weights == str(tmp_path / "miniature")
    assert (args.lr_text, args.grad_steps, args.output_path) == (0.5, "3", "x")
    assert args.prompts == str(tmp_path / "miniature" / "prompts_train.txt")
    assert args.monitor == [str(tmp_path / "a.py:f")]
    assert parse_options(["--model", "miniature", "--monitor", "clip"]).monitor == ["clip"]
    assert args.tune_unconditional == "off"


# Wrong input


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ([""], "unrecognized arguments"),
        (["--text_path", "a.pth", "--lora_rank", "4"], "can only start from the original"),
        (["--bank", "b", "--grad_steps", "3"], "all 3 steps are tuned"),
        (["--grad_steps", "4"], "grad_steps <= step"),
        (["--grad_steps", "0"], "--grad_steps 0"),
        (["--batch-size", "0"], "--batch_size 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", str(2**63)], "must be below 2**63"),
        (["--guidance", "0.5"], "--guidance 0.5: must be at least 1"),
        (["--prompt_weighting", "0"], "images would not depend on the tuned text encoder"),
        (["--lr_text", "nan"], "--lr_text nan"),
        (["--lr_text", "0"], "nothing would be trained"),
        (["--lr_text", "quick"], "invalid float value: 'quick'"),
        (["--lr_txt", "1"], "unrecognized arguments: --lr_txt"),
        (["--reward", "own.py:redness=0"], "all reward weights are 0"),
        (["--reward", "own.py:redness"], "path/to/file.py:function=weight"),
        (["--reward", "other.py:brightness=1"], "other.py"),
        (["--reward", "own.py:greenness=1"], "greenness"),
        (["--reward", "redness=1"], "path/to/file.py:function=weight"),
        (["--reward", "own.py:redness=nan"], "redness is nan"),
        (["--reward", "own.py:cut=1"], "named cut"),
        (["--guidance", "inf"], "--guidance inf"),
        (["--mixed_precision", "fp16"], "fp16: needs a GPU"),
        (["--monitor", "beauty"], "--monitor beauty"),
        (["--monitor", "other.py:redness"], "named redness"),
        (["--report_to", "paper"], "--report_to"),
        (["--model", "./nothing"], "download_models.py --only sd"),
        (["--model", "."], "tokenizer"),
        (["--prompts", "nothing.csv"], "nothing.csv"),
        (["--prompts", "empty.csv"], "no usable prompts"),
        (["--prompts", "one.txt"], "both need at least one"),
        (["--val_prompts", "nothing.txt"], "nothing.txt"),
        (["--text_path", "nothing.pth"], "nothing.pth"),
        (["--text_path", "other.pth"], "other.pth"),
        (["--hpsv2", "1"], "HPS_v2_compressed.pt"),
        (["--resume"], "no run in output"),
    ],
)
def test_wrong_input_is_named_in_one_line(work, command, arguments, problem):
    (work / "empty.csv").write_text("prompt,raw_data\n ,x\n")
    (work / "one.txt").write_text("a single prompt\n")
    torch.save({"weight": torch.zeros(2)}, work / "other.pth")
    with pytest.raises(UserError) as error:
        train(*command, "--weights", "nowhere", *arguments)
    assert problem in str(error.value)
    assert "\n" not in str(error.value).replace("\n  hpsv2", "")  # lists of missing files have a line each
    assert not (work / "output").exists()


def test_all_that_is_missing_is_said_at_once(work):
    with pytest.raises(UserError) as error:
        train("--weights", "nowhere")
    for name in ("stable-diffusion-v1-5", "openprompts.csv", "ViT-g-14", "linearMSE.pth", "pickmodel", "HPS_v2"):
        assert name in str(error.value)


def test_bad_rows_are_said_and_skipped(work, command, capsys):
    (work / "bad.csv").write_bytes(b"prompt,raw\n" + b"a caf\xe9,1\n" * 12 + b'a fox,1\na cat,1\na dog,1\n"a d')
    (work / "held.txt").write_bytes(b"a fox\n\xff\na car\n")
    train(*command, "--prompts", "bad.csv", "--val_prompts", "held.txt", "--max_steps", 1)
    said = capsys.readouterr().out
    assert "2 prompts to train on, 2 held out" in said
    assert "13 bad, the first bad one at line 2" in said
    assert "held.txt: rows left out: 1 bad, the first bad one at line 2" in said
    numbers = [*((f"bad.csv: line {line}") for line in [*range(2, 14), 17]), "held.txt: line 2"]
    assert Path("output/bad_rows.txt").read_text().splitlines() == numbers


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        parse_options(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for name, *_ in training_options.OPTIONS:
        assert name in said, name
    assert "none = 12 % less compute" in " ".join(said.split())


def test_the_script_exits_with_the_line_alone(work):
    done = script("--grad_steps", 30)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith("error: --grad_steps 30") and done.stderr.count("\n") == 1


def test_a_run_is_never_overwritten(work, command):
    train(*command, "--max_steps", 1)
    before = (work / "output" / "tc_text.safetensors").read_bytes()
    with pytest.raises(UserError, match="output holds a run"):
        train(*command)
    with pytest.raises(UserError, match="has seed = 0, not 3"):
        train(*command, "--resume", "--seed", 3)
    train(*command, "--lr_scheduler", "cosine", "--max_steps", 1, "--output-path", "cosine")
    with pytest.raises(UserError, match="has last step = 1, not 2"):  # its rates would have been others
        train(*command, "--lr_scheduler", "cosine", "--max_steps", 2, "--output-path", "cosine", "--resume")
    own = Path("own.py").read_text()
    Path("own.py").write_text(own.replace("def redness", "def redness_of_old") + "redness = constant\n")
    with pytest.raises(UserError, match="had different redness"):
        train(*command, "--resume")
    Path("own.py").write_text(own)
    with open("prompts.csv", "a") as file:
        file.write("another prompt\n")
    with pytest.raises(UserError, match="had different training prompts"):
        train(*command, "--resume")
    assert (work / "output" / "tc_text.safetensors").read_bytes() == before


def test_a_reward_without_gradient_is_refused(work, command):
    with pytest.raises(UserError, match="differentiable"):
        train(*command, "--reward", "own.py:constant=1", "--reward", "own.py:redness=0")


# Losses that are not finite


def test_a_loss_that_is_not_finite_is_skipped(work, command, monkeypatch):
    own = ["--reward", "own.py:redness=0", "--reward", "own.py:moody=1", "--val_every", 0, "--sample_every", 0]
    monkeypatch.setenv("NAN_AT", "3")  # the call after the look at held-out prompts is that of step 1
    train(*command, *own, "--max_steps", 2, "--save_every", 1)
    rows = table("output")
    assert [row["skipped"] for row in rows[1:]] == ["0", "1"] and rows[2]["total"] == "nan"
    # The held-out scores at the end are those of step 1's weights, and finite.
    assert same_weights("output/tc_text_e_0_iter_1.safetensors", "output/tc_text_e_0_iter_2.safetensors")
    assert math.isfinite(float(rows[2]["val_total"]))


def test_ten_such_losses_in_a_row_end_the_run(work, command, monkeypatch):
    own = ["--reward", "own.py:redness=0", "--reward", "own.py:moody=1", "--val_every", 0, "--sample_every", 0]
    monkeypatch.setenv("NAN_AT", " ".join(str(call) for call in [2, *range(4, 20)]))
    with pytest.raises(UserError, match="10 updates in a row"):
        train(*command, *own, "--max_steps", 20)
    rows = table("output")
    assert len(rows) == 1 + 2 + 10 and [row["skipped"] for row in rows[1:4]] == ["1", "0", "1"]
    weights = load_file("output/tc_text.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert same_weights("output/tc_text.safetensors", "output/tc_text_e_2_iter_12.safetensors")


# Interruptions and processes


@pytest.fixture
def six_steps(command):
    """A run whose reward can end its process in the middle of a step, with checkpoints at 2, 4 and 6."""
    own = ["--reward", "own.py:redness=0", "--reward", "own.py:moody=1"]
    return [*command, *own, "--max_steps", 6, "--save_every", 2, "--val_every", 3]


def test_a_killed_run_ends_as_one_never_stopped(work, six_steps):
    train(*six_steps, "--output-path", "whole")
    # Calls of the reward: 1 before training, 2–4 in steps 1–3, 5 and 6 in looks after 2 and 3, 7 in 4, 8 …
    killed = script(*six_steps, "--output-path", "killed", SIGNAL_AT="9", SIGNAL=str(int(signal.SIGKILL)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in Path("killed/resume").glob("step_*")] == ["step_000004"]
    # What a kill in the middle of writing leaves.
    (work / "killed" / "resume" / "unfinished").mkdir()
    (work / "killed" / "resume" / "unfinished" / "model.safetensors").write_text("half")
    with open("killed/metrics.csv", "a") as file:
        file.write("5,0.9,0.1")
    train(*six_steps, "--output-path", "killed", "--resume")

    for name in ("tc_text", "tc_text_best", "tc_text_e_1_iter_6"):
        assert same_weights(f"whole/{name}.safetensors", f"killed/{name}.safetensors")
    whole, resumed = table("whole"), table("killed")
    assert len(whole) == len(resumed) == 7
    for first, second in zip(whole, resumed, strict=True):
        for timing in ("seconds", "images_per_second"):
            first.pop(timing), second.pop(timing)
        assert first == second
    assert Image.open("whole/before_after.png").tobytes() == Image.open("killed/before_after.png").tobytes()


@pytest.mark.parametrize("number, trains", [(signal.SIGTERM, "tc_text"), (signal.SIGINT, "tc_unet")])
def test_a_stopped_run_saves_and_goes_on(work, six_steps, monkeypatch, capsys, number, trains):
    six_steps += ["--lr_text", 0, "--lr_unet", "1e-4"] if trains == "tc_unet" else []
    monkeypatch.setenv("SIGNAL", str(int(number)))
    monkeypatch.setenv("SIGNAL_AT", "2")
    train(*six_steps, "--output-path", "stopped")
    assert "stopped after step 1" in capsys.readouterr().out and len(table("stopped")) == 2
    monkeypatch.delenv("SIGNAL_AT")
    # Neither the interruption nor what is kept for the backward pass changes a bit.
    train(*six_steps, "--output-path", "stopped", "--resume", "--gradient_checkpointing", "none")
    train(*six_steps, "--output-path", "whole")
    assert same_weights(f"whole/{trains}.safetensors", f"stopped/{trains}.safetensors")


def test_a_finished_run_can_be_resumed_and_made_longer(work, six_steps, monkeypatch):
    train(*six_steps)
    train(*six_steps, "--resume")
    train(*six_steps, "--resume", "--max_steps", 4)  # as a run that has passed its end
    assert len(table("output")) == 7
    train(*six_steps, "--resume", "--max_steps", 8)
    assert [row["step"] for row in table("output")] == list("012345678")


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def two_processes(program, *arguments, **environment):
    return subprocess.run(
        [*LAUNCH, str(program), *map(str, arguments)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.fixture
def five_steps(command):
    return [*command, "--max_steps", 5, "--lr_text", "1e-4", "--val_every", 0, "--sample_every", 0, "--val_count", "3"]


def close_weights(first, second, before, tolerance=0.02):
    """Two trainings took the same way: the weights differ by a small share of the length of the steps taken.

    Compared over all weights together, since Adam makes steps of the learning rate's size from rounding wherever a true
    gradient is 0 (key biases, as softmax ignores what is added to all keys).
    """
    first, second, before = (flat(path) for path in (first, second, before))
    assert (second - first).norm() <= tolerance * (first - before).norm()


def original(folder, trains):
    return folder / {"tc_text": "text_encoder/model", "tc_unet": "unet/diffusion_pytorch_model"}[trains]


def flat(path):
    """All weights of a file, of either naming, in one vector; key biases left out."""
    state = load_file(Path(path).with_suffix(".safetensors"))
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    left_out = ("k_proj.bias", "position_ids")
    return torch.cat([state[name].double().flatten() for name in sorted(state) if not name.endswith(left_out)])


def same_metrics(first, second):
    for one, other in zip(table(first), table(second), strict=True):
        for name in ("total", "val_total", "grad_norm"):
            if one[name]:
                assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-3)


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("trains, batches", [("tc_text", 1), ("tc_unet", 2)])
def test_two_processes_train_as_one_with_the_double_batch(work, five_steps, stable_diffusion, trains, batches):
    """Same prompts, noise and mean gradient, also of a UNet that runs twice a backward, and with two batches a step."""
    five_steps += ["--lr_text", 0, "--lr_unet", "1e-4"] if trains == "tc_unet" else []
    sizes = ["--batch-size", 2 // batches, "--gradient_accumulation_steps", batches]
    done = two_processes(ROOT / "train_textcraftor.py", *five_steps, "--output-path", "two", *sizes)
    assert done.returncode == 0, done.stderr
    assert "5 steps of 4 images" in done.stdout
    train(*five_steps, "--output-path", "one", "--batch-size", "4")
    close_weights(f"one/{trains}.safetensors", f"two/{trains}.safetensors", original(stable_diffusion, trains))
    same_metrics("one", "two")


# recipes/README's command.
FSDP_LAUNCH = """--num_machines 1 --num_processes 2 --mixed_precision no --dynamo_backend no
    --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP
    --fsdp_transformer_layer_cls_to_wrap BasicTransformerBlock,ResnetBlock2D train_textcraftor.py""".split()

# FSDP, which accelerate knows on GPUs only, made to run on CPUs; nothing else is changed.
FSDP_ON_CPU = """
import sys
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

start = AcceleratorState.__init__

def start_on_cpu(self, *arguments, fsdp_plugin=None, **options):
    start(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

AcceleratorState.__init__ = start_on_cpu
sys.path.insert(0, sys.argv.pop(1))
import rewards.training
import textcraftor.options
import train_textcraftor
train_textcraftor.run_program(train_textcraftor.main)
"""


@pytest.mark.xdist_group("processes")
def test_a_unet_split_among_processes_trains_as_a_whole_one(work, five_steps, stable_diffusion):
    (work / "fsdp.py").write_text(FSDP_ON_CPU)
    # Cut so short that Adam's epsilon counts: else its steps were the same with any multiple of the gradient.
    unet = [*five_steps, "--lr_text", 0, "--lr_unet", "1e-4", "--max_grad_norm", 1e-6, "--save_every", 3]
    launch = launch_command_parser().parse_args(FSDP_LAUNCH)
    split = {name: value for name, value in prepare_multi_gpu_env(launch).items() if "FSDP" in name}
    assert split["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"  # the launcher's default
    for more in ["--max_steps", 3], ["--resume"]:
        done = two_processes("fsdp.py", ROOT, *unet, "--output-path", "split", *more, **split)
        assert done.returncode == 0, done.stderr
    train(*unet, "--output-path", "whole", "--batch-size", "4")
    close_weights("whole/tc_unet.safetensors", "split/tc_unet.safetensors", original(stable_diffusion, "tc_unet"))
    same_metrics("whole", "split")
    # Version 1 looks for a GPU to synchronise before our own line.
    split |= {"FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    one = two_processes("fsdp.py", ROOT, *unet, "--output-path", "old", **split)
    assert one.returncode != 0 and one.stderr.count("error: FSDP: not supported") == 1


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_process_that_dies_ends_the_other_and_the_run_goes_on(work, five_steps, how):
    run = [*five_steps, "--reward", "own.py:redness=0", "--reward", "own.py:mortal=1", "--save_every", 2]
    began = time.monotonic()
    died = two_processes(ROOT / "train_textcraftor.py", *run, "--output-path", "died", DIES=how)
    assert died.returncode != 0 and time.monotonic() - began < 60
    # Beside the launcher's own report, what happened in the process that died, and nothing of the other.
    assert died.stderr.count("RuntimeError: of an unknown cause") == (how == "raises")
    assert "gloo" not in died.stderr and died.stderr.count("Traceback") == 1 + (how == "raises")
    assert ("exitcode  : -9" in died.stderr) == (how == "killed")
    assert [path.name for path in Path("died/resume").glob("step_*")] == ["step_000004"]
    if how == "killed":
        for arguments in ["--output-path", "died", "--resume"], ["--output-path", "whole"]:
            done = two_processes(ROOT / "train_textcraftor.py", *run, *arguments)
            assert done.returncode == 0, done.stderr
        assert same_weights("whole/tc_text.safetensors", "died/tc_text.safetensors")


@pytest.mark.xdist_group("processes")
def test_two_processes_stop_on_sigterm_within_seconds_and_go_on(work, five_steps):
    """As a scheduler stops a launched run: the signal goes to the launcher, which passes it on."""
    run = [*five_steps, "--max_steps", 400, "--batch-size", 1, "--keep_checkpoints", 2, "--output-path", "stopped"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, str(ROOT / "train_textcraftor.py"), *map(str, run)]
    launched = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (Path("stopped/metrics.csv").is_file() and len(table("stopped")) > 3):
        time.sleep(0.2)
    assert launched.poll() is None
    sent = time.monotonic()
    launched.send_signal(signal.SIGTERM)
    said, _ = launched.communicate(timeout=60)
    assert time.monotonic() - sent < 30 and "checkpoint saved" in said, said
    step = int(table("stopped")[-1]["step"])
    assert [path.name for path in Path("stopped/resume").glob("step_*")] == [f"step_{step:06d}"]
    assert Path("stopped/tc_text.safetensors").resolve().name.endswith(f"_iter_{step}.safetensors")
    more = [*run, "--resume", "--max_steps", step + 1]
    done = two_processes(ROOT / "train_textcraftor.py", *more)
    assert done.returncode == 0 and len(table("stopped")) == step + 2, done.stderr


def test_old_checkpoints_are_deleted_and_the_newest_is_linked(work, command):
    train(*command, "--max_steps", 4, "--save_every", 1, "--keep_checkpoints", 2)
    kept = sorted(path.name for path in Path("output").glob("tc_text_e_*"))
    assert kept == ["tc_text_e_0_iter_3.safetensors", "tc_text_e_0_iter_4.safetensors"]
    assert os.readlink("output/tc_text.safetensors") == kept[-1] and Path("output/tc_text_best.safetensors").is_file()


def test_later_weights_of_a_killed_run_are_not_the_newest(work, command):
    """Killed between the weights of step 9 and their state, a run goes on from step 1 and keeps what it writes."""
    run = [*command, "--save_every", 1, "--keep_checkpoints", 1]
    train(*run, "--max_steps", 1)
    shutil.copy("output/tc_text_e_0_iter_1.safetensors", "output/tc_text_e_0_iter_9.safetensors")
    train(*run, "--max_steps", 2, "--resume")
    train(*run, "--max_steps", 3, "--resume")
    assert Path("output/tc_text.safetensors").resolve().name == "tc_text_e_0_iter_3.safetensors"
    assert len(list(Path("output").glob("tc_text_e_*"))) == 2


def test_a_run_goes_on_with_its_monitors_only(work, command):
    train(*command, "--max_steps", 1, "--monitor", "own.py:blueness")
    for monitors in ([], ["--monitor", "own.py:blueness", "--monitor", "own.py:constant"]):
        with pytest.raises(UserError, match=r"metrics.csv does not have the columns of this run .* --monitor"):
            train(*command, "--max_steps", 2, "--resume", *monitors)
        AcceleratorState._reset_state(True)
    train(*command, "--max_steps", 2, "--resume", "--monitor", "own.py:blueness")
    assert len(table("output")) == 3


def test_a_disk_that_fills_up_loses_no_row(work, command, monkeypatch, capsys):
    """Rows that could not be written come with the next one that can; the last checkpoint needs room."""
    append, rewrite, full = run_folder._append, run_folder.Record._rewrite, {2, 3}

    def refuse(write):
        def written(*arguments):
            rows = arguments[0].rows if isinstance(arguments[0], run_folder.Record) else arguments[2]
            if rows and int(rows[-1]["step"]) in full:
                raise OSError(28, "No space left on device")
            write(*arguments)

        return written

    monkeypatch.setattr(run_folder, "_append", refuse(append))
    monkeypatch.setattr(run_folder.Record, "_rewrite", refuse(rewrite))
    train(*command, "--max_steps", 5, "--val_every", 0, "--sample_every", 0)
    assert [row["step"] for row in table("output")] == list("012345")
    assert capsys.readouterr().out.count("NOT WRITTEN") == 1
    monkeypatch.setattr("textcraftor.checkpoints.has_room", lambda *_: False)
    with pytest.raises(UserError, match="step 6: NOT SAVED: .* --resume goes on from the newest checkpoint"):
        train(*command, "--max_steps", 6, "--val_every", 0, "--sample_every", 0, "--resume")


def test_damaged_run_and_full_disk_give_one_line_errors(work, command, monkeypatch):
    Path("file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train(*command, "--output-path", "file/run")
    with monkeypatch.context() as patched:
        patched.setattr("textcraftor.checkpoints.free_bytes", lambda folder: 1000)
        with pytest.raises(UserError, match="GB free, and this run writes up to"):
            train(*command)
    assert not Path("output/options.json").exists()
    AcceleratorState._reset_state(True)
    train(*command, "--max_steps", 1)
    (state,) = Path("output/resume").glob("step_*")
    damages = {
        "output/options.json": "options.json: cannot be read",
        "output/metrics.csv": "metrics.csv is damaged",
        str(next(state.glob("optimizer*"))): "is damaged or incomplete",
        "output/tc_text_e_0_iter_1.safetensors": "is damaged or incomplete",
    }
    for name, problem in damages.items():
        whole = Path(name).read_bytes()
        Path(name).write_bytes(whole[: len(whole) // 3] if name != "output/options.json" else b"")
        AcceleratorState._reset_state(True)
        with pytest.raises(UserError, match=problem):
            train(*command, "--max_steps", 2, "--resume")
        Path(name).write_bytes(whole)
    Path("other.csv").write_bytes(Path("prompts.csv").read_bytes())  # the same prompts under another name
    AcceleratorState._reset_state(True)
    train(*command, "--prompts", "other.csv", "--max_steps", 2, "--resume")
    assert len(table("output")) == 3
