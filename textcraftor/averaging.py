"""The moving average of the weights in training (--ema), which is what is validated and saved as the best."""

from contextlib import contextmanager

from diffusers.training_utils import EMAModel


def make_average(accelerator, weights, decay: float) -> EMAModel | None:
    """The average of `weights`, saved in checkpoints; None if decay is 0."""
    if not decay:
        return None
    average = EMAModel(weights, decay=decay)
    accelerator.register_for_checkpointing(average)
    return average


@contextmanager
def averaged(average: EMAModel | None, weights):
    """Inside, `weights` have the values of their moving average, if there is one."""
    if average:
        average.store(weights)
        average.copy_to(weights)
    try:
        yield
    finally:
        if average:
            average.restore(weights)
