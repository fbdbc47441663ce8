"""
What a training step of SD v1.5 with the four real reward models costs, at their full sizes, with random weights.

Run, on the device there is (a GPU, or a CPU with 24 GB and some patience): seconds and FLOPs by part, peak memory:
$ python -m speed.full_size --batch-size 4 --steps 3

Counted, not run: FLOPs and peak memory, on any machine, in minutes:
$ python -m speed.full_size --count
$ python -m speed.full_size --count --train unet --batch-size 2 --vae_checkpointing
$ python -m speed.full_size --count --plain --mixed_precision no
"""

import contextlib
import copy
import resource
import time
from collections import Counter
from functools import partial

import torch
from diffusers import DDIMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from rewards.base import normalize
from speed.networks import DTYPES, LEARNING_RATE, WEIGHTS, LiveBytes, build, full_size, held, in_use
from speed.step import plain_step
from textcraftor.embeddings import embed_prompts
from textcraftor.errors import UserError, run_program
from textcraftor.models import SD_V1_CONFIGS, clip_tokenizer, quiet_libraries
from textcraftor.options import make_parser, require
from textcraftor.sampling import decode, make_scheduler, predict_noise, prompt_noise, sample_last_k

GUIDANCE = 7.5
PROMPT = "a watercolour of a lighthouse on a cliff at dawn, soft light, highly detailed"

# fmt: off
OPTIONS = (
    ("--train",            ("text_encoder", "unet"), "what trains"),
    ("--batch-size",       1,                        "images a step"),
    ("--step",             25,                       "T, DDIM steps"),
    ("--grad_steps",       5,                        "K, those with gradient"),
    ("--mixed_precision",  ("bf16", "fp16", "no"),   "as in training"),
    ("--gradient_checkpointing", ("full", "none"),   "as in training"),
    ("--vae_checkpointing", False,                   "as in training"),
    ("--compile",          False,                    "as in training"),
    ("--steps",            1,                        "steps to run, each of which is reported"),
    ("--count",            False,                    "run nothing: count, on tensors without contents"),
    ("--plain",            False,                    "with --count: the plain step of speed/step.py instead"),
)
# fmt: on


