"""Table 4 on the miniature: gradient through the last 5, 10 or 15 steps, tested with 5 to 25 tuned steps; three seeds.

python -m experiments.table4
"""

from experiments.runs import changes, header, mean, means, measure
from experiments.ways import trained

WAYS = {5: "last_k, K = 5", 10: "last_k, K = 10", 15: "last_k, K = 15"}
TESTED = (5, 10, 15, 25)


def main() -> None:
    base = measure()
    looks = {
        (k, steps): mean([measure(weights, steps=steps) for weights in trained(way)])
        for k, way in WAYS.items()
        for steps in TESTED
    }
    print(header("K", "tested with"))
    print(means("original", "", look=base))
    for (k, steps), look in looks.items():
        print(means(str(k), str(steps), look=look))
    print(header("K", "tested with"))
    for (k, steps), look in looks.items():
        print(changes(str(k), str(steps), look=look, before=base))


if __name__ == "__main__":
    main()
