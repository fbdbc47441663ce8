"""What the processes of one run do together."""

import torch

BUCKET = 16  # gradients that travel as one: of SD v1.5's text encoder and UNet at most 200 MB


def average_gradients(accelerator, parameters):
    """Replace the gradients of `parameters`, in place, by their means over all processes."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    for start in range(0, len(gradients), BUCKET):
        bucket = gradients[start : start + BUCKET]
        means = accelerator.reduce(torch.cat([gradient.flatten() for gradient in bucket]), reduction="mean")
        for gradient, mean in zip(bucket, means.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))
