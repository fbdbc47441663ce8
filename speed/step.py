"""
Our training step against a plain one, on a model of medium size, timed alternately in one process.
$ python -m speed.step

The plain step does what the published training loop does: it computes in fp32, freezes nothing but the VAE, wraps the
whole UNet in one checkpoint per step with gradient, recomputes the rewards' text features each time, and keeps the
graphs of all four towers alive at once. The two gradients of the text encoder are compared in the same memory format.
"""

import contextlib
import copy
import time
from functools import partial

import torch
from diffusers import DDIMScheduler
from torch.utils.checkpoint import checkpoint

from rewards.base import normalize, preprocess
from rewards.sum import RewardSum
from speed.networks import LEARNING_RATE, WEIGHTS, LiveBytes, build, flop_counter, held, in_use, middle_size
from textcraftor.embeddings import embed_prompts, encode_prompts
from textcraftor.errors import run_program
from textcraftor.models import SD_V1_CONFIGS, clip_tokenizer, quiet_libraries
from textcraftor.options import make_parser, require
from textcraftor.sampling import decode, make_scheduler, predict_noise, prompt_noise, sample_last_k

T, K, GUIDANCE = 25, 5, 7.5

# fmt: off
OPTIONS = (
    ("--batch-size",       1,                        "images per step"),
    ("--rounds",           2,                        "timed steps of each kind, after an untimed warm-up"),
    ("--compile",          False,                    "also time our step with compiled transformer blocks"),
)
# fmt: on


