"""Where the reward still rises while the judge falls: five times longer, higher learning rate, without the CLIP term.

    python -m experiments.over_optimisation      trains four runs, then draws experiments/over_optimisation.png

Total, judge and diversity of 64 held-out prompts over the steps. Total is that of the default weights in every run, the
CLIP term's too where it was not trained on. Diversity is the mean distance (root mean square over pixels) between the
pictures of one prompt from four noises, relative to the base's.
"""

import csv
import json
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from experiments.default_run import FOLDER, train
from miniature.evaluate import Evaluation
from miniature.measure import HERE, make
from textcraftor.prompts import read_prompts

STEPS = 5 * json.loads((HERE / "defaults.json").read_text())["max_steps"]
EVERY, NOISES = STEPS // 10, 4
RUNS = {
    "default, 5 times longer": (),
    "the same without CLIP": ("--clip", "0"),
    "learning rate × 5": ("--lr_text", "5e-4"),
    "learning rate × 5, without CLIP": ("--lr_text", "5e-4", "--clip", "0"),
}
SCORES = ("total", "right", "clean", "right_and_clean", "diversity")


def diversity(evaluate: Evaluation, prompts: list[str], tuned=None) -> float:
    """Mean distance between pictures of one prompt, over prompts and pairs of noises."""
    shots = [
        make(evaluate.model, prompts, [1000 * k + i for i in range(len(prompts))], evaluate.guidance, tuned)
        for k in range(NOISES)
    ]
    pairs = [(a - b).square().mean((1, 2, 3)).sqrt() for a, b in combinations(shots, 2)]
    return torch.stack(pairs).mean().item()


def main() -> None:
    prompts = read_prompts(str(HERE / "heldout.csv"))[0][:64]
    guidance = json.loads((HERE / "defaults.json").read_text())["guidance"]
    evaluate = Evaluation(prompts, 0, guidance)

    def measure(path: Path | None) -> dict[str, float]:
        scores, _ = evaluate(tuned=str(path), steps=15) if path else evaluate(steps=0)
        encoder = evaluate.encoder(str(path)) if path else None
        means = {name: scores[name].mean().item() for name in SCORES[:-1]}
        return means | {"diversity": diversity(evaluate, prompts[:16], encoder)}

    base, rows = measure(None), []
    for name, flags in RUNS.items():
        flags = ("--max_steps", str(STEPS), "--save_every", str(EVERY), "--keep_checkpoints", "0", *flags)
        folder = train(name.replace(" ", "_").replace("×", "x").replace(",", ""), *flags)
        rows.append({"run": name, "step": 0, **base})
        for path in sorted(folder.glob("tc_text_e_*_iter_*.safetensors"), key=step_of):
            rows.append({"run": name, "step": step_of(path), **measure(path)})
            print(rows[-1], flush=True)
    with open(FOLDER / "over_optimisation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, Path("experiments/over_optimisation.png"))


def step_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def draw(rows: list[dict], to: Path) -> None:
    """One panel a score, one line a run; diversity relative to the base's."""
    figure, panels = plt.subplots(1, len(SCORES), figsize=(4 * len(SCORES), 3.6), layout="constrained")
    for panel, score in zip(panels, SCORES, strict=True):
        for name in RUNS:
            run = [row for row in rows if row["run"] == name]
            scale = 1 / run[0][score] if score == "diversity" else 1 if score == "total" else 100
            panel.plot([row["step"] for row in run], [scale * row[score] for row in run], marker=".", label=name)
        kind = {"total": "total reward", "diversity": "diversity (base = 1)"}
        panel.set(xlabel="steps", title=kind.get(score, f"judge: {score.replace('_', ' ')} (%)"))
    panels[0].legend(fontsize=8)
    figure.savefig(to, dpi=90)


if __name__ == "__main__":
    main()
