"""Work on a benchmark's rows in batches: on all processes, two batches at a time in each, until done or interrupted."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from textcraftor.benchmark.results import Table
from textcraftor.processes import stop_signals

WORKERS = 2  # batches that each process works on at the same time


def work_through(
    accelerator: Accelerator,
    rows: list[dict],
    done: dict[int, dict],
    batch_size: int,
    work: Callable[[list[dict]], list[dict]],
    table: Table,
) -> bool:
    """Do work(batch of rows) for all rows whose index is not in `done`; add the results to `done` and to the table.

    Each process works on two batches at a time, in threads. The GPU takes their work in turn, while a CPU encodes
    pictures and prompts. On a CPU each thread gets half of the cores, which small networks use better than one batch
    uses all.
    Returns False if a signal ended the work early.
    """
    shares = _shares(accelerator, rows, done, batch_size)
    cores = torch.get_num_threads()
    workers = WORKERS if accelerator.device.type == "cuda" else min(WORKERS, cores)
    start = partial(start_worker, accelerator.device, threads_per_worker(cores, workers))
    finished = sum(row["index"] in done for row in rows)
    bar = tqdm(
        total=len(rows), initial=finished, disable=not accelerator.is_main_process, dynamic_ncols=True, unit="image"
    )
    with stop_signals() as signals, bar, ExitStack() as at_end:
        at_end.callback(torch.set_num_threads, cores)  # in some libraries, all threads share this number
        pool = at_end.enter_context(ThreadPoolExecutor(workers, initializer=start))
        begun = deque(pool.submit(work, share) for share in islice(shares, workers))
        while begun:
            parts = gather_object([(row, len(signals)) for row in begun.popleft().result()])
            if any(stopping for _, stopping in parts):
                shares = iter(())
            begun.extend(pool.submit(work, share) for share in islice(shares, 1))
            new = [row for row, _ in parts]
            bar.update(sum(row["index"] not in done for row in new))
            done |= {row["index"]: row for row in new}
            if accelerator.is_main_process:
                table.add(new)
            bar.set_postfix_str(_means(done, table.scores))
    return all(row["index"] in done for row in rows)


def _shares(accelerator, rows, done, batch_size):
    """Iterate over this process's batches, [] where the last round has fewer batches than processes.

    Batches are cut from all rows, done or not. So neither an interruption nor the number of processes changes which
    images are computed together, and every image comes out the same, bit for bit.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches = [batch for batch in batches if any(row["index"] not in done for row in batch)]
    batches += [[]] * (-len(batches) % accelerator.num_processes)
    return iter(batches[accelerator.process_index :: accelerator.num_processes])


def _means(done, names):
    """Mean scores so far, for the progress bar."""
    scored = [row for row in done.values() if "problem" not in row]
    means = {name: sum(row[name] for row in scored) / max(1, len(scored)) for name in names}
    return " ".join(f"{name} {mean:.4g}" for name, mean in means.items())


def threads_per_worker(cores: int, workers: int) -> int:
    """Torch threads for each worker: at least one, even if a launcher sets OMP_NUM_THREADS=1."""
    return max(1, cores // workers)


def start_worker(device: torch.device, threads: int) -> None:
    """Set the calling thread's number of cores and its GPU. Torch keeps both for each thread separately."""
    torch.set_num_threads(threads)
    if device.type == "cuda" and device.index is not None:  # accelerate gives no index if there is only one GPU
        torch.cuda.set_device(device)
