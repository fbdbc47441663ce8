"""The shell scripts, with programs that only say how they were called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPER = "--clip 0.5 --aesthetic 1. --pickscore 1. --hpsv2 1. --grad_steps 5 --lr_text 1e-6 --lr_unet 0. --batch-size 4"
BENCHMARKS = ("test_parti.sh", "test_hpsv2.sh")


def program(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + lines)
    path.chmod(0o755)


@pytest.fixture
def repository(tmp_path):
    """A copy of the scripts in a folder with a space in its name."""
    folder = tmp_path / "my clone"
    folder.mkdir()
    for name in ("setup_env.sh", "run_textcraftor.sh", "run_tests.sh", *BENCHMARKS, "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(script, *arguments, path, **environment):
    unset = ("VIRTUAL_ENV", "CONDA_PREFIX", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in unset and not name.startswith("SLURM_")}
    return subprocess.run(
        ["sh", str(script), *arguments], env=clean | {"PATH": f"{path}:{os.environ['PATH']}"} | environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def active(tmp_path):
    """Folder of programs of an active environment: python knows of $GPUS devices, all echo their arguments."""
    folder = tmp_path / "bin"
    program(folder / "python", 'case "$2" in *cuda*) echo "$GPUS";; *find_spec*) exit "$LACKS";; *) echo "$@";; esac\n')
    program(folder / "accelerate", 'echo "accelerate $*"\n')
    return folder


def test_without_arguments_it_is_the_papers_run(repository, active):
    environment = {"VIRTUAL_ENV": "/some/env", "LACKS": "0"}
    one = run(repository / "run_textcraftor.sh", path=active, GPUS="0", **environment)
    assert one.stdout == f"{repository}/train_textcraftor.py {PAPER}\n", one.stderr
    eight = run(repository / "run_textcraftor.sh", "--hpsv2", "2", path=active, GPUS="8", **environment)
    assert eight.stdout.startswith("accelerate launch") and "--num_processes 8 " in eight.stdout
    assert eight.stdout.endswith(f"{repository}/train_textcraftor.py {PAPER} --hpsv2 2\n")
    assert not (repository / ".venv").exists()


def test_the_miniature_keeps_its_own_defaults(repository, active):
    arguments = ("--model", "miniature", "--seed", "3")
    done = run(repository / "run_textcraftor.sh", *arguments, path=active, GPUS="0", LACKS="0", CONDA_PREFIX="/conda")
    assert done.stdout == f"{repository}/train_textcraftor.py --model miniature --seed 3\n", done.stderr


@pytest.mark.parametrize("script", BENCHMARKS)
def test_benchmarks_take_the_papers_text_encoder_and_pass_flags_on(repository, active, script):
    environment = {"VIRTUAL_ENV": "/some/env", "LACKS": "0"}
    paper = "--text_path checkpoints/tc_text_e_0_iter_10000.pth --grad_steps 15 --seed 2023"
    program = f"{repository}/{script.replace('.sh', '.py')}"
    one = run(repository / script, path=active, GPUS="1", **environment)
    assert one.stdout == f"{program} {paper}\n", one.stderr
    two = run(repository / script, "--limit", "8", path=active, GPUS="2", **environment)
    assert "--num_processes 2 " in two.stdout and two.stdout.endswith(f"{program} {paper} --limit 8\n")


@pytest.mark.parametrize("script", BENCHMARKS)
@pytest.mark.parametrize("arguments", [
    ["--model", "miniature"], ["--text_path", "a.pth"], ["--text-path=a.pth"], ["--limit", "8", "--text_path", ""],
    ["--text_path="], ["--unet_path", "u.pth", "--seed", "1"], ["--unet-path=u.pth"], ["--prompt_eng"],
    ["--prompt_eng=mine"], ["--prompt-eng", "mine"], ["--score_only", "my images"], ["--score-only=images"],
])  # fmt: skip
def test_benchmarks_leave_the_papers_text_encoder_out_where_something_else_is_tested(
    repository, active, script, arguments
):
    done = run(repository / script, *arguments, path=active, GPUS="1", VIRTUAL_ENV="/some/env", LACKS="0")
    expected = " ".join([f"{repository}/{script.replace('.sh', '.py')}", *arguments])
    assert done.stdout == f"{expected}\n", done.stderr


TORCHRUN = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
# What Slurm sets in `srun --nodes 2 --ntasks-per-node 1`, and in a batch script that runs on the first of two nodes.
SRUN = {"SLURM_NNODES": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1"}
BATCH = {"SLURM_NNODES": "2", "SLURM_NODEID": "0"}


@pytest.mark.parametrize("script", ["run_textcraftor.sh", *BENCHMARKS])
@pytest.mark.parametrize(
    "variables, gpus, options",
    [
        (TORCHRUN, 8, "--num_machines 2 --machine_rank 1 --main_process_ip node7 --main_process_port 1234 16"),
        (SRUN | {"MASTER_ADDR": "n1"}, 1,
         "--num_machines 2 --machine_rank 1 --main_process_ip n1 --main_process_port 29500 2"),
        (BATCH, 2, "--num_machines 1 --machine_rank 0 --main_process_ip 127.0.0.1 --main_process_port 29500 2"),
    ],
)  # fmt: skip
def test_several_nodes(repository, active, script, variables, gpus, options):
    done = run(repository / script, path=active, GPUS=str(gpus), VIRTUAL_ENV="/env", LACKS="0", **variables)
    *options, processes = options.split()
    assert done.stdout.startswith(f"accelerate launch --multi_gpu {' '.join(options)} --num_processes {processes} ")


@pytest.mark.parametrize(
    "variables, gpus, problem",
    [
        ({"NNODES": "2", "NODE_RANK": "1"}, 8, "MASTER_ADDR"),
        (TORCHRUN, 0, "no GPU"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "16", "MASTER_ADDR": "n1"}, 8, "--ntasks-per-node=1"),
    ],
)
def test_nodes_that_cannot_find_each_other(repository, active, variables, gpus, problem):
    environment = {"VIRTUAL_ENV": "/env", "LACKS": "0"} | variables
    done = run(repository / "run_textcraftor.sh", path=active, GPUS=str(gpus), **environment)
    assert done.returncode == 1 and problem in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_an_active_environment_is_not_filled(repository, active):
    done = run(repository / "run_tests.sh", path=active, GPUS="0", LACKS="1", VIRTUAL_ENV="/some/env")
    assert done.returncode == 1 and "pip install -r" in done.stderr and done.stdout == ""


def test_an_environment_is_made_once_and_again_when_requirements_change(repository, tmp_path):
    """python3 is a stand-in that makes an environment whose pip notes each installation."""
    log = tmp_path / "log"
    made = f"""
case "$*" in
    *version_info*) exit 0;;
    "-m venv "*)
        mkdir -p "$3/bin"
        echo 'echo "$@" >> {log}' > "$3/bin/python"
        chmod +x "$3/bin/python"
        echo 'PATH="$repository/.venv/bin:$PATH"' > "$3/bin/activate";;
esac
"""
    program(tmp_path / "bin" / "python3", made)

    def calls(*arguments):
        log.write_text("")
        done = run(repository / "run_tests.sh", *arguments, path=tmp_path / "bin")
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines()

    install, tests = calls("-k", "resume")
    assert install.startswith("-m pip install") and install.endswith(f"-r {repository}/requirements.txt")
    assert tests == "-m pytest -k resume"
    assert calls() == ["-m pytest"]
    with open(repository / "requirements.txt", "a") as file:
        file.write("another\n")
    assert len(calls()) == 2


def test_an_old_python_is_refused(repository, tmp_path):
    program(tmp_path / "bin" / "python3", "exit 1\n")
    done = run(repository / "run_tests.sh", path=tmp_path / "bin")
    assert done.returncode == 1 and "Python 3.10 or newer" in done.stderr
    assert not (repository / ".venv" / "installed_requirements.txt").exists()