def plain_step(networks, tokenizer, scheduler, prompts, noise, grad_steps):
    """The total reward (B,). Its backward pass computes gradients of all networks but the VAE, most of them unused."""
    original, tuned, unet, vae, rewards = networks

    def encode(encoder):
        rows = [encode_prompts(tokenizer, encoder, texts) for texts in ([""] * len(prompts), prompts)]
        return torch.cat([row["encoder_hidden_states"] for row in rows])

    with torch.no_grad():
        early = encode(original)
    late = encode(tuned)
    z = noise
    for index, t in enumerate(scheduler.timesteps):
        has_gradient = index >= len(scheduler.timesteps) - grad_steps
        with torch.set_grad_enabled(has_gradient):
            evaluate = unet if not has_gradient else lambda *inputs: checkpoint(unet, *inputs, use_reentrant=False)
            epsilon = evaluate(torch.cat([z, z]), t, late if has_gradient else early).sample
            unconditional, conditional = epsilon.chunk(2)
            z = scheduler.step(unconditional + GUIDANCE * (conditional - unconditional), t, z).prev_sample
    images = (vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    total = 0
    for reward in rewards:
        features = normalize(reward.encode_image(preprocess(images, reward.image_size)))
        if reward.name == "aesthetic":
            score = reward.head(features).squeeze(-1)
        else:
            with torch.no_grad():
                texts = normalize(reward.encode_text(reward.tokenize(prompts, reward.context_length)))
            score = (features * texts).sum(dim=-1) * getattr(reward, "logit_scale", 1)
        total = total + WEIGHTS[reward.name] * reward.scale * score
    return total


def our_step(networks, scheduler, prompts, noise, summed, low_precision, recompute):
    """The total reward (B,), computed as in train_textcraftor.py."""
    # The network that trains keeps fp32 weights and computes under autocast, as with accelerate.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if low_precision else contextlib.nullcontext():
        early, late = embed_prompts(networks, prompts)
    late = {name: value.float() for name, value in late.items()}
    z = sample_last_k(partial(predict_noise, networks.unet, GUIDANCE), scheduler, noise, early, late, K, recompute)
    return summed(decode(networks.vae, z), prompts)[0]


def main(argv=None):
    args = make_parser(__doc__, OPTIONS).parse_args(argv)
    require(args, {"batch_size rounds": 1})
    prompts = [f"a lighthouse on a cliff at dawn, number {index}" for index in range(args.batch_size)]
    noise = prompt_noise(0, range(args.batch_size), (4, 32, 32))
    quiet_libraries()
    tokenizer = clip_tokenizer()
    scheduler = make_scheduler(DDIMScheduler.load_config(SD_V1_CONFIGS, subfolder="scheduler"), T)

    torch.manual_seed(0)
    fp32 = build(middle_size(), "text_encoder", torch.float32)
    plain = copy.deepcopy(fp32)
    for network in (plain[1], plain[2], *plain[4]):
        network.requires_grad_()
    bf16 = copy.deepcopy(fp32)
    for network in (bf16[0], bf16[2], bf16[3], *(reward.tower for reward in bf16[4])):
        network.to(torch.bfloat16)

    def ours(networks, recompute, low_precision=False):
        networks[1].requires_grad_()
        for network in networks[1:4]:
            network.to(memory_format=torch.channels_last)
        summed = RewardSum([(reward, WEIGHTS[reward.name]) for reward in networks[4]])
        used = in_use(networks, tokenizer)
        return networks, lambda: our_step(used, scheduler, prompts, noise, summed, low_precision, recompute)

    contestants = {
        "plain": (plain, lambda: plain_step(plain, tokenizer, scheduler, prompts, noise, K)),
        "fp32, recomputed": ours(fp32, True),
        "fp32": ours(fp32, False),
        "bf16, recomputed": ours(bf16, True, True),
        "bf16": ours(bf16, False, True),
    }
    if args.compile:
        compiled = copy.deepcopy(bf16)
        torch._dynamo.config.recompile_limit = 64
        compiled[2].compile_repeated_blocks()
        contestants["bf16, compiled"] = ours(compiled, False, True)
    optimizers = {}
    for name, (networks, _) in contestants.items():
        optimizers[name] = torch.optim.AdamW(networks[1].parameters(), lr=LEARNING_RATE)

    def run(name):
        """One step without the update, so that all contestants keep the same weights; the gradients stay."""
        optimizers[name].zero_grad()
        (-contestants[name][1]().mean()).backward()

    gradients, seconds, flops, peaks = {}, {name: [] for name in contestants}, {}, {}
    for name, (networks, _) in contestants.items():
        run(name)  # warm-up; it also allocates the gradients that the plain step keeps
        with LiveBytes(held(networks)) as memory:
            run(name)
        with flop_counter() as counter:  # on its own, since it keeps tensors alive
            run(name)
        flops[name], peaks[name] = counter.get_total_flops(), memory.peak
        gradients[name] = torch.cat([parameter.grad.flatten() for parameter in networks[1].parameters()])
        if name != "plain":
            for parameter in networks[1].parameters():
                parameter.grad = None
    for _ in range(args.rounds):
        for name in contestants:
            began = time.perf_counter()
            run(name)
            seconds[name].append(time.perf_counter() - began)

    # Our networks are in channels-last format, which rounds differently: after 25 steps a few pixels are clamped that
    # were not before, or the reverse. So the reference is a plain step in that format.
    for network in plain[1:4]:
        network.to(memory_format=torch.channels_last)
    run("plain")
    reference = torch.cat([parameter.grad.flatten() for parameter in plain[1].parameters()])

    columns = ("", "seconds", "ratio", "TFLOP", "ratio", "peak GiB", "ratio", "difference", "cosine")
    print(f"{columns[0]:<18}" + "".join(f"{column:>12}" for column in columns[1:]))
    for name, gradient in gradients.items():
        least = {key: min(values) for key, values in seconds.items()}
        difference = ((gradient - reference).norm() / reference.norm()).item()
        cosine = torch.cosine_similarity(gradient.double(), reference.double(), dim=0).item()
        print(
            f"{name:<18}{least[name]:>12.2f}{least[name] / least['plain']:>12.3f}{flops[name] / 1e12:>12.3f}"
            f"{flops[name] / flops['plain']:>12.3f}{peaks[name] / 2**30:>12.2f}{peaks[name] / peaks['plain']:>12.3f}"
            f"{difference:>12.1e}{cosine:>12.5f}"
        )


if __name__ == "__main__":
    run_program(main)
