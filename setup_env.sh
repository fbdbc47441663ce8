# Sourced by the scripts beside it, with `repository` set to this folder. Leaves the Python environment to use active:
# the virtual or conda environment that is active already, as it is; else .venv, made here and filled from
# requirements.txt if it has not been filled from this very file before. Defines `launch`, which starts a program.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if ! cmp -s "$repository/requirements.txt" "$repository/.venv/installed_requirements.txt"; then
        if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "error: python3 is missing or older than 3.10; install Python 3.10 or newer" >&2
            exit 1
        fi
        echo "Setting up $repository/.venv (once; some minutes)"
        if ! python3 -m venv "$repository/.venv"; then
            echo "error: python3 -m venv failed; on Debian or Ubuntu: apt install python3-venv" >&2
            exit 1
        fi
        "$repository/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            -r "$repository/requirements.txt" || exit 1
        cp "$repository/requirements.txt" "$repository/.venv/installed_requirements.txt"
    fi
    . "$repository/.venv/bin/activate"
elif ! python -c 'import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("torch", "accelerate", "diffusers", "transformers", "open_clip", "pandas", "pyarrow",
                                 "matplotlib", "tensorboard", "pytest"))))'; then
    echo "error: the active Python environment lacks packages; pip install -r $repository/requirements.txt" >&2
    exit 1
fi

# Run a program of this folder, $1, on every visible GPU, or on the CPU of a machine without; the rest is its arguments.
# On several nodes, run the same command on each: NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, as for torchrun, say
# which this is and where the first is; within `srun`, of one task a node, Slurm says the first two.
launch() {
    program=$repository/$1
    shift
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())') || exit 1
    nodes=${NNODES:-${SLURM_STEP_NUM_NODES:-1}}
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
