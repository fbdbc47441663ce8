"""Ctrl-C and SIGTERM as a wish to stop that the training loop answers between two steps."""

import contextlib
import signal


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
