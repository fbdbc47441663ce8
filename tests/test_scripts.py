"""The shell scripts on users' machines; stand-ins for python, pip and accelerate print how they are called."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ACTIVE = {"VIRTUAL_ENV": "/env", "LACKS": "0", "GPUS": "0"}
PYTHONS = ("python3", *(f"python3.{minor}" for minor in range(10, 15)))
OLD, NEW = "exit 1\n", 'case "$*" in *ensurepip*) exit "${NO_VENV:-0}";; *"import sys"*) exit 0;; esac\n'


def program(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + lines)
    path.chmod(0o755)


@pytest.fixture
def repository(tmp_path):
    """A copy of the scripts in a folder with a space in its name."""
    folder = tmp_path / "my clone"
    folder.mkdir()
    for path in (*ROOT.glob("*.sh"), *ROOT.glob("requirements*.txt")):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def programs(tmp_path):
    """Folder of programs: python of an active environment, which knows of $GPUS devices, accelerate, old pythons."""
    folder = tmp_path / "bin"
    answers = '*version_info*) exit 0;; *cuda*) echo "$GPUS";; *requirements*) exit "$LACKS";; *) echo "$@";;'
    program(folder / "python", f'case "$2" in {answers} esac\n')
    program(folder / "accelerate", 'echo "accelerate $*"\n')
    for name in PYTHONS:
        program(folder / name, OLD)
    return folder


def run(script, *arguments, path, **environment):
    unset = ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in unset and not name.startswith("SLURM_")}
    return subprocess.run(
        ["sh", str(script), *arguments], env=clean | {"PATH": f"{path}:{os.environ['PATH']}"} | environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


# The released script's settings, and the paper's encoder as it tests it.
RELEASED = (
    "--clip 0.5 --aesthetic 1. --pickscore 1. --hpsv2 1. --grad_steps 5 --lr_text 1e-6 --lr_unet 0. --batch-size 4 "
)
PAPER = "--text_path checkpoints/tc_text_e_0_iter_10000.pth --grad_steps 15 --seed 2023 "


def test_users_options_come_last_and_the_miniature_has_its_own(repository, programs):
    for script, options, defaults in [
        ("run_textcraftor", "--hpsv2 2", RELEASED),
        ("run_textcraftor", "--model miniature --seed 3", ""),
        ("run_textcraftor", "--model=miniature", ""),
        ("test_parti", "--limit 8", PAPER),
        ("test_hpsv2", "--limit 8", PAPER),
        ("test_parti", "--text_path ", ""),
        ("test_hpsv2", "--unet-path=u.pth", ""),
        ("test_hpsv2", "--prompt_eng", ""),
        ("test_hpsv2", "--score_only images", ""),
    ]:
        done = run(repository / f"{script}.sh", *options.split(" "), path=programs, **ACTIVE)
        program = f"{repository}/{script.replace('run', 'train')}.py"
        assert done.stdout == f"{program} {defaults}{options}\n", done.stderr


TORCHRUN = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
# What Slurm sets in `srun --nodes 2 --ntasks-per-node 1`, and in a batch script that runs on the first of two nodes.
SRUN = {"SLURM_NNODES": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1"}
BATCH = {"SLURM_NNODES": "2", "SLURM_NODEID": "0"}


def test_every_gpu_of_every_node_has_a_process(repository, programs):
    for variables, gpus, machines, rank, address, port, processes in [
        (TORCHRUN, 8, 2, 1, "node7", 1234, 16),
        (SRUN | {"MASTER_ADDR": "n1"}, 1, 2, 1, "n1", 29500, 2),
        (BATCH, 2, 1, 0, "127.0.0.1", 29500, 2),
        ({}, 8, 1, 0, "127.0.0.1", 29500, 8),
    ]:
        said = run(repository / "run_textcraftor.sh", path=programs, **ACTIVE | {"GPUS": str(gpus)} | variables).stdout
        assert said.startswith("accelerate launch --multi_gpu ")
        for option in (
            f"--num_machines {machines} --machine_rank {rank} ",
            f"--main_process_ip {address} --main_process_port {port} ",
            f"--num_processes {processes} ",
        ):
            assert option in said


def test_each_machine_that_does_not_fit_is_told_so_in_one_line(repository, programs):
    """Python too old, no venv module, no network, an environment that lacks packages, nodes that cannot meet."""
    pip_fails = NEW + (
        'case "$*" in "-m venv "*) mkdir -p "$3/bin"; '
        'printf "#!/bin/sh\\necho WARNING: Retrying >&2; echo ERROR: No matching distribution >&2; exit 1\\n" '
        '> "$3/bin/python"; chmod +x "$3/bin/python";; esac\n'
    )
    for python3, variables, problem in [
        (OLD, {}, "install Python 3.10 or newer"),
        (NEW, {"NO_VENV": "1"}, "apt install python3-venv"),
        (NEW + "echo 'No space left on device' >&2; exit 1\n", {}, "could not be created: No space left on device"),
        (pip_fails, {}, "ERROR: No matching distribution (is this machine online?"),
        (OLD, {"VIRTUAL_ENV": "/env", "LACKS": "1"}, "/env, does not fit: ; run: pip install -r"),
        (OLD, {"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "mine", "LACKS": "1"}, "/conda, does not fit: ; run:"),
        (OLD, ACTIVE | {"NNODES": "2", "GPUS": "8"}, "MASTER_ADDR"),
        (OLD, ACTIVE | {"NNODES": "2", "GPUS": "8", "MASTER_ADDR": "n1"}, "NODE_RANK is not set"),
        (OLD, ACTIVE | TORCHRUN, "no GPU"),
        (OLD, ACTIVE | SRUN | {"SLURM_STEP_NUM_TASKS": "16", "MASTER_ADDR": "n1"}, "--ntasks-per-node=1"),
    ]:
        program(programs / "python3", python3)
        done = run(repository / "run_textcraftor.sh", path=programs, **variables)
        assert done.returncode == 1 and problem in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and done.stdout.count("\n") <= 1
        assert not (repository / ".venv" / "installed_requirements.txt").exists()
    program(programs / "python", OLD)
    done = run(repository / "run_textcraftor.sh", path=programs, **ACTIVE)
    assert done.returncode == 1 and "/env, has no Python 3.10 or newer" in done.stderr and not done.stdout


def test_an_active_environment_is_checked_by_versions(repository):
    """With the real python of this suite: it fits, and does not when a requirement is newer or not installed."""
    folder = Path(sys.executable).parent
    (repository / "requirements.txt").write_text("numpy>=1.0\n# a comment\n")
    (repository / "requirements-dev.txt").write_text("-r requirements.txt\npytest>=1\n")
    good = run(repository / "run_tests.sh", "--version", path=folder, VIRTUAL_ENV="/env")
    assert good.returncode == 0 and "pytest" in good.stdout + good.stderr
    (repository / "requirements.txt").write_text("numpy>=99.1\nno-such-package>=1\n")
    old = run(repository / "run_tests.sh", path=folder, CONDA_PREFIX="/conda", CONDA_DEFAULT_ENV="mine")
    assert old.returncode == 1 and old.stderr.count("\n") == 1
    assert "older than 99.1; no-such-package is missing" in old.stderr


def test_an_environment_is_made_once_and_again_when_requirements_change(repository, programs, tmp_path):
    """By the first Python that is new enough, also where conda's base lacks packages; base is used if it has them."""
    log = tmp_path / "log"
    program(
        programs / "python3.12",
        NEW
        + f"""
case "$*" in "-m venv "*)
    mkdir -p "$3/bin"
    echo 'echo "$@" >> {log}' > "$3/bin/python"
    chmod +x "$3/bin/python"
    echo 'PATH="$repository/.venv/bin:$PATH"' > "$3/bin/activate";;
esac
""",
    )
    conda = {"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}
    assert "-m pytest" in run(repository / "run_tests.sh", path=programs, LACKS="0", **conda).stdout
    assert not (repository / ".venv").exists()

    def calls(*arguments, **environment):
        log.write_text("")
        done = run(repository / "run_tests.sh", *arguments, path=programs, LACKS="1", **environment)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines()

    install, tests = calls("-k", "resume", **conda)
    assert install.startswith("-m pip install") and install.endswith(f"-r {repository}/requirements-dev.txt")
    assert tests.startswith("-m pytest ") and tests.endswith(" -k resume")
    assert [line.startswith("-m pytest") for line in calls()] == [True]
    assert calls("-m", "gpu") == ["-m pytest -m gpu"]  # one after another, as they share the GPU
    with open(repository / "requirements.txt", "a") as file:
        file.write("another\n")
    assert len(calls()) == 2
