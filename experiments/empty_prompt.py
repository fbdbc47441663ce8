"""The empty prompt of guidance read by the original encoder (the default) or by the tuned one too; three seeds.

python -m experiments.empty_prompt
"""

from experiments.runs import SEEDS, changes, experiment, header, mean, measure, train

RUNS = {"original encoder": ("default",), "tuned encoder": ("empty_prompt", "--tune_unconditional", "on")}


def main() -> None:
    looks = {name: mean([measure(train(*run, seed=seed)) for seed in SEEDS]) for name, run in RUNS.items()}
    print(header("who reads the empty prompt"))
    for name, look in looks.items():
        print(changes(name, look=look, before=measure()))
    original, tuned = looks.values()
    print(changes("tuned against original", look=tuned, before=original))


if __name__ == "__main__":
    experiment(main, __doc__)
