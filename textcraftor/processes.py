"""Precision, accelerate's Accelerator, and stop signals of a training run."""

import contextlib
import signal
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    parse_flag_from_env,
)
from packaging.version import Version

from textcraftor.errors import UserError
from textcraftor.precision import choose_precision
from textcraftor.run_folder import read_options


def settle_precision(args):
    """Replace args.mixed_precision "auto" by "no", "fp16" or "bf16" -> the reason, for the start line.

    A resumed run keeps the precision it began with, even on other hardware.
    """
    if args.resume and args.mixed_precision == "auto":
        args.mixed_precision = read_options(args.output_path).get("mixed_precision", "auto")
        if args.mixed_precision != "auto":
            return "as when this run began"
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device  # the same as Accelerator's
    args.mixed_precision, why = choose_precision(args.mixed_precision, device)
    return why


def make_accelerator(args, loss_scale):
    """Accelerate's processes, precision and trackers for training.

    Sets everything that affects gradients explicitly; otherwise accelerate would read it from environment variables.
    loss_scale: initial loss scale for fp16. Raises UserError for unsupported sharding.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # train_step accumulates
        log_with=args.report_to or None,
        project_dir=Path(args.output_path),
        kwargs_handlers=[
            AutocastKwargs(cache_enabled=False),  # the cache may hold weights cast under no_grad
            GradScalerKwargs(init_scale=loss_scale),
            # DistributedDataParallel averages gradients. The UNet runs K times before one backward pass, and DDP sends
            # each weight's gradient after the last of them. Buffers are constants; broadcasting them would
            # only make the processes wait for each other during validation.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    torch.backends.cuda.matmul.allow_tf32 = True  # fp32 matmuls on tensor cores, as convolutions by default
    if accelerator.distributed_type in ("DEEPSPEED", "MEGATRON_LM", "FSDP") and not accelerator.is_fsdp2:
        raise UserError(f"{accelerator.distributed_type.value}: not supported; to shard a network, use FSDP version 2")
    if accelerator.is_fsdp2 and args.lr_text and args.lr_unet:
        raise UserError("FSDP can shard only one network; train the text encoder first, then the UNet")
    recomputes = args.gradient_checkpointing == "full" and args.grad_range[1] > 1
    if accelerator.is_fsdp2 and recomputes and Version(torch.__version__) < Version("2.11"):
        # Recomputing a second step, it leaves the weights of the inner layers sharded (pytorch, pull request 171779).
        raise UserError(
            f"FSDP of torch {torch.__version__} cannot recompute more than one step; use torch 2.11 or newer, or "
            "--gradient_checkpointing none"
        )
    for option in ("ema", "lora_rank"):
        if accelerator.is_fsdp2 and getattr(args, option):
            raise UserError(f"--{option} does not work with FSDP; leave it out")
    return accelerator


class Stopped(Exception):
    """A signal asked this run, on any of its processes, to stop."""


@contextlib.contextmanager
def stop_signals():
    """Yield a list that collects SIGINT and SIGTERM instead of ending the process; a second SIGINT ends it as usual.

    SIGTERM may come twice, from whatever manages the job and from the launcher of several processes.
    """
    received = []

    def note(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_if_stopped(accelerator, received):
    """Raise Stopped on every process if any of them has received a signal. All processes must call this together."""
    if accelerator.num_processes == 1:
        stop = bool(received)
    else:
        flag = torch.tensor([float(len(received))], device=accelerator.device)
        stop = accelerator.gather(flag).sum().item() > 0
    if stop:
        raise Stopped
