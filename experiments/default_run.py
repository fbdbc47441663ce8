"""The README's table: the default run of three seeds on 256 held-out prompts, with prompt engineering beside it.

python -m experiments.default_run            trains into output_experiments/, what is there is not trained again
"""

import subprocess
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
FOLDER = Path("output_experiments")


def train(name: str, *flags: str) -> Path:
    """The folder of a run of the miniature with these flags, run or continued unless it is finished."""
    folder = FOLDER / name
    if not (folder / "curves.png").exists():
        resume = ["--resume"] if (folder / "options.json").exists() else []
        command = [sys.executable, "train_textcraftor.py", "--model", "miniature", "--output-path", str(folder)]
        subprocess.run([*command, *flags, *resume], check=True)
    return folder


def main() -> None:
    runs = [train(f"default_seed{seed}", "--seed", str(seed), "--val_every", "0") for seed in SEEDS]
    encoders = [str(run / "tc_text.safetensors") for run in runs]
    picture = ["--picture", "experiments/before_after.png"]
    subprocess.run([sys.executable, "-m", "miniature.evaluate", *encoders, "--words", *picture], check=True)


if __name__ == "__main__":
    main()
