"""
What a training step of SD v1.5 with the four real reward models costs, at full size, with random weights.

Run on a GPU, or on a CPU with 24 GB and patience: seconds and FLOPs of each part of the step, and the peak memory:
$ python -m speed.full_size --batch-size 4 --steps 3

Count only: FLOPs and peak memory, in minutes on any machine, since tensors have shapes but no contents:
$ python -m speed.full_size --count
$ python -m speed.full_size --count --train unet --batch-size 2 --vae_checkpointing
$ python -m speed.full_size --count --train unet --batch-size 2 --lora_rank 16
$ python -m speed.full_size --count --plain --mixed_precision no

Count the memory of making and scoring images as test_parti.py does:
$ python -m speed.full_size --count --evaluate --batch-size 8
"""

import contextlib
import copy
import resource
import time
from collections import Counter
from functools import partial
from unittest import mock

import torch
from diffusers import DDIMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode

from rewards.base import normalize
from speed.networks import LEARNING_RATE, WEIGHTS, LiveBytes, build, flop_counter, full_size, held, in_use
from speed.step import plain_step
from textcraftor.bank import bank_stops
from textcraftor.embeddings import embed_prompts
from textcraftor.errors import UserError, run_program
from textcraftor.lora import add_lora
from textcraftor.models import SD_V1_CONFIGS, clip_tokenizer, quiet_libraries
from textcraftor.options import TEST_TUNED_STEPS, make_parser, require
from textcraftor.precision import PRECISIONS
from textcraftor.sampling import (
    decode,
    make_images,
    make_scheduler,
    predict_noise,
    prompt_noise,
    sample_one_prediction,
    sample_prefix,
    training_sampler,
)

GUIDANCE = 7.5
PROMPT = "a watercolour of a lighthouse on a cliff at dawn, soft light, highly detailed"

# fmt: off
OPTIONS = (
    ("--train",            ("text_encoder", "unet"), "network to train"),
    ("--lora_rank",        0,                        "as in training"),
    ("--batch-size",       1,                        "images per step"),
    ("--step",             25,                       "T, number of DDIM steps"),
    ("--gradient",         ("last_k", "drtune", "refl"), "as in training; refl: in the middle one of --driven"),
    ("--grad_steps",       5,                        "K, steps with gradient"),
    ("--driven",           15,                       "as in training"),
    ("--reuse",            1,                        "uses of a bank's entries, among which their cost is shared out"),
    ("--tune_unconditional", ("on", "off"),          "as in training"),
    ("--mixed_precision",  ("bf16", "fp16", "no"),   "as in training"),
    ("--gradient_checkpointing", ("full", "none"),   "as in training"),
    ("--vae_checkpointing", False,                   "as in training"),
    ("--compile",          False,                    "as in training"),
    ("--steps",            1,                        "training steps to run, each with a table of its own"),
    ("--count",            False,                    "count FLOPs and memory without running anything"),
    ("--plain",            False,                    "with --count --mixed_precision no: speed/step.py's plain step"),
    ("--evaluate",         False,                    "with --count: memory of making and scoring images instead"),
)
# fmt: on
PLAIN = {"train": "text_encoder", "lora_rank": 0, "gradient": "last_k", "reuse": 1, "tune_unconditional": "on"}
PLAIN |= {"mixed_precision": "no", "gradient_checkpointing": "full", "vae_checkpointing": False}  # all that it can


