"""The benchmarks of the training step measure the same step, and count its FLOPs and memory right."""

import contextlib
from argparse import Namespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode

from rewards.sum import RewardSum
from speed import full_size, step
from speed.networks import WEIGHTS, LiveBytes, build, flop_counter, in_use, middle_size
from textcraftor.models import SD_V1_CONFIGS, clip_tokenizer
from textcraftor.sampling import make_scheduler

T, K = 4, 2


def tiny_size():
    configs = middle_size()
    configs["text_encoder"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    configs["text_encoder"] |= {"num_attention_heads": 2}
    configs["unet"] |= {"block_out_channels": (16, 16, 32, 32), "cross_attention_dim": 32, "attention_head_dim": 2}
    configs["vae"] |= {"block_out_channels": (8, 8, 8, 8)}
    for name in ("clip", "aesthetic", "hpsv2"):
        configs[name]["vision_cfg"] |= {"layers": 2, "width": 64}
        configs[name]["text_cfg"] |= {"layers": 1}
    configs["pickscore"]["text_config"] |= {"num_hidden_layers": 1}
    configs["pickscore"]["vision_config"] |= {"num_hidden_layers": 2}
    return configs


@pytest.fixture(scope="module")
def networks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(tiny_size(), "text_encoder", torch.float32)


def test_one_gradient_three_ways(networks, monkeypatch):
    monkeypatch.setattr(step, "K", K)
    args = Namespace(
        batch_size=2, grad_steps=K, gradient_checkpointing="full", vae_checkpointing=True, mixed_precision="no",
        train="text_encoder", gradient="last_k", driven=15, reuse=1, tune_unconditional="on", step=T,
    )  # fmt: skip
    scheduler = make_scheduler(DDIMScheduler.load_config(SD_V1_CONFIGS, subfolder="scheduler"), T)
    tuned, rewards, tokenizer = networks[1].requires_grad_(), networks[4], clip_tokenizer()
    prompts, noise = full_size.make_inputs(args)
    noise = noise[..., :16, :16]
    monkeypatch.setattr(full_size, "make_inputs", lambda *_: (prompts, noise))
    kept = Namespace(step=lambda: None, zero_grad=lambda: None)

    def gradient():
        found = torch.cat([parameter.grad.flatten() for parameter in tuned.parameters()])
        tuned.zero_grad()
        return found

    full_size.parted_step(args, lambda name: contextlib.nullcontext(), networks, scheduler, kept, "cpu")
    parted = gradient()
    summed = RewardSum([(reward, WEIGHTS[reward.name]) for reward in rewards])
    used = in_use(networks, tokenizer)
    (-step.our_step(used, scheduler, prompts, noise, summed, False, False).mean()).backward()
    ours = gradient()
    (-step.plain_step(networks, tokenizer, scheduler, prompts, noise, K).mean()).backward()
    plain = gradient()
    assert plain.norm() > 0
    assert (parted - plain).norm() <= 1e-4 * plain.norm()
    assert (ours - plain).norm() <= 1e-4 * plain.norm()


def test_live_bytes_are_those_of_all_tensors():
    """Of a layer by hand: weights 1,001,000 floats, input 500,000, output 500,000 before and after the activation."""
    with FakeTensorMode():
        layer = torch.nn.Linear(1000, 1000)
        with LiveBytes(layer.state_dict()) as memory:
            inputs = torch.randn(500, 1000, requires_grad=True)
            output = layer(inputs).relu()
            assert memory.live == 4 * (1_001_000 + 500_000 + 500_000)  # the one before is not kept
            assert memory.peak == memory.live + 4 * 500_000
            output.sum().backward()
            assert memory.live >= 4 * (2 * 1_001_000 + 3 * 500_000)  # with gradients
            del output
        assert memory.peak >= memory.live + 4 * 500_000


def test_full_size_counts_without_running(monkeypatch, capsys):
    """Training and evaluation on fake tensors: every step has as many FLOPs, weights as many bytes as they hold."""
    monkeypatch.setattr(full_size, "full_size", tiny_size)
    args = full_size.make_parser("", full_size.OPTIONS).parse_args(["--step", "2", "--grad_steps", "1"])
    config = DDIMScheduler.load_config(SD_V1_CONFIGS, subfolder="scheduler")
    flops, peak = full_size.count(args, make_scheduler(config, args.step))
    one = flops["first steps, no gradient"]
    assert one == flops["last steps"] > 0
    assert 2e6 < peak < 1e9
    # refl in the middle one of the last 3 of 4 steps: after 2 steps, or all 3 before the last, shared by 2 uses.
    for reuse, evaluations in ((1, 2), (2, 1.5)):
        args = ["--step", "4", "--gradient", "refl", "--grad_steps", "1", "--driven", "3", "--reuse", str(reuse)]
        args = full_size.make_parser("", full_size.OPTIONS).parse_args([*args, "--tune_unconditional", "off"])
        refl, _ = full_size.count(args, make_scheduler(config, args.step))
        assert refl["first steps, no gradient"] == evaluations * one
        assert refl["last steps"] == one  # its two branches apart
        # Recomputed whole, but with a backward pass through the conditional half alone.
        assert refl["last steps' backward"] == pytest.approx(one + (flops["last steps' backward"] - one) / 2, rel=0.01)
    full_size.main(["--count", "--evaluate", "--step", "1", "--grad_steps", "1"])
    with FakeTensorMode():
        networks = build(tiny_size(), "", torch.bfloat16, torch.float32)
    weights = sum(p.nbytes for part in (*networks[:4], *networks[4]) for p in part.parameters()) / 2**30
    assert f"scored in fp32: {weights:.1f} GiB of weights, at most" in capsys.readouterr().out


def test_attention_on_the_cpu_is_counted():
    """Two products of 2 * 128 * 128 * 64 FLOPs a head forward, five backward, one of which computes scores again."""
    with FakeTensorMode():
        q = torch.randn(2, 4, 128, 64, requires_grad=True)
        with flop_counter() as forward:
            output = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        with flop_counter() as backward:
            output.sum().backward()
    product = 8 * 2 * 128 * 128 * 64
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * product, 5 * product)
