"""The endless seeded stream of prompts and noise that training draws from."""

import functools

import numpy as np
from torch.utils.data import Dataset

from textcraftor.sampling import prompt_noise


class PromptStream(Dataset):
    """Sample n of training for every n ≥ 0: a prompt, all of them in a fresh seeded order each epoch, and its noise.

    Depends on (prompts, seed, n) alone: neither batch size, processes, workers nor a resume changes a sample.
    """

    def __init__(self, prompts, seed, shape):
        self.prompts, self.seed, self.shape = prompts, seed, shape

    def __getitem__(self, n):
        epoch, position = divmod(n, len(self.prompts))
        prompt = self.prompts[_order(len(self.prompts), self.seed, epoch)[position]]
        return {"prompt": prompt, "noise": prompt_noise(self.seed, [n], self.shape)[0]}


@functools.lru_cache(maxsize=2)
def _order(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


def batches(first_step, last_step, batch_size, rank, processes):
    """Sample numbers of process `rank` in each step first_step … last_step − 1: its slice of the global batch."""
    for step in range(first_step, last_step):
        start = (step * processes + rank) * batch_size
        yield list(range(start, start + batch_size))
