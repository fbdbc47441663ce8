"""Figure 6 on the miniature: each reward alone, without and with the CLIP term, five times longer; one seed.

    python -m experiments.figure6      trains six runs, prints a table, draws experiments/figure6.png

The picture has the first held-out prompts as each run draws them, from the same noise.
"""

from pathlib import Path

from experiments.over_optimisation import LONGER, look
from experiments.runs import UPDATES, draw, experiment, header, means
from experiments.table1 import ALONE, NO_CLIP, alone

SCORES = ("clip", "aesthetic", "pickscore", "hpsv2", "right", "clean", "right_and_clean", "diversity")


def main() -> None:
    shown = {"original": {}}
    print(header("trained on", "updates", scores=SCORES))
    print(means("original", "", look=look(None), scores=SCORES))
    for more in (NO_CLIP, ()):
        for name in ALONE:
            label = f"{name} {'without' if more else 'with'} CLIP"
            for updates in (UPDATES, LONGER):
                weights = alone(name, *more, updates=updates)
                print(means(label, str(updates), look=look(weights), scores=SCORES), flush=True)
            shown[label] = {"tuned": str(weights)}
    draw(shown, Path("experiments/figure6.png"))


if __name__ == "__main__":
    experiment(main, __doc__)
