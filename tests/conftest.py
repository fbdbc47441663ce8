"""Fixtures shared by all tests; nothing here touches the network."""

import copy
import os
import sys

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported


def pytest_configure(config):
    """Hide the GPU, so that results do not depend on the machine, unless only the tests that need one are selected.

    torch must not be imported before this, which is why nothing below imports it at the top. Where several workers run
    tests side by side, each has one core.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its settings for the life of a process; every test starts without any."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def rewards_root(tmp_path_factory):
    """A folder with tiny weights of all four rewards; read-only by agreement."""
    import tiny

    return tiny.make_rewards(tmp_path_factory.mktemp("rewards"))


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory):
    """A tiny diffusers folder in SD v1.5's format; read-only by agreement."""
    import tiny

    return tiny.make_stable_diffusion(tmp_path_factory.mktemp("stable-diffusion"))


@pytest.fixture(scope="session")
def double_model(stable_diffusion):
    """tokenizer, original encoder, a tuned one a little away from it, unet, vae, scheduler config: all float64."""
    import torch

    from textcraftor.models import load_model

    tokenizer, original, unet, vae, config = load_model(str(stable_diffusion))
    tuned = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(0)
    for weight in tuned.parameters():
        weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return tokenizer, original.double(), tuned.double(), unet.double(), vae.double(), config
