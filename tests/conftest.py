"""Fixtures shared by all tests; nothing here touches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: results must not depend on the machine

import pytest
import tiny
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its settings for the life of a process."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def rewards_root(tmp_path_factory):
    """A folder with tiny weights of all four rewards; not to be written to."""
    return tiny.make_rewards(tmp_path_factory.mktemp("rewards"))


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory):
    """A tiny diffusers folder in SD v1.5's format; not to be written to."""
    return tiny.make_stable_diffusion(tmp_path_factory.mktemp("stable-diffusion"))
