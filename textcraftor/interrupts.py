"""Ctrl-C and SIGTERM as a request to stop that training answers at its next safe point."""

import contextlib
import signal

import torch


class Stopped(Exception):
    """A signal asked this run, on any of its processes, to stop."""


@contextlib.contextmanager
def stop_signals():
    """Give a list that SIGINT and SIGTERM append to instead of ending the process; a second one ends it as usual."""
    received = []

    def note(number, frame):
        received.append(number)
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
