"""Where the reward still rises while the judge falls: five times longer, higher learning rate, without the CLIP term.

    python -m experiments.over_optimisation      trains four runs, then draws experiments/over_optimisation.png

Total, judge and diversity of held-out prompts over the updates, one seed. Total has the released script's weights in
every run, with CLIP and without, whatever was trained on. Diversity is the mean distance (root mean square over pixels)
between the pictures of one prompt from four noises, relative to the base's.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from experiments.runs import EVERY, UPDATES, changes, diversity, experiment, header, means, measure, train
from rewards import REWARDS
from rewards.clip import SCALE

LONGER = 5 * UPDATES
MEASURED = (EVERY, *range(UPDATES, LONGER + 1, UPDATES))
RUNS = {
    "default, 5 times longer": ("default",),
    "the same without CLIP": ("no_clip", "--clip", "0"),
    "learning rate × 5": ("lr_5e-4", "--lr_text", "5e-4"),
    "learning rate × 5, without CLIP": ("lr_5e-4_no_clip", "--lr_text", "5e-4", "--clip", "0"),
}
TITLES = {
    "total": "total reward", "without_clip": "total without its CLIP term", "diversity": "diversity (base = 1)",
    "right": "judge: right (%)", "clean": "judge: clean (%)", "right_and_clean": "judge: both (%)",
}  # fmt: skip


def main() -> None:
    looks = {}  # {run: {updates: {score: (N,)}}}
    for name, (folder, *flags) in RUNS.items():
        looks[name] = {0: look(None)}
        train(folder, *flags, updates=LONGER)
        for updates in MEASURED:
            looks[name][updates] = look(train(folder, *flags, updates=updates))
    draw(looks, Path("experiments/over_optimisation.png"))
    print(header("run", "updates", scores=TITLES))
    for name, run in looks.items():
        for updates in (0, UPDATES, LONGER):
            print(means(name, str(updates), look=run[updates], scores=TITLES))
    print(f"\nchange from update {UPDATES} to {LONGER}\n{header('run')}")
    for name, run in looks.items():
        print(changes(name, look=run[LONGER], before=run[UPDATES]))


def look(weights: Path | None) -> dict:
    """Scores of held-out prompts and the diversity of some of them, as a share of the base's."""
    scores, here, base = measure(weights), diversity(weights)["diversity"], diversity()["diversity"]
    weight, _ = REWARDS["clip"]
    without = scores["total"] - SCALE * weight * scores["clip"]
    return scores | {"without_clip": without, "diversity": here / base.mean()}


def draw(looks: dict, to: Path) -> None:
    """One panel a score, one line a run."""
    figure, panels = plt.subplots(2, 3, figsize=(13, 6), layout="constrained")
    for panel, (score, title) in zip(panels.flat, TITLES.items(), strict=True):
        scale = 100 if "%" in title else 1
        for name, run in looks.items():
            panel.plot(list(run), [scale * scores[score].mean() for scores in run.values()], marker=".", label=name)
        panel.set(xlabel="updates", title=title)
        panel.grid(alpha=0.25)
    panels[0][0].legend(fontsize=8)
    figure.savefig(to, dpi=90)


if __name__ == "__main__":
    experiment(main, __doc__)
