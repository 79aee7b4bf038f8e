"""Accuracy against kept weights of the trained dense network and of three kinds of tickets, on the same data.

    python scripts/compare_tickets.py OUT.png --lottery results/lth/lenet_mnist_small.csv
        --edge-popup results/edge_popup/lenet_mnist_small.csv --strong-ticket results/strong_tickets/lenet_mnist.csv

Each file is the results.csv of that command's experiment; level 0 of the lottery is the dense network. Accuracies are
of the last weights; the trials of each experiment are its own.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lottery_callbacks.ticket import write_atomically
from lottery_lightning.figures import comparison_figure

Row = dict[str, str]
Points = dict[str, dict[str, tuple[list[float], list[float]]]]  # series -> point -> kept weights and accuracies


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in READERS:
        parser.add_argument(f"--{name}", type=Path, required=name == "lottery")
    parser.add_argument("--title", default="LeNet-300-100, MNIST")
    given = vars(parser.parse_args(argv))
    points: Points = defaultdict(lambda: defaultdict(lambda: ([], [])))
    for name, read in READERS.items():
        if path := given[name.replace("-", "_")]:
            with path.open() as file:
                for series, point, kept, accuracy in read(csv.DictReader(file)):
                    points[series][point][0].append(kept)
                    points[series][point][1].append(accuracy)
    series = {
        name: [(sum(kept) / len(kept), accuracies) for kept, accuracies in found.values()]
        for name, found in points.items()
    }
    ((weights, _),) = series[DENSE]
    write_atomically(given["out"], comparison_figure(series, int(weights), given["title"]))
    print(f"wrote {given['out']}: {', '.join(f'{name}: {len(found)} points' for name, found in series.items())}")


DENSE = "trained, dense"


def lottery(rows: Iterable[Row]):
    for row in rows:
        if row["arm"] == "ticket":
            name = "trained, winning ticket (magnitude pruning)" if int(row["level"]) else DENSE
            yield name, row["level"], float(row["kept"]), float(row["test_acc_end"])


def edge_popup(rows: Iterable[Row]):
    for row in rows:
        name = f"never trained, edge-popup, {row['weights'].replace('_', ' ')}, {row['network']}"
        if row["weights"] != "trained":
            yield name, row["sparsity"], float(row["kept"]), float(row["test_acc_end"])


def strong_ticket(rows: Iterable[Row]):
    for row in rows:
        n, _, rest = row["question"].partition(", ")
        name = (
            f"never trained, subset sum, {rest if rest == 'any size' else 'k products' if row['size'] else rest}, {n}"
        )
        yield name, row["question"], float(row["kept"]), float(row["accuracy"])


READERS: dict[str, Callable[[Iterable[Row]], Iterable[tuple[str, str, float, float]]]] = {
    "lottery": lottery,
    "edge-popup": edge_popup,
    "strong-ticket": strong_ticket,
}

if __name__ == "__main__":
    main()
