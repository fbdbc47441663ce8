"""The README's table: the default run of three seeds on 256 held-out prompts, with prompt engineering beside it.

python -m experiments.default_run
"""

from experiments.runs import SEEDS, experiment, train
from miniature import evaluate


def main() -> None:
    encoders = [str(train("default", seed=seed)) for seed in SEEDS]
    evaluate.main([*encoders, "--words", "--picture", "experiments/before_after.png"])


if __name__ == "__main__":
    experiment(main, __doc__)
