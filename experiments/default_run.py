"""The README's table: the default run of three seeds on 256 held-out prompts, with prompt engineering beside it.

python -m experiments.default_run
"""

import subprocess
import sys

from experiments.runs import SEEDS, train


def main() -> None:
    encoders = [str(train("default", seed=seed)) for seed in SEEDS]
    picture = ["--picture", "experiments/before_after.png"]
    subprocess.run([sys.executable, "-m", "miniature.evaluate", *encoders, "--words", *picture], check=True)


if __name__ == "__main__":
    main()
