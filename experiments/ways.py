"""Where the gradient goes and what it costs: each way of --gradient, with and without a trajectory bank, three seeds.

    python -m experiments.ways

Prints the FLOPs of an image of an update, a bank's entries shared out among their uses; then, for each way, the change
of every score over the base on held-out prompts, averaged over the seeds, with paired 95 % intervals: after as many
updates as the default run has, and after as many FLOPs. These intervals say how far other prompts would move a figure;
the seeds' own differences, printed below them, say how far another seed would.
"""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.runs import (
    COLUMNS,
    DEFAULTS,
    SEEDS,
    UPDATES,
    changes,
    experiment,
    flops,
    header,
    mean,
    measure,
    row,
    train,
)
from textcraftor.stream import samples_shown

IMAGES = DEFAULTS["batch_size"]  # of an update
BY_SEED = ("total", "right", "clean", "right_and_clean")
NEAR = 0.15  # costs that differ by less count as equal
REFL = ("--gradient", "refl", "--grad_steps", "1")
WAYS = {
    "last_k, K = 5": (),
    "last_k, K = 1-5": ("--grad_steps", "1-5"),
    "last_k, K = 5, used 4 times": ("--reuse", "4"),
    "drtune, 3 of the last 15": ("--gradient", "drtune", "--grad_steps", "3"),
    "refl, last 5": (*REFL, "--driven", "5"),
    "refl, last 5, used 4 times": (*REFL, "--driven", "5", "--reuse", "4"),
    "refl, last 5, used 10 times": (*REFL, "--driven", "5", "--reuse", "10"),
}


def folder(way: str) -> str:
    """The name of a way's runs: those of the default run are "default"."""
    return way.replace("=", "").replace(",", "").replace(" ", "_") if WAYS[way] else "default"


def trained(way: str, updates: int = UPDATES) -> list:
    """The weights of all seeds after so many updates."""
    return [train(folder(way), *WAYS[way], seed=seed, updates=updates) for seed in SEEDS]


def spent(way: str, updates: int) -> float:
    """FLOPs of a run of so many updates, which computes the first steps of each sample once."""
    flags, reuse = WAYS[way], 1
    if "--reuse" in flags:
        place = flags.index("--reuse")
        flags, reuse = flags[:place], int(flags[place + 1])
    new = flops(*flags, updates=UPDATES if reuse == 1 and ("refl" in flags or "1-5" in flags) else 1)
    shown = samples_shown(updates, IMAGES, reuse)
    again = updates * IMAGES - shown
    return shown * new + again * (flops(*flags, banked=True) if again else 0)


def main() -> None:
    base, costs = measure(), {way: spent(way, UPDATES) for way in WAYS}
    equal = {way: updates_for(way, costs["last_k, K = 5"]) for way in WAYS}
    print(header("way", "GFLOP", "of the default's", "updates for the same", scores=()))
    for way, cost in costs.items():
        gigaflops = cost / UPDATES / IMAGES / 1e9
        print(row(way, f"{gigaflops:.1f}", f"{cost / costs['last_k, K = 5']:.2f}", str(equal[way])))
    for way in WAYS:  # a run goes on, so its earlier weights come first
        for updates in sorted({UPDATES, equal[way]}):
            trained(way, updates)
    draw(base, equal, Path("experiments/ways.png"))
    chain = look("last_k, K = 5", UPDATES)
    for title, updates in (("equal updates", dict.fromkeys(WAYS, UPDATES)), ("equal FLOPs", equal)):
        for against, before in (("the base", base), ("the default", chain)):
            print(f"\n{title}, change from {against}\n{header('way', 'updates')}", flush=True)
            for way in WAYS:
                print(changes(way, str(updates[way]), look=look(way, updates[way]), before=before), flush=True)
        print(f"\n{title}, each seed's change from the default's\n{header('way', 'updates', scores=BY_SEED)}")
        for way in WAYS:
            print(by_seed(way, updates[way]))


def updates_for(way: str, budget: float) -> int:
    """The most updates for this many FLOPs; UPDATES, if these cost nearly as many."""
    updates = next(n for n in itertools.count(1) if spent(way, n + 1) > budget)
    return UPDATES if abs(updates / UPDATES - 1) < NEAR else updates


def by_seed(way: str, updates: int) -> str:
    """A row of how far each seed's run lies from the default run of the same seed."""
    cells = []
    for name in BY_SEED:
        _, scale, form = COLUMNS[name]
        pairs = zip(trained(way, updates), trained("last_k, K = 5"), strict=True)
        apart = [scale * (measure(here)[name] - measure(default)[name]).mean() for here, default in pairs]
        cells.append(", ".join(f"{value:+{form}}" for value in apart))
    return row(way, str(updates), *cells)


def look(way: str, updates: int) -> dict:
    """Scores of a way's runs after so many updates, averaged over the seeds."""
    return mean([measure(weights) for weights in trained(way, updates)])


def draw(base: dict, equal: dict[str, int], to: Path) -> None:
    """Total and judge over the FLOPs spent: before, after UPDATES, and after as many FLOPs as the default run's."""
    figure, panels = plt.subplots(1, 4, figsize=(17, 4.6), layout="constrained")
    titles = {"total": "total reward", "right": "judge: right (%)", "clean": "judge: clean (%)"}
    titles |= {"right_and_clean": "judge: both (%)"}
    for panel, (score, title) in zip(panels, titles.items(), strict=True):
        scale = 100 if "%" in title else 1
        for way in WAYS:
            points = {0: base} | {updates: look(way, updates) for updates in sorted({UPDATES, equal[way]})}
            teraflops = [spent(way, updates) / 1e12 for updates in points]
            panel.plot(teraflops, [scale * scores[score].mean() for scores in points.values()], marker="o", label=way)
        panel.set(xlabel="TFLOP spent in training", title=title)
        panel.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS))
    figure.savefig(to, dpi=90)


if __name__ == "__main__":
    experiment(main, __doc__)
