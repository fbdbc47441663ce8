"""The recipes' command lines, read by the programs' own option parsers, against the paper's figures."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from textcraftor.benchmark.options import parse_options as parse_test_options
from textcraftor.benchmark.prompt_lists import PARTI
from textcraftor.training_options import parse_options

ROOT = Path(__file__).parents[1]
SCALES = {"clip": 100, "aesthetic": 3, "pickscore": 1, "hpsv2": 100}  # of the released script
PAPER = (100, 1, 1, 100)

# fmt: off
# Recipe: (the paper's weights of CLIP, aesthetic, PickScore and HPS v2, K, what trains, images per update, the run's
# folder, which recipes/README.md names in the column of tests).
TRAINING = {
    "released":                   ((50, 3, 1, 100),   5, "text", 32, "released"),
    "paper":                      (PAPER,             5, "text", 256, "paper"),
    "unet":                       (PAPER,             5, "unet", 256, "unet"),
    "unet_alone":                 (PAPER,             5, "unet", 256, "unet_alone"),
    "single_reward aesthetic":    ((100, 1, 0, 0),    5, "text", 256, "aesthetic"),
    "single_reward pickscore":    ((100, 0, 1, 0),    5, "text", 256, "pickscore"),
    "single_reward hpsv2":        ((100, 0, 0, 100),  5, "text", 256, "hpsv2"),
    "single_reward_unet hpsv2":   ((100, 0, 0, 100),  5, "unet", 256, "hpsv2_unet"),
    "no_clip aesthetic":          ((0, 1, 0, 0),      5, "text", 256, "aesthetic_no_clip"),
    "grad_steps 5":               (PAPER,             5, "text", 256, "grad_steps_5"),
    "grad_steps 15":              (PAPER,            15, "text", 256, "grad_steps_15"),
    "clip_constraint":            ((0, 1, 1, 100),    5, "text", 256, "clip_constraint"),
    "direct pictures":            (PAPER,             5, "text", 256, "direct"),
    "weights 200 3 1 100":        ((200, 3, 1, 100),  5, "text", 256, "weights_200_3_1_100"),
    "weights 100 3 2 100":        ((100, 3, 2, 100),  5, "text", 256, "weights_100_3_2_100"),
}
# Recipe: (name of the tested run, scheduler, steps, tuned steps, weight of the tuned embeddings).
TESTS = {
    "test_grad_steps 5 25":       ("grad_steps_5",  "DDIM",      25, 25, 1.0),
    "test_grad_steps 10 10":      ("grad_steps_10", "DDIM",      25, 10, 1.0),
    "test_scheduler PNDM 50":     ("paper",         "PNDM",      50, 30, 1.0),
    "test_scheduler DPMSolver 25": ("paper",        "DPMSolver", 25, 15, 1.0),
    "test_mix hpsv2 0.25":        ("hpsv2",         "DDIM",      25, 15, 0.25),
}
# fmt: on


@pytest.fixture
def call(tmp_path):
    """call(recipe, *arguments, gpus, **variables) -> (what the shell did, the program's arguments).

    In a copy of the scripts, from another folder, in an active environment whose programs print their arguments.
    """
    clone = tmp_path / "my clone"
    shutil.copytree(ROOT / "recipes", clone / "recipes")
    for name in ("setup_env.sh", "requirements.txt"):
        shutil.copy(ROOT / name, clone)
    arguments = 'for argument; do echo "$argument"; done\n'
    programs = {
        "python": f'case "$2" in *cuda*) echo "$GPUS"; exit;; *requirements*) exit;; esac\n{arguments}',
        "accelerate": arguments,
    }
    for name, lines in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n" + lines)
        program.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "NNODES"))}
    variables |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "/env"}

    def call(recipe, *arguments, gpus=1, **others):
        name, *first = recipe.split()
        done = subprocess.run(
            ["sh", f"my clone/recipes/{name}.sh", *first, *arguments], cwd=tmp_path, text=True, capture_output=True,
            env=variables | {"GPUS": str(gpus)} | others, timeout=60,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        program = [number for number, line in enumerate(lines) if line.endswith(("train_textcraftor.py", "_parti.py"))]
        return done, lines[program[0] + 1 :] if program else []

    call.clone = clone
    return call


def images_per_update(done, options):
    lines = done.stdout.splitlines()
    processes = int(lines[lines.index("--num_processes") + 1]) if "--num_processes" in lines else 1
    return processes * options.batch_size * options.gradient_accumulation_steps


def test_training_recipes_have_the_papers_settings(call):
    for recipe, (weights, k, tuned, images, folder) in TRAINING.items():
        for gpus in (0, 1, 2, 8) if recipe in ("paper", "released") else (8,):
            done, arguments = call(recipe, "--save_every", "77", gpus=gpus)
            options = parse_options(arguments)
            found = [options.weighted.get(name, 0) * scale for name, scale in SCALES.items()]
            assert found == pytest.approx(weights, rel=1e-5), recipe
            rates = (1e-6, 0.0) if tuned == "text" else (0.0, 1e-6)
            assert (options.grad_range, options.lr_text, options.lr_unet) == ((k, k), *rates), recipe
            assert (options.step, options.guidance, options.max_steps) == (25, 7.5, 10_000), recipe
            assert options.model == f"{call.clone}/stable-diffusion-v1-5", recipe
            assert options.prompts == f"{call.clone}/openprompts.csv", recipe
            assert options.output_path == f"{call.clone}/output_{folder}", recipe
            # One image with a UNet in training: four would need 31.5 GiB.
            assert options.batch_size == (4 if tuned == "text" else 1), recipe
            assert images_per_update(done, options) == images, (recipe, gpus)
            assert options.save_every == 77, recipe
    assert parse_options(call("unet")[1]).text_path == f"{call.clone}/output_paper/tc_text.safetensors"
    second_stage = parse_options(call("single_reward_unet hpsv2")[1])
    assert second_stage.text_path == f"{call.clone}/output_hpsv2/tc_text.safetensors"
    assert parse_options(call("unet_alone")[1]).text_path == ""
    assert parse_options(call("clip_constraint")[1]).clip_constraint == 1
    assert parse_options(call("direct pictures")[1]).images == "pictures"
    lora = parse_options(call("lora")[1])
    assert (lora.lora_rank, lora.lr_text, lora.lr_unet) == (16, 1e-4, 0)

    # The same number of images in smaller micro-batches, on other numbers of GPUs and on several nodes.
    for arguments, how in (
        (["--batch-size", "1"], {"gpus": 2}),
        (["--batch_size=2"], {"gpus": 1}),
        ([], {"gpus": 8, "NNODES": "8", "NODE_RANK": "3", "MASTER_ADDR": "node0"}),  # the paper's 64 GPUs
    ):
        done, given = call("paper", *arguments, **how)
        assert images_per_update(done, parse_options(given)) == 256, (arguments, how)
    done, given = call("paper", gpus=6)
    assert images_per_update(done, parse_options(given)) == 264 and "264 images per optimizer step" in done.stdout

    # The miniature keeps the batch, K and learning rate that suit it; the weights are the row's.
    options = parse_options(call("single_reward hpsv2", "--model", "miniature")[1])
    assert options.weighted == {"clip": 1, "hpsv2": 1}
    assert (options.batch_size, options.gradient_accumulation_steps, options.grad_range) == (16, 1, (5, 5))
    assert options.output_path == f"{call.clone}/output_miniature_hpsv2"

    for recipe, *arguments in (
        ("single_reward",), ("single_reward clips",), ("weights 100 1",), ("weights 100 1 1 --model", "miniature"),
        ("direct",), ("grad_steps",), ("grad_steps --model miniature",), ("test_scheduler PNDM fifty",),
        ("test_scheduler PNDM",), ("test_grad_steps 5",), ("test_grad_steps 5 --model",),
        ("paper", "--batch-size", "0"), ("released", "--batch-size", "64"), ("test_mix hpsv2",),
    ):  # fmt: skip
        done, given = call(recipe, *arguments)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and not given, (recipe, done)


def test_test_recipes_have_the_papers_settings(call):
    outputs = set()
    for recipe, (run, *how) in TESTS.items():
        for arguments in ([], ["--model", "miniature"]):
            options = parse_test_options(PARTI, "", call(recipe, *arguments)[1])
            found = [options.scheduler, options.step, options.grad_steps, options.prompt_weighting]
            assert found == how, recipe
            folder = f"miniature_{run}" if arguments else run
            output = Path(options.output_path)
            assert output.parent == call.clone / "tests" and output not in outputs
            assert output.name.startswith("miniature_") == bool(arguments)
            outputs.add(output)
            model = ROOT / "miniature" / "stable-diffusion" if arguments else call.clone / "stable-diffusion-v1-5"
            assert options.model == str(model), recipe
            assert options.text_path == f"{call.clone}/output_{folder}/tc_text.safetensors", recipe
