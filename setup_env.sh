# Sourced by the scripts beside it, with `repository` set to this folder and `requirements` to the files of packages that
# are needed. Leaves the Python environment to use active: the virtual or conda environment that is active already, if it
# has the packages; otherwise .venv, made here. Defines `launch`, which starts a program.
requirements=${requirements:-requirements.txt}

# Whether the active Python has all packages of the requirements, in the versions they ask for; prints what it lacks.
has_packages() {
    python - "$repository/$requirements" <<'PYTHON'
import importlib.metadata
import pathlib
import re
import sys


def lines(path):
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            yield from lines(path.with_name(line[3:].strip()))
        elif line.strip() and not line.startswith("#"):
            yield line.strip()


def numbers(version):
    return [int(part) for part in re.match(r"[\d.]*\d", version)[0].split(".")]


lacking = []
for line in lines(pathlib.Path(sys.argv[1])):
    name, _, least = line.partition(">=")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        lacking.append(f"{name} is missing")
        continue
    if numbers(found) < numbers(least):
        lacking.append(f"{name} is {found}, older than {least}")
if lacking:
    sys.exit("; ".join(lacking))
PYTHON
}

if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" = base ] && ! has_packages 2>/dev/null; then
    echo "conda's base environment lacks packages and is left alone; using $repository/.venv"
    CONDA_PREFIX=
fi
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if ! cat "$repository/requirements.txt" "$repository/$requirements" |
        cmp -s - "$repository/.venv/installed_$requirements"; then
        if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "error: python3 is missing or older than 3.10; install Python 3.10 or newer" >&2
            exit 1
        fi
        echo "Setting up $repository/.venv (once; takes some minutes)"
        if ! python3 -m venv "$repository/.venv"; then
            echo "error: python3 -m venv failed; on Debian or Ubuntu: apt install python3-venv" >&2
            exit 1
        fi
        "$repository/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            -r "$repository/$requirements" || exit 1
        cat "$repository/requirements.txt" "$repository/$requirements" > "$repository/.venv/installed_$requirements"
    fi
    . "$repository/.venv/bin/activate"
elif ! lacking=$(has_packages 2>&1); then
    echo "error: the active Python environment does not fit ($lacking); run: pip install -r $repository/$requirements" >&2
    exit 1
fi

# Set `gpus` to the number of GPUs visible here and `nodes` to the number of nodes that run together.
count_gpus() {
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())') || exit 1
    nodes=${NNODES:-${SLURM_STEP_NUM_NODES:-1}}
}

# Run program $1 of this folder, with the remaining arguments, on every visible GPU, or on the CPU if there is none.
# On several nodes, run the same command on each, with torchrun's variables NNODES, NODE_RANK, MASTER_ADDR and
# MASTER_PORT set; under `srun` with one task per node, Slurm provides the first two.
launch() {
    program=$repository/$1
    shift
    count_gpus
    node=${NODE_RANK:-${SLURM_NODEID:-0}}
    if [ "$nodes" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        echo "error: $nodes nodes, but MASTER_ADDR is not set; give the first node's name or address in it" >&2
        exit 1
    fi
    if [ -z "${NNODES:-}" ] && [ "${SLURM_STEP_NUM_TASKS:-$nodes}" -gt "$nodes" ]; then
        echo "error: srun started $SLURM_STEP_NUM_TASKS tasks on $nodes nodes; one a node starts all of its GPUs:" \
            "srun --ntasks-per-node=1" >&2
        exit 1
    fi
    if [ "$nodes" -gt 1 ] && [ "$gpus" -eq 0 ]; then
        echo "error: $nodes nodes, but no GPU is visible on this one" >&2
        exit 1
    fi
    if [ "$gpus" -gt 1 ] || [ "$nodes" -gt 1 ]; then
        set -- accelerate launch --multi_gpu --num_machines "$nodes" --machine_rank "$node" \
            --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "${MASTER_PORT:-29500}" \
            --num_processes "$((gpus * nodes))" --mixed_precision no --dynamo_backend no "$program" "$@"
    else
        set -- python "$program" "$@"
    fi
    exec "$@"
}
