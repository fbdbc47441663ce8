"""Where the reward still rises while the judge falls: five times longer, higher learning rate, without the CLIP term.

    python -m experiments.over_optimisation      trains four runs, then draws experiments/over_optimisation.png

Total, judge and diversity of held-out prompts over the updates, one seed. Total is that of the default weights in every
run, the CLIP term's too where it was not trained on. Diversity is the mean distance (root mean square over pixels)
between the pictures of one prompt from four noises, relative to the base's.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from experiments.runs import EVERY, UPDATES, diversity, header, means, measure, train

LONGER = 5 * UPDATES
MEASURED = (EVERY, UPDATES, 80, 120, 160, LONGER)
RUNS = {
    "default, 5 times longer": ("default",),
    "the same without CLIP": ("no_clip", "--clip", "0"),
    "learning rate × 5": ("lr_5e-4", "--lr_text", "5e-4"),
    "learning rate × 5, without CLIP": ("lr_5e-4_no_clip", "--lr_text", "5e-4", "--clip", "0"),
}
SCORES = ("total", "right", "clean", "right_and_clean", "diversity")


def main() -> None:
    looks = {}  # {run: {updates: {score: (N,)}}}
    for name, (folder, *flags) in RUNS.items():
        looks[name] = {0: look(None)}
        for updates in MEASURED:
            train(folder, *flags, updates=LONGER)
            looks[name][updates] = look(train(folder, *flags, updates=updates))
    draw(looks, Path("experiments/over_optimisation.png"))
    print(header("run", "updates", scores=SCORES))
    for name, run in looks.items():
        for updates in (0, UPDATES, LONGER):
            print(means(name, str(updates), look=run[updates], scores=SCORES))


def look(weights: Path | None) -> dict:
    """Scores of held-out prompts and the diversity of some of them, as a share of the base's."""
    here, base = diversity(weights)["diversity"], diversity()["diversity"]
    return measure(weights) | {"diversity": here / base.mean()}


def draw(looks: dict, to: Path) -> None:
    """One panel a score, one line a run."""
    figure, panels = plt.subplots(1, len(SCORES), figsize=(4 * len(SCORES), 3.6), layout="constrained")
    titles = {"total": "total reward", "diversity": "diversity (base = 1)", "right_and_clean": "judge: both (%)"}
    for panel, score in zip(panels, SCORES, strict=True):
        scale = 1 if score in ("total", "diversity") else 100
        for name, run in looks.items():
            panel.plot(list(run), [scale * scores[score].mean() for scores in run.values()], marker=".", label=name)
        panel.set(xlabel="updates", title=titles.get(score, f"judge: {score} (%)"))
    panels[0].legend(fontsize=8)
    figure.savefig(to, dpi=90)


if __name__ == "__main__":
    main()