def main(argv=None):
    args = make_parser(__doc__, OPTIONS).parse_args(argv)
    require(args, {"batch_size step grad_steps steps": 1})
    if args.grad_steps > args.step:
        raise UserError(f"--grad_steps {args.grad_steps} --step {args.step}: grad_steps <= step")
    quiet_libraries()
    scheduler = make_scheduler(DDIMScheduler.load_config(SD_V1_CONFIGS, subfolder="scheduler"), args.step)
    flops, peak = count(args, scheduler)
    if args.count:
        return report(args, flops, peak)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    torch.manual_seed(0)
    with torch.device(device):
        networks = build(full_size(), args.train, DTYPES[args.mixed_precision])
    for network in networks[1:4]:
        network.to(memory_format=torch.channels_last)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64
        networks[2].compile_repeated_blocks()
    torch.backends.cuda.matmul.allow_tf32 = True
    optimizer = make_optimizer(args, networks)
    print(f"built on {device} in {time.perf_counter() - began:.0f} s")
    for _ in range(args.steps):
        seconds = Counter()

        @contextlib.contextmanager
        def part(name, seconds=seconds):
            began = time.perf_counter()
            yield
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name] += time.perf_counter() - began
            print(f"{name}: {seconds[name]:.1f} s", flush=True)

        parted_step(args, part, networks, scheduler, optimizer, device)
        report(args, flops, peak, seconds)
    if device == "cuda":
        print(f"peak memory of the GPU's tensors: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    else:
        print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def report(args, flops, peak, seconds=None):
    """A table on the screen: FLOPs of every part, and seconds and FLOPs a second if it ran."""
    print(f"{'part':<32}{'TFLOP':>10}" + f"{'seconds':>12}{'TFLOP/s':>12}" * (seconds is not None))
    rows = {**flops, "all": sum(flops.values())}
    seconds = seconds and {**seconds, "all": sum(seconds.values())}
    for name, number in rows.items():
        line = f"{name:<32}{number / 1e12:>10.3f}"
        print(line + (f"{seconds[name]:>12.2f}{number / 1e12 / seconds[name]:>12.3f}" if seconds else ""))
    print(
        f"{args.batch_size} images, {args.train} in training, {args.mixed_precision}, --gradient_checkpointing "
        f"{args.gradient_checkpointing}{' --vae_checkpointing' * args.vae_checkpointing}: "
        f"at most {peak / 2**30:.1f} GiB of tensors alive"
    )


def count(args, scheduler):
    """FLOPs of each part of a step {name: number}, and the most bytes alive in the next: the optimizer's state is there
    from its start. Runs on fake tensors, which have shapes and no contents."""
    flops = Counter()

    @contextlib.contextmanager
    def part(name):
        with FlopCounterMode(display=False) as counter:
            yield
        flops[name] += counter.get_total_flops()

    with FakeTensorMode(allow_non_fake_inputs=True):
        networks = build(full_size(), args.train, DTYPES[args.mixed_precision])
        optimizer = make_optimizer(args, networks)
        step = plain if args.plain else parted_step
        step(args, part, networks, scheduler, optimizer, "cpu")
        with LiveBytes([held(networks), optimizer.state_dict()]) as memory:  # not while the other counts
            step(args, lambda name: contextlib.nullcontext(), networks, scheduler, optimizer, "cpu")
    return flops, memory.peak


def make_optimizer(args, networks):
    """AdamW of what trains, which has gradients from here on."""
    trained = networks[1] if args.train == "text_encoder" else networks[2]
    return torch.optim.AdamW(trained.requires_grad_().parameters(), lr=LEARNING_RATE)


def plain(args, part, networks, scheduler, optimizer, device):
    """The plain step in one part: gradients of the UNet and the towers are never used, and never cleared."""
    for network in (networks[1], networks[2], *networks[4]):
        network.requires_grad_()
    prompts, noise = make_inputs(args)
    scheduler = copy.copy(scheduler)
    scheduler.timesteps = scheduler.timesteps.tolist()
    with part("all of the plain step"):
        total = plain_step(networks, clip_tokenizer(), scheduler, prompts, noise)
        (-total.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_inputs(args):
    """B prompts and their noise (B, 4, 64, 64)."""
    indices = range(args.batch_size)
    return [f"{PROMPT}, number {index}" for index in indices], prompt_noise(0, indices, (4, 64, 64))


def parted_step(args, part, networks, scheduler, optimizer, device):
    """One training step as train_textcraftor.py makes it, each part within part(name), which may time or count it.

    The gradient is carried by hand from part to part, as autograd would: every boundary is a leaf of its own.
    """
    _, tuned, unet, vae, rewards = networks
    tokenizer = clip_tokenizer()
    first, last = copy.copy(scheduler), copy.copy(scheduler)
    times = scheduler.timesteps.tolist()
    first.timesteps, last.timesteps = times[: -args.grad_steps], times[-args.grad_steps :]
    prompts, noise = make_inputs(args)
    noise = noise.to(device)

    def autocast(network):
        """What trains keeps fp32 weights under autocast, as accelerate does it."""
        dtype, enabled = DTYPES[args.mixed_precision], network.dtype != DTYPES[args.mixed_precision]
        return torch.autocast(device, dtype, enabled, cache_enabled=False) if enabled else contextlib.nullcontext()

    with part("prompt embeddings"):
        used = in_use(networks, tokenizer)
        with autocast(tuned):
            early, late = embed_prompts(used, prompts)
    (late,) = late.values()
    late_leaf = late.detach().requires_grad_(late.requires_grad)
    predict, tuned_conditions = partial(predict_noise, unet, GUIDANCE), {"encoder_hidden_states": late_leaf}
    with part("first steps, no gradient"), autocast(unet):
        z = sample_last_k(predict, first, noise, early, early, 0)
    with part("last steps"), autocast(unet):
        recompute = args.gradient_checkpointing == "full"
        z = sample_last_k(predict, last, z, early, tuned_conditions, args.grad_steps, recompute)
    z_leaf = z.detach().requires_grad_()
    with part("VAE"):
        images = decode(vae, z_leaf, args.vae_checkpointing)
    images_leaf, terms = images.detach().requires_grad_(), {}
    for reward in rewards:
        # What RewardSum does, less its checks: they read values, which fake tensors do not have.
        if reward.name != "aesthetic":
            with part("rewards' texts"), torch.no_grad():
                texts = normalize(reward.encode_text(reward.tokenize(prompts, reward.context_length).to(device)))
        with part(reward.name):
            features = reward.image_features(images_leaf)
            score = reward.score(features, prompts) if reward.name == "aesthetic" else (features * texts).sum(dim=-1)
            score = score * getattr(reward, "logit_scale", 1)  # PickScore's
            terms[reward.name] = -WEIGHTS[reward.name] * reward.scale * score.mean()
    for name in list(terms):
        with part(f"{name}'s backward"):
            terms.pop(name).backward()
    with part("VAE's backward"):
        images.backward(images_leaf.grad)
    del images, images_leaf
    with part("last steps' backward"):
        z.backward(z_leaf.grad)
    with part("prompt embeddings' backward"):
        if late.requires_grad:
            late.backward(late_leaf.grad)
    with part("optimizer"):
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    run_program(main)
