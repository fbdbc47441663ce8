"""States of a run on disk, each written whole or not at all."""

import shutil
from pathlib import Path


def save_state(accelerator, folder, step):
    """Write all that continuing after `step` needs to folder/step_<step>, whole or not at all; drop the one before."""
    folder, unfinished = Path(folder), Path(folder) / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = list(folder.glob("step_*"))
        unfinished.rename(folder / f"step_{step:06d}")
        for state in older:
            shutil.rmtree(state)
    accelerator.wait_for_everyone()


def last_state(folder):
    """The newest whole state written by save_state and its step, or (None, 0)."""
    states = sorted(Path(folder).glob("step_*"), key=_step)
    return (states[-1], _step(states[-1])) if states else (None, 0)


def _step(state):
    return int(state.name.removeprefix("step_"))


def _step(state):
    return int(state.name.removeprefix("step_"))
