"""Three encoders, each tuned for one reward, and the original, mixed on two axes, from the same noise (Figure 5).

    python -m experiments.mixing      draws experiments/mixing.png

The corners are the original encoder (top left) and those tuned for the aesthetic score, PickScore and HPS v2 alone,
without the CLIP term; between them, a picture has the weights (1 - x)(1 - y), x(1 - y), (1 - x)y and xy. The prompts
are the first held-out ones.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from experiments.runs import evaluation, experiment
from experiments.table1 import ALONE, NO_CLIP, alone
from textcraftor.mixing import Weighted
from textcraftor.models import latent_shape, make_networks
from textcraftor.options import TEST_STEPS, TEST_TUNED_STEPS
from textcraftor.recorded import tunes_unconditional
from textcraftor.sampling import make_images, make_scheduler, to_uint8
from textcraftor.validation import validation_noise

PROMPTS, ALONG = 3, 5  # prompts, and pictures along each axis


@torch.inference_mode()
def main() -> None:
    evaluate = evaluation()
    paths = [alone(name, *NO_CLIP) for name in ALONE]
    encoders = [evaluate.encoder(str(path)) for path in paths]
    scheduler = make_scheduler(evaluate.model.scheduler_config, TEST_STEPS)
    noise = validation_noise(range(PROMPTS), latent_shape(evaluate.model))
    places = torch.linspace(0, 1, ALONG).tolist()
    rows = []
    for y in places:
        row = []
        for x in places:
            weights = (x * (1 - y), (1 - x) * y, x * y)
            mixed = [Weighted(encoder, weight) for encoder, weight in zip(encoders, weights, strict=True)]
            networks = make_networks(evaluate.model, mixed, tunes_unconditional([str(path) for path in paths]))
            settings = {"tuned_steps": TEST_TUNED_STEPS, "guidance": evaluate.guidance}
            row.append(to_uint8(make_images(networks, scheduler, evaluate.prompts[:PROMPTS], noise, **settings)))
        rows.append(torch.cat(row, dim=3))
    draw(torch.cat(rows, dim=2).permute(0, 2, 3, 1), evaluate.prompts[:PROMPTS], Path("experiments/mixing.png"))


def draw(pages: torch.Tensor, prompts: list[str], to: Path) -> None:
    """pages: (N, height, width, 3), the pictures of one prompt each."""
    figure, panels = plt.subplots(1, len(pages), figsize=(5 * len(pages), 6), layout="constrained")
    corners = {"original": (0, 1.01), "aesthetic": (1, 1.01), "PickScore": (0, -0.01), "HPS v2": (1, -0.01)}
    for panel, page, prompt in zip(panels, pages, prompts, strict=True):
        panel.imshow(page, interpolation="lanczos")
        panel.set_title(textwrap.fill(prompt, 48), fontsize=11, pad=24)
        panel.set_axis_off()
        for name, (x, y) in corners.items():
            sides = {"ha": "right" if x else "left", "va": "bottom" if y > 0 else "top"}
            panel.text(x, y, name, transform=panel.transAxes, fontsize=12, **sides)
    figure.savefig(to, dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    experiment(main, __doc__)
