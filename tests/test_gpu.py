"""What only a CUDA GPU can show, in about a quarter of an hour: sh run_tests.sh -m gpu

Training and evaluation are compared with fp32 on the CPU, memory with the table in speed/README.md. Training compares
gradients by their length, not weights: where a true gradient is nearly 0, Adam turns rounding into whole steps.
"""

import csv
import gc
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_textcraftor
from speed import full_size
from speed.networks import build
from textcraftor.models import SD_V1_CONFIGS
from textcraftor.options import make_parser
from textcraftor.sampling import make_scheduler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and: sh run_tests.sh -m gpu"),
]

ROOT = Path(__file__).parents[1]
STEPS = 3
TRAINING = [
    "--model", "miniature", "--max_steps", str(STEPS), "--step", "10", "--grad_steps", "3", "--batch-size", "4",
    "--lr_warmup_steps", "0", "--max_grad_norm", "0", "--monitor", "clip", "--val_count", "4", "--val_every", "0",
    "--sample_every", "0", "--save_every", "0",
]  # fmt: skip
# How far precision may move a score; what four rewards of random pictures differ by is 50 times as much.
SCORE_BOUNDS = {"clip": 0.03, "aesthetic": 0.3, "pickscore": 0.3, "hpsv2": 0.01}
TRAINED = {
    "tc_text": ["--lr_text", "1e-6"],
    "tc_unet": ["--lr_text", "0", "--lr_unet", "1e-6"],
    "LoRA": ["--lora_rank", "4", "--lr_text", "1e-5"],
    "refl": ["--gradient", "refl", "--grad_steps", "1", "--driven", "3", "--reuse", "2", "--tune_unconditional", "off"],
}


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gradient_and_metrics(output, *options):
    """A short training in this process -> (first gradient, in one vector, rows of metrics.csv from step 1 on)."""
    gradients = []

    def keep(optimizer, *_):
        if not gradients:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            gradients.append(torch.cat([parameter.grad.double().cpu().flatten() for parameter in parameters]))

    hook = register_optimizer_step_pre_hook(keep)
    try:
        train_textcraftor.main([*TRAINING, "--output-path", str(output), *options])
    finally:
        hook.remove()
        AcceleratorState._reset_state(True)
        torch._dynamo.reset()
    return gradients[0], rows(output / "metrics.csv")[1:]