def main(argv=None):
    args = make_parser(__doc__, OPTIONS).parse_args(argv)
    require(args, {"batch_size step grad_steps driven reuse steps": 1})
    among = args.step if args.gradient == "last_k" else args.driven
    if not args.grad_steps <= among <= args.step:
        driven = "" if args.gradient == "last_k" else f" --driven {args.driven}"
        raise UserError(
            f"--grad_steps {args.grad_steps}{driven} --step {args.step}: expected grad_steps <= "
            f"{driven and 'driven <= '}step"
        )
    for name, only in PLAIN.items() if args.plain else ():
        if getattr(args, name) != only:
            raise UserError(f"--plain --{name} {getattr(args, name)}: the plain step has only --{name} {only}")
    for name in ("plain", "evaluate"):
        if getattr(args, name) and not args.count:
            raise UserError(f"--{name}: this can only be counted, not run; add --count")
    quiet_libraries()
    scheduler = make_scheduler(DDIMScheduler.load_config(SD_V1_CONFIGS, subfolder="scheduler"), args.step)
    if args.evaluate:
        return report_evaluation(args, scheduler)
    flops, peak = count(args, scheduler)
    if args.count:
        return report(args, flops, peak)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    torch.manual_seed(0)
    with torch.device(device):
        networks = build(full_size(), "" if args.lora_rank else args.train, PRECISIONS[args.mixed_precision])
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
    """Print a table: FLOPs of each part and, if it ran, its seconds and FLOPs per second."""
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
    """({part of a step: FLOPs}, peak memory in bytes), counted on fake tensors, which have shapes but no contents.

    The memory is that of a second step: from then on the optimizer has its state.
    """
    flops = Counter()

    @contextlib.contextmanager
    def part(name):
        with flop_counter() as counter:
            yield
        flops[name] += counter.get_total_flops() / (args.reuse if name == "first steps, no gradient" else 1)

    with FakeTensorMode(allow_non_fake_inputs=True):
        networks = build(full_size(), "" if args.lora_rank else args.train, PRECISIONS[args.mixed_precision])
        optimizer = make_optimizer(args, networks)
        step = plain if args.plain else parted_step
        step(args, part, networks, scheduler, optimizer, "cpu")
        with LiveBytes([held(networks), optimizer.state_dict()]) as memory:  # apart: the FLOP counter keeps tensors
            step(args, lambda name: contextlib.nullcontext(), networks, scheduler, optimizer, "cpu")
    return flops, memory.peak


def make_optimizer(args, networks):
    """AdamW for the network that args.train names, whose weights, or LoRA, require gradients from here on."""
    trained = networks[1 if args.train == "text_encoder" else 2].requires_grad_()
    if args.lora_rank:
        # peft would move the new weights to the device where they are, which tensors without contents refuse.
        with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
            add_lora(trained, args.train, args.lora_rank, args.lora_rank, seed=0)
    weights = [weight for weight in trained.parameters() if weight.requires_grad]
    return torch.optim.AdamW(weights, lr=LEARNING_RATE)


