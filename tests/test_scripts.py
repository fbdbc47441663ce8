"""The shell scripts, with programs that only say how they were called."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RELEASED = (
    "--clip 0.5 --aesthetic 1. --pickscore 1. --hpsv2 1. --grad_steps 5 --lr_text 1e-6 --lr_unet 0. --batch-size 4"
)
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
    for name in (
        "setup_env.sh",
        "run_textcraftor.sh",
        "run_tests.sh",
        *BENCHMARKS,
        "requirements.txt",
        "requirements-dev.txt",
    ):
        shutil.copy(ROOT / name, folder)
    return folder


def run(script, *arguments, path, **environment):
    unset = ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in unset and not name.startswith("SLURM_")}
    return subprocess.run(
        ["sh", str(script), *arguments], env=clean | {"PATH": f"{path}:{os.environ['PATH']}"} | environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def active(tmp_path):
    """Folder of programs of an active environment: python knows of $GPUS devices, all echo their arguments."""
    folder = tmp_path / "bin"
    program(
        folder / "python", 'case "$2" in *cuda*) echo "$GPUS";; *requirements*) exit "$LACKS";; *) echo "$@";; esac\n'
    )
    program(folder / "accelerate", 'echo "accelerate $*"\n')
    return folder


def test_without_arguments_it_is_the_released_scripts_run(repository, active):
    environment = {"VIRTUAL_ENV": "/some/env", "LACKS": "0"}
    one = run(repository / "run_textcraftor.sh", path=active, GPUS="0", **environment)
    assert one.stdout == f"{repository}/train_textcraftor.py {RELEASED}\n", one.stderr
    eight = run(repository / "run_textcraftor.sh", "--hpsv2", "2", path=active, GPUS="8", **environment)
    assert eight.stdout.startswith("accelerate launch") and "--num_processes 8 " in eight.stdout
    assert eight.stdout.endswith(f"{repository}/train_textcraftor.py {RELEASED} --hpsv2 2\n")
    assert not (repository / ".venv").exists()


def test_the_miniature_keeps_its_own_defaults(repository, active):
    arguments = ("--model", "miniature", "--seed", "3")
    done = run(repository / "run_textcraftor.sh", *arguments, path=active, GPUS="0", LACKS="0", CONDA_PREFIX="/conda")
    assert done.stdout == f"{repository}/train_textcraftor.py --model miniature --seed 3\n", done.stderr


def test_benchmarks_take_the_papers_text_encoder_unless_something_else_is_tested(repository, active):
    paper = "--text_path checkpoints/tc_text_e_0_iter_10000.pth --grad_steps 15 --seed 2023 "
    for script in BENCHMARKS:
        for arguments in ("--limit 8", "--text_path ", "--unet-path=u.pth", "--prompt_eng", "--score_only images"):
            done = run(repository / script, *arguments.split(" "), path=active, GPUS="1", VIRTUAL_ENV="/env", LACKS="0")
            expected = (paper if arguments == "--limit 8" else "") + arguments
            assert done.stdout == f"{repository}/{script.replace('.sh', '.py')} {expected}\n", done.stderr


TORCHRUN = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
# What Slurm sets in `srun --nodes 2 --ntasks-per-node 1`, and in a batch script that runs on the first of two nodes.
SRUN = {"SLURM_NNODES": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1"}
BATCH = {"SLURM_NNODES": "2", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    "variables, gpus, options",
    [
        (TORCHRUN, 8, "--num_machines 2 --machine_rank 1 --main_process_ip node7 --main_process_port 1234 16"),
        (SRUN | {"MASTER_ADDR": "n1"}, 1,
         "--num_machines 2 --machine_rank 1 --main_process_ip n1 --main_process_port 29500 2"),
        (BATCH, 2, "--num_machines 1 --machine_rank 0 --main_process_ip 127.0.0.1 --main_process_port 29500 2"),
    ],
)  # fmt: skip
def test_several_nodes(repository, active, variables, gpus, options):
    done = run(
        repository / "run_textcraftor.sh", path=active, GPUS=str(gpus), VIRTUAL_ENV="/env", LACKS="0", **variables
    )
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


def test_an_active_environment_is_checked_by_versions(repository):
    """With the real python of this suite: good as it is, and not when a requirement is newer or unknown."""
    folder = Path(sys.executable).parent
    (repository / "requirements.txt").write_text("numpy>=1.0\n# a comment\n")
    (repository / "requirements-dev.txt").write_text("-r requirements.txt\npytest>=1\n")
    good = run(repository / "run_tests.sh", "--version", path=folder, VIRTUAL_ENV="/env")
    assert good.returncode == 0 and "pytest" in good.stdout + good.stderr
    (repository / "requirements.txt").write_text("numpy>=99.1\nno-such-package>=1\n")
    old = run(repository / "run_tests.sh", path=folder, CONDA_PREFIX="/conda", CONDA_DEFAULT_ENV="mine")
    assert old.returncode == 1 and old.stderr.count("\n") == 1
    assert "older than 99.1; no-such-package is missing" in old.stderr and "pip install -r" in old.stderr


def test_condas_base_is_not_used_unless_it_has_the_packages(repository, active):
    conda = {"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base", "GPUS": "0"}
    used = run(repository / "run_textcraftor.sh", path=active, LACKS="0", **conda)
    assert "train_textcraftor.py" in used.stdout
    program(active / "python3", "exit 1\n")  # goes on to make .venv, which needs a python3
    left = run(repository / "run_textcraftor.sh", path=active, LACKS="1", **conda)
    assert "left alone" in left.stdout and "Python 3.10 or newer" in left.stderr


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
    assert install.startswith("-m pip install") and install.endswith(f"-r {repository}/requirements-dev.txt")
    assert tests == "-m pytest -k resume"
    assert calls() == ["-m pytest"]
    with open(repository / "requirements.txt", "a") as file:
        file.write("another\n")
    assert len(calls()) == 2


def test_an_old_python_is_refused(repository, tmp_path):
    program(tmp_path / "bin" / "python3", "exit 1\n")
    done = run(repository / "run_tests.sh", path=tmp_path / "bin")
    assert done.returncode == 1 and "Python 3.10 or newer" in done.stderr
    assert not (repository / ".venv" / "installed_requirements-dev.txt").exists()
