"""What a training step does beside arithmetic: numbers read back by the host, and copies between types and layouts.

$ python -m speed.waits

Three looks: the share of each kind of operation in the time of a step of the model of medium size, on this processor;
copies in a step of SD v1.5 with the four real rewards, counted on tensors without contents, from which nothing can be
read back; reads in a whole training step of the miniature, by the line that asks.
"""

import tempfile
import traceback
from argparse import Namespace
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from speed.full_size import OPTIONS as FULL_SIZE
from speed.full_size import make_optimizer, parted_step
from speed.networks import build, full_size, middle_size
from textcraftor.errors import run_program
from textcraftor.models import SD_V1_CONFIGS, quiet_libraries
from textcraftor.options import make_parser
from textcraftor.precision import PRECISIONS
from textcraftor.sampling import make_scheduler
from textcraftor.training_options import parse_options
from train_textcraftor import check_inputs, set_up, train_step

KINDS = {
    "attention": "scaled_dot_product", "convolution": "conv", "matrix product": "mm", "norm": "norm",
    "copy": ("copy", "clone", "contiguous"),
}  # fmt: skip
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")


class Calls(TorchDispatchMode):
    """Counts operators whose name has one of `words`: by (name, key()), how often, and the bytes that they return."""

    def __init__(self, words, key=lambda: ""):
        super().__init__()
        self.words, self.key, self.counts, self.bytes = words, key, Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if any(word in name for word in self.words):
            place = name, self.key()
            self.counts[place] += 1
            self.bytes[place] += result.nbytes if isinstance(result, torch.Tensor) else 0
        return result


def main(argv=None):
    make_parser(__doc__, ()).parse_args(argv)
    quiet_libraries()
    scheduler = make_scheduler(DDIMScheduler.load_config(SD_V1_CONFIGS, subfolder="scheduler"), 25)
    args = make_parser(None, FULL_SIZE).parse_args(["--gradient_checkpointing", "none"])
    print("share of a step's time, medium size, fp32:")
    for kind, share in time_shares(Namespace(**vars(args) | {"mixed_precision": "no"}), scheduler).items():
        print(f"  {kind:<16}{100 * share:6.1f} %")
    print("copies in a step, full size, bf16:")
    for (name, _), (count, size) in copies(args, scheduler).items():
        print(f"  {name:<16}{count:>6}{size / 2**30:>8.2f} GiB")
    print("numbers read back in a training step of the miniature:")
    for (name, place), count in host_reads().most_common():
        print(f"  {count:>4} {name} {place}")


def time_shares(args, scheduler):
    """{kind of operation: share of the time}, all else last."""
    torch.manual_seed(0)
    networks = build(middle_size(), "text_encoder", torch.float32)
    for network in networks[1:4]:
        network.to(memory_format=torch.channels_last)
    optimizer, part = make_optimizer(args, networks), lambda name: nullcontext()
    parted_step(args, part, networks, scheduler, optimizer, "cpu")
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        parted_step(args, part, networks, scheduler, optimizer, "cpu")
    times = Counter()
    for event in measured.key_averages():
        words = {kind: (word,) if isinstance(word, str) else word for kind, word in KINDS.items()}
        kind = next((kind for kind, word in words.items() if any(w in event.key for w in word)), "all else")
        times[kind] += event.self_cpu_time_total
    return {kind: times[kind] / times.total() for kind in [*KINDS, "all else"]}


def copies(args, scheduler):
    """{(operator, ""): (how often, bytes)} in a step at full size."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        networks = build(full_size(), "text_encoder", PRECISIONS[args.mixed_precision])
        for weight in (*networks[2].parameters(), *networks[3].parameters()):
            if weight.ndim == 4:  # Module.to cannot change tensors without contents
                weight.data = weight.data.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(args, networks)
        with Calls(("_to_copy", "clone", "copy_")) as calls:
            parted_step(args, lambda name: nullcontext(), networks, scheduler, optimizer, "cpu")
    return {place: (count, calls.bytes[place]) for place, count in calls.counts.most_common()}


def host_reads():
    """Counter of (operator, file:line of the innermost caller that is no part of torch)."""

    def place():
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        frame = next(frame for frame in reversed(frames) if frame.filename != __file__)
        return f"{Path(frame.filename).name}:{frame.lineno}"

    with tempfile.TemporaryDirectory() as folder:
        options = ["--model", "miniature", "--mixed_precision", "no", "--batch-size", "2", "--val_count", "2"]
        args = parse_options([*options, "--output-path", f"{folder}/run"])
        run, *_ = set_up(args, check_inputs(args))
        train_step(run, 1, lambda: None)  # images are checked in the first
        with Calls(READS, place) as calls:
            train_step(run, 2, lambda: None)
    return calls.counts


if __name__ == "__main__":
    run_program(main)