def plain(args, part, networks, scheduler, optimizer, device):
    """The plain step, as a single part. It computes gradients of the UNet and the towers, and never clears them."""
    for network in (networks[1], networks[2], *networks[4]):
        network.requires_grad_()
    prompts, noise = make_inputs(args)
    scheduler = steps_of(scheduler)
    with part("all of the plain step"):
        total = plain_step(networks, clip_tokenizer(), scheduler, prompts, noise, args.grad_steps)
        (-total.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_inputs(args, size=64):
    """B prompts and their noise (B, 4, size, size)."""
    indices = range(args.batch_size)
    return [f"{PROMPT}, number {index}" for index in indices], prompt_noise(0, indices, (4, size, size))


def way(args):
    """How a training step samples with these options -> (sampler, tuned_steps, steps before which it starts).

    refl predicts in the middle one of the driven steps, which costs as much as the average. A bank then has latents
    before all of them.
    """
    stops = bank_stops(args.gradient, args.step, args.grad_steps, args.driven)
    if args.gradient != "refl":
        sampler, tuned_steps = training_sampler(args.gradient, (args.grad_steps,) * 2, args.driven, seed=0, step=1)
        return sampler, tuned_steps, stops
    middle = args.driven // 2
    return partial(sample_one_prediction, index=middle), args.driven, stops if args.reuse > 1 else stops[middle:][:1]


def steps_of(scheduler):
    """A copy of the DDIM scheduler that also works with fake tensors.

    For these, times must be ints, and sample_last_k must not copy the scheduler again: DDIM keeps no state anyway.
    """
    scheduler = copy.copy(scheduler)
    scheduler.timesteps = scheduler.timesteps.tolist()
    scheduler.__deepcopy__ = lambda memo: scheduler
    return scheduler


def parted_step(args, part, networks, scheduler, optimizer, device):
    """One training step as in train_textcraftor.py, each part inside part(name), a context that times or counts it.

    Between parts the tensors are detached, and the gradient is handed from each part to the one before it.
    """
    _, tuned, unet, vae, rewards = networks
    tokenizer, scheduler = clip_tokenizer(), steps_of(scheduler)
    sampler, tuned_steps, stops = way(args)
    prompts, noise = make_inputs(args, unet.config.sample_size)
    noise = noise.to(device)

    def autocast(network):
        """Autocast for a network that trains: it keeps fp32 weights, as accelerate has it."""
        dtype = PRECISIONS[args.mixed_precision]
        enabled = any(weight.dtype != dtype for weight in network.parameters())
        return torch.autocast(device, dtype, enabled, cache_enabled=False) if enabled else contextlib.nullcontext()

    with part("prompt embeddings"):
        used = in_use(networks, tokenizer, args.tune_unconditional == "on")
        with autocast(tuned):
            early, late = embed_prompts(used, prompts)
    (late,) = late.values()
    late_leaf = late.detach().requires_grad_(late.requires_grad)
    predict = partial(predict_noise, unet, GUIDANCE, split=args.tune_unconditional == "off")
    tuned_conditions = {"encoder_hidden_states": late_leaf}
    with part("first steps, no gradient"), autocast(unet), torch.no_grad():
        latents = sample_prefix(predict, scheduler, noise, early, stops)
    place = getattr(sampler, "keywords", {}).get("index", 0) if len(stops) > 1 else 0
    with part("last steps"), autocast(unet):
        recompute = args.gradient_checkpointing == "full"
        z = sampler(
            predict, scheduler, latents[:, place], early, tuned_conditions, tuned_steps, recompute, start=stops[place]
        )
    z_leaf = z.detach().requires_grad_()
    with part("VAE"):
        images = decode(vae, z_leaf, args.vae_checkpointing)
    images_leaf, terms = images.detach().requires_grad_(), {}
    for reward in rewards:
        with part("rewards' texts"):
            texts = text_features(reward, prompts, device)
        with part(reward.name):
            terms[reward.name] = -WEIGHTS[reward.name] * reward.scale * score(reward, images_leaf, texts).mean()
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


# What Reward.forward does, without its checks: they read values, which fake tensors do not have.


@torch.no_grad()
def text_features(reward, prompts, device):
    """Unit text features (B, D); None for the aesthetic reward, which reads no prompts."""
    if reward.name == "aesthetic":
        return None
    return normalize(reward.encode_text(reward.tokenize(prompts, reward.context_length).to(device)))


def score(reward, images, texts):
    """Unscaled rewards (B,) of images (B, 3, H, W) with the text features `texts`."""
    features = reward.image_features(images)
    if reward.name == "aesthetic":
        return reward.score(features, [])
    return (features * texts).sum(dim=-1) * getattr(reward, "logit_scale", 1)  # only PickScore has one


def evaluation(args, part, networks, scheduler, device):
    """Make and score a batch of images as in textcraftor/benchmark, in two parts as in parted_step."""
    prompts, noise = make_inputs(args)
    scheduler = steps_of(scheduler)
    with torch.no_grad():
        with part("making"):
            used = in_use(networks, clip_tokenizer())
            images = make_images(
                used, scheduler, prompts, noise, tuned_steps=min(args.step, TEST_TUNED_STEPS), guidance=GUIDANCE
            )
        with part("scoring"):
            for reward in networks[4]:
                score(reward, images, text_features(reward, prompts, device))


def report_evaluation(args, scheduler):
    """Count and print the memory that making and scoring a batch of images takes on a GPU.

    Text encoders, UNet and VAE are in --mixed_precision, the four reward towers in fp32. One batch is made while the
    one before is scored, so that both may need their most memory at once.
    """
    peaks = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        networks = build(full_size(), "", PRECISIONS[args.mixed_precision], torch.float32)
        with LiveBytes(held(networks)) as memory:
            weights = memory.live

            @contextlib.contextmanager
            def part(name):
                memory.peak = memory.live
                yield
                peaks[name] = memory.peak - weights

            evaluation(args, part, networks, scheduler, "cpu")
    gib = {name: number / 2**30 for name, number in {"weights": weights, **peaks}.items()}
    print(
        f"{args.batch_size} images in {args.mixed_precision}, scored in fp32: {gib['weights']:.1f} GiB of weights, "
        f"at most {gib['making']:.1f} GiB more to make images and {gib['scoring']:.1f} GiB more to score them, "
        f"together {sum(gib.values()):.1f} GiB"
    )


if __name__ == "__main__":
    run_program(main)
