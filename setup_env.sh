# Sourced by the scripts beside it, which set `repository` to this folder and may set `requirements` to a file of packages.
# Activates a Python environment: the virtual or conda environment that is active already, if it has the packages, else
# .venv in this folder, which is created on first use. Defines `launch`, which starts a program.
requirements=${requirements:-requirements.txt}

fail() {
    echo "error: $*" >&2
    exit 1
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Whether the active Python has all required packages in the required versions; if not, prints which it lacks.
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
    name, _, minimum = line.partition(">=")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        lacking.append(f"{name} is missing")
        continue
    if numbers(found) < numbers(minimum):
        lacking.append(f"{name} is {found}, older than {minimum}")
if lacking:
    print("; ".join(lacking))
    sys.exit(1)
PYTHON
}

# Create .venv with all packages, or end with one line, which quotes what venv or pip said.
make_venv() {
    for python3 in python3 python3.14 python3.13 python3.12 python3.11 python3.10 ""; do
        [ -z "$python3" ] && fail "python3 is missing or older than 3.10; install Python 3.10 or newer"
        is_recent "$python3" && break
    done
    "$python3" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python3 has no module venv or ensurepip; install it, on Debian or Ubuntu: apt install python3-venv"
    echo "Setting up $repository/.venv (once; takes some minutes)"
    said=$("$python3" -m venv "$repository/.venv" 2>&1) ||
        fail "$repository/.venv could not be created: $(echo "$said" | tail -n 1)"
    said=$("$repository/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -r "$repository/$requirements" 2>&1) ||
        fail "pip could not install $requirements: $(echo "$said" | grep -m 1 ^ERROR || echo "$said" | tail -n 1)" \
            "(is this machine online? If not, activate an environment that has the packages)"
    all_requirements > "$repository/.venv/installed_$requirements"
}

all_requirements() { cat "$repository/requirements.txt" "$repository/$requirements"; }

if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" = base ] && ! has_packages >/dev/null 2>&1; then
    echo "conda's base environment lacks packages and is left alone; using $repository/.venv"
    CONDA_PREFIX=
fi
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    all_requirements | cmp -s - "$repository/.venv/installed_$requirements" || make_venv
    . "$repository/.venv/bin/activate"
else
    environment=${VIRTUAL_ENV:-$CONDA_PREFIX}
    is_recent python || fail "the active environment, $environment, has no Python 3.10 or newer; deactivate it first"
    lacking=$(has_packages 2>&1) ||
        fail "the active environment, $environment, does not fit: $lacking;" \
            "run: pip install -r $repository/$requirements (or deactivate it, to use $repository/.venv)"
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
        fail "$nodes nodes, but MASTER_ADDR is not set; set it to the name or address of the first node"
    fi
    if [ "$nodes" -gt 1 ] && [ -z "${NODE_RANK:-${SLURM_NODEID:-}}" ]; then
        fail "$nodes nodes, but NODE_RANK is not set; set it to 0 on the first node, 1 on the next"
    fi
    if [ -z "${NNODES:-}" ] && [ "${SLURM_STEP_NUM_TASKS:-$nodes}" -gt "$nodes" ]; then
        fail "srun started $SLURM_STEP_NUM_TASKS tasks on $nodes nodes, but one per node runs all of the node's GPUs;" \
            "use: srun --ntasks-per-node=1"
    fi
    if [ "$nodes" -gt 1 ] && [ "$gpus" -eq 0 ]; then
        fail "$nodes nodes, but no GPU is visible on this one"
    fi
    if [ "$gpus" -gt 1 ] || [ "$nodes" -gt 1 ]; then
        # Seconds that a stopped run has to save its checkpoint before the launcher kills it.
        export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
        set -- accelerate launch --multi_gpu --num_machines "$nodes" --machine_rank "$node" \
            --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "${MASTER_PORT:-29500}" \
            --num_processes "$((gpus * nodes))" --mixed_precision no --dynamo_backend no "$program" "$@"
    else
        set -- python "$program" "$@"
    fi
    exec "$@"
}
