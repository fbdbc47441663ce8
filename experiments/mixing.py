"""Three encoders, each tuned for one reward, and the original, mixed on two axes, from the same noise (Figure 5).

    python -m experiments.mixing      draws experiments/mixing.png

The corners are the original encoder (top left) and those tuned for the aesthetic score, PickScore and HPS v2; between
them, a picture has the weights (1 - x)(1 - y), x(1 - y), (1 - x)y and xy. The prompts are the first held-out ones.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from experiments.over_optimisation import LONGER
from experiments.runs import evaluation, train
from experiments.table1 import ALONE
from textcraftor.mixing import Weighted
from textcraftor.models import latent_shape, make_networks
from textcraftor.options import TEST_STEPS, TEST_TUNED_STEPS
from textcraftor.sampling import make_images, make_scheduler, to_uint8
from textcraftor.validation import validation_noise

PROMPTS, ALONG = 3, 5  # prompts, and pictures along each axis


@torch.inference_mode()
def main() -> None:
    evaluate = evaluation()
    paths = [train(f"{name.replace(' ', '')}_clip", *flags, updates=LONGER) for name, flags in ALONE.items()]
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
            networks = make_networks(evaluate.model, mixed, tune_unconditional=False)
            settings = {"tuned_steps": TEST_TUNED_STEPS, "guidance": evaluate.guidance}
            row.append(to_uint8(make_images(networks, scheduler, evaluate.prompts[:PROMPTS], noise, **settings)))
        rows.append(torch.cat(row, dim=3))
    draw(torch.cat(rows, dim=2).permute(0, 2, 3, 1), evaluate.prompts[:PROMPTS], Path("experiments/mixing.png"))


def draw(pages: torch.Tensor, prompts: list[str], to: Path) -> None:
    """pages: (N, height, width, 3), the pictures of one prompt each."""
    figure, panels = plt.subplots(1, len(pages), figsize=(5 * len(pages), 5.4), layout="constrained")
    last = pages.shape[1] - 1
    for panel, page, prompt in zip(panels, pages, prompts, strict=True):
        panel.imshow(page, interpolation="lanczos")
        panel.set_title(prompt, fontsize=9)
        panel.set_xticks([0, last], ["original", "aesthetic"], ha="center")
        panel.set_yticks([0, last], ["original", "PickScore"], rotation=90, va="center")
        panel.annotate("HPS v2", (1, 0), (0, -6), xycoords="axes fraction", textcoords="offset points", va="top")
        panel.xaxis.tick_top()
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    figure.savefig(to, dpi=90)


if __name__ == "__main__":
    main()
