"""Experiment trackers, through accelerate: scores, sample pictures, and one tracker run for one training run."""

import numpy as np


def start_trackers(accelerator, args, options, run_id, first_step):
    """Open the tracker that --report_to names; a resumed run continues in its tracker run, which `run_id` names."""
    new = first_step == 0
    how = {
        "wandb": {"id": run_id, "resume": "allow"},
        "tensorboard": {} if new else {"purge_step": first_step + 1},  # drops what the stopped run logged after it
    }
    config = {name: str(value) for name, value in options.items()} if new else None  # TensorBoard: one run each time
    accelerator.init_trackers(args.project_name, config, {name: how[name] for name in how if name == args.report_to})


def log_picture(accelerator, name, picture, step):
    """Log a PIL picture to the open trackers."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({name: [picture]}, step=step)
