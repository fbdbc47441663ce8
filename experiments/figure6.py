"""Figure 6 on the miniature: each reward alone, without and with the CLIP term, five times longer; one seed.

    python -m experiments.figure6      trains six runs, prints a table, draws experiments/figure6.png

The picture has the first held-out prompts as each run draws them, from the same noise.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from experiments.over_optimisation import LONGER, look
from experiments.runs import UPDATES, evaluation, header, means, train
from experiments.table1 import ALONE
from textcraftor.sampling import to_uint8

NO_CLIP = ("--clip", "0")
SCORES = ("clip", "aesthetic", "pickscore", "hpsv2", "right", "clean", "right_and_clean", "diversity")
SHOWN = 8  # prompts


def main() -> None:
    shown = {"original": None}
    print(header("trained on", "updates", scores=SCORES))
    print(means("original", "", look=look(None), scores=SCORES))
    for clip, more in (("_no_clip", NO_CLIP), ("_clip", ())):
        for name, flags in ALONE.items():
            label = f"{name} {'without' if more else 'with'} CLIP"
            for updates in (UPDATES, LONGER):
                weights = train(name.replace(" ", "") + clip, *flags, *more, updates=updates)
                print(means(label, str(updates), look=look(weights), scores=SCORES), flush=True)
            shown[label] = weights
    draw(shown, Path("experiments/figure6.png"))


def draw(shown: dict[str, Path | None], to: Path) -> None:
    """One row of pictures for each run."""
    prompts, indices = evaluation().prompts[:SHOWN], range(SHOWN)
    rows = [evaluation().sampler(tuned=path and str(path))(prompts, indices) for path in shown.values()]
    page = torch.cat([torch.cat([*row], dim=2) for row in to_uint8(torch.stack(rows))], dim=1).permute(1, 2, 0)
    height = rows[0].shape[2]
    figure, panel = plt.subplots(figsize=(11, 1.25 * len(shown)), layout="constrained")
    panel.imshow(page, interpolation="lanczos")
    panel.set_yticks([height * (number + 0.5) for number in range(len(shown))], list(shown), fontsize=11)
    panel.set_xticks([])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    figure.savefig(to, dpi=90)


if __name__ == "__main__":
    main()
