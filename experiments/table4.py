"""Table 4 on the miniature: gradient through the last 5, 10 or 15 steps, tested with 5 to 25 tuned steps; one seed.

python -m experiments.table4
"""

from experiments.runs import changes, experiment, header, means, measure, train

GRADED = {5: ("default",), 10: ("grad_steps_10", "--grad_steps", "10"), 15: ("grad_steps_15", "--grad_steps", "15")}
TESTED = (5, 10, 15, 25)


def main() -> None:
    base, looks = measure(), {}
    for k, run in GRADED.items():
        for steps in TESTED:
            looks[k, steps] = measure(train(*run), steps=steps)
    print(header("K", "tested with"))
    print(means("original", "", look=base))
    for (k, steps), look in looks.items():
        print(means(str(k), str(steps), look=look))
    print(header("K", "tested with"))
    for (k, steps), look in looks.items():
        print(changes(str(k), str(steps), look=look, before=base))


if __name__ == "__main__":
    experiment(main, __doc__)