@pytest.fixture(scope="module", params=TRAINED)
def on_cpu(request, tmp_path_factory):
    """(name of what trains, gradient, metrics) of a training on the CPU in fp32."""
    options = [*TRAINED[request.param], "--mixed_precision", "no"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ACCELERATE_USE_CPU", "true")
        return request.param, *gradient_and_metrics(tmp_path_factory.mktemp("cpu"), *options)


@pytest.mark.parametrize(
    "options, tolerance",
    [
        (["--mixed_precision", "no"], 0.06),  # products in TF32, with as many bits as fp16
        (["--mixed_precision", "fp16"], 0.06),
        (["--mixed_precision", "bf16"], 0.12),
        (["--mixed_precision", "bf16", "--compile", "--vae_checkpointing"], 0.12),
    ],
    ids=["fp32", "fp16", "bf16", "bf16, compiled"],
)
def test_training_on_the_gpu_is_training_on_the_cpu(on_cpu, tmp_path, capsys, options, tolerance):
    """The first gradient, relative to its length, and each step's scores; no step is skipped."""
    trains, expected, reference = on_cpu
    gradient, metrics = gradient_and_metrics(tmp_path / "gpu", *TRAINED[trains], *options)
    assert f"on cuda, precision {options[1]} (as requested)" in capsys.readouterr().out
    assert (gradient - expected).norm() <= tolerance * expected.norm()
    assert [row["skipped"] for row in metrics] == ["0"] * STEPS
    same_metrics(metrics, reference, tolerance)


def same_metrics(found, expected, tolerance):
    """Scores of two trainings agree in every step, and the norm of the first gradient; rounding may move later ones."""
    for row, wanted in zip(found, expected, strict=True):
        for name, most in SCORE_BOUNDS.items():
            for column in (name, f"val_{name}") if row["val_total"] else (name,):
                assert abs(float(row[column]) - float(wanted[column])) <= most, f"{column}, step {row['step']}"
    assert float(found[0]["grad_norm"]) == pytest.approx(float(expected[0]["grad_norm"]), rel=tolerance)


def weights_of(path):
    """All weights of a file in one vector, whichever transformers named them."""
    state = {name.removeprefix("text_model."): value for name, value in load_file(path).items()}
    return torch.cat([state[name].double().flatten() for name in sorted(state) if "position_ids" not in name])


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP += ["--fsdp_transformer_layer_cls_to_wrap", "BasicTransformerBlock,ResnetBlock2D"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "trains, how",
    [("tc_text", ["--multi_gpu"]), ("tc_unet", ["--multi_gpu"]), ("tc_unet", FSDP)],
    ids=["text encoder", "UNet", "UNet, split"],
)
def test_two_gpus_train_as_one_with_the_double_batch(tmp_path, trains, how):
    """As setup_env.sh and recipes/README.md launch it; gradients that are added, not averaged, have twice the norm."""
    common = ["train_textcraftor.py", *TRAINING, *TRAINED[trains], "--mixed_precision", "no"]
    launch = ["-m", "accelerate.commands.launch", "--num_machines", 1, "--num_processes", 2]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", *how]
    said = run(*launch, *common, "--batch-size", 2, "--output-path", tmp_path / "two")
    assert f"{STEPS} steps of 4 images on cuda" in said
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    run(*common, "--output-path", tmp_path / "one", CUDA_VISIBLE_DEVICES=first)
    one, two = (rows(tmp_path / name / "metrics.csv")[1:] for name in ("one", "two"))
    same_metrics(two, one, 0.06)
    # An Adam step is as long as any other: steps in unrelated directions would be 1.4 of their length apart.
    one, two = (weights_of(tmp_path / name / f"{trains}.safetensors") for name in ("one", "two"))
    part = {"tc_text": "text_encoder/model", "tc_unet": "unet/diffusion_pytorch_model"}[trains]
    start = weights_of(ROOT / "miniature" / "stable-diffusion" / f"{part}.safetensors")
    assert (two - one).norm() <= 0.4 * (one - start).norm()


def test_evaluation_on_the_gpu_is_evaluation_on_the_cpu(tmp_path):
    """test_parti.py as accelerate starts it on several GPUs, with one thread: the same pictures and scores."""
    # Three batches for two workers.
    command = ["test_parti.py", "--model", "miniature", "--limit", 12, "--batch-size", 4]
    run(*command, "--mixed_precision", "no", "--output_path", tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")
    expected = rows(tmp_path / "cpu" / "scores.csv")
    for precision, grey_levels in [("no", 2), ("fp16", 2), ("bf16", 3)]:  # of 255, on average; bf16 on a CPU: 0.4
        folder = tmp_path / precision
        said = run(*command, "--mixed_precision", precision, "--output_path", folder, OMP_NUM_THREADS="1")
        assert "on cuda" in said and "12 of 12 images scored" in said
        for row, wanted in zip(rows(folder / "scores.csv"), expected, strict=True):
            first, second = (np.asarray(Image.open(tmp_path / at / row["file"]), float) for at in (precision, "cpu"))
            assert abs(first - second).mean() <= grey_levels, row["file"]
            for name, most in SCORE_BOUNDS.items():
                column = {"hpsv2": "hps_v2.0"}.get(name, name)
                assert abs(float(row[column]) - float(wanted[column])) <= most, f"{row['file']}, {name}"


@pytest.mark.parametrize(
    "options, peak",  # GiB, as speed/README.md has them
    [
        (["--batch-size", "1"], 14.0),
        (["--batch-size", "4"], 25.0),
        (["--train", "unet"], 23.6),
        (["--evaluate", "--batch-size", "8"], 19.0),
    ],
    ids=["text encoder", "text encoder, 4 images", "UNet", "evaluation"],
)
def test_full_size_needs_the_memory_that_readme_says(options, peak):
    """SD v1.5 and the four reward models with random weights, with two GiB more for CUDA and its allocator."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < (peak + 3) * 2**30:
        pytest.skip(f"needs {peak + 3:.0f} GiB of free GPU memory")
    args = make_parser("", full_size.OPTIONS).parse_args(options)
    trains = "" if args.evaluate else args.train
    scheduler = make_scheduler(DDIMScheduler.load_config(SD_V1_CONFIGS, subfolder="scheduler"), args.step)
    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        networks = build(full_size.full_size(), trains, torch.bfloat16, torch.float32 if args.evaluate else None)
    for network in networks[1:4]:
        network.to(memory_format=torch.channels_last)

    def step():
        if args.evaluate:
            full_size.evaluation(args, lambda name: nullcontext(), networks, scheduler, "cuda")
        else:
            full_size.parted_step(args, lambda name: nullcontext(), networks, scheduler, optimizer, "cuda")

    optimizer = None if args.evaluate else full_size.make_optimizer(args, networks)
    step()  # makes the optimizer's state
    torch.cuda.reset_peak_memory_stats()
    step()
    found = (torch.cuda.max_memory_allocated() - before) / 2**30
    assert 0.85 * peak <= found <= peak + 2
