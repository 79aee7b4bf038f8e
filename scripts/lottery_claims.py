"""Claims L2 to L7 from a lottery's results.csv: paired differences by level, as a Markdown table.

    python scripts/lottery_claims.py results/lth/lenet_mnist_small.csv

A pair is a ticket and its counterpart of the same trial and level (the dense network: of the same trial), several
draws of a control averaged. Cells are mean (min to max) over trials. Accuracy differences are in points of test
accuracy at the early-stop iteration; iterations are ratios counterpart / ticket of the early-stop iteration, above 1
where the ticket is sooner; "reach" is the first iteration at which the validation loss is at most the dense run's
minimum, as a fraction of the dense run's.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from lottery_lightning.experiments.lottery_report import Row, select

ACCURACY, STOP, REACH = "test_acc_early_stop", "early_stop_iteration", "reach_dense_iteration"
COLUMNS = (
    ("ticket - dense", "dense", ACCURACY),
    ("iterations dense / ticket", "dense", STOP),
    ("reach ticket / dense", "dense", REACH),
    ("ticket - reinit", "reinit", ACCURACY),
    ("iterations reinit / ticket", "reinit", STOP),
    ("ticket - layerwise random", "layerwise_random", ACCURACY),
    ("ticket - global random", "global_random", ACCURACY),
    ("ticket - one-shot", "one_shot", ACCURACY),
    ("iterations one-shot / ticket", "one_shot", STOP),
)


def main(path: str) -> None:
    rows = read(Path(path))
    columns = [column for column in COLUMNS if column[1] == "dense" or select(rows, arm=column[1])]
    print("| level | density % | " + " | ".join(name for name, *_ in columns) + " |")
    print("|---" * (2 + len(columns)) + "|")
    for level in sorted({row["level"] for row in rows if row["level"]}):
        density = select(rows, level=level, arm="ticket")[0]["density"]
        cells = [cell(rows, level, arm, key) for _, arm, key in columns]
        print(f"| {level} | {100 * density:.1f} | " + " | ".join(cells) + " |")


def read(path: Path) -> list[Row]:
    with path.open() as file:
        return [
            {key: value if key == "arm" else _number(value) for key, value in r.items()} for r in csv.DictReader(file)
        ]


def cell(rows: Sequence[Row], level: int, arm: str, key: str) -> str:
    """One column's value by trial, as mean (min to max)."""
    values = []
    for trial in sorted({row["trial"] for row in rows}):
        (ticket,) = select(rows, trial=trial, level=level, arm="ticket")
        wanted = {"level": 0, "arm": "ticket"} if arm == "dense" else {"level": level, "arm": arm}
        others = select(rows, trial=trial, **wanted)
        if ticket[key] is None or any(other[key] is None for other in others):
            continue
        other = mean(row[key] for row in others)
        values.append(100 * (ticket[key] - other) if key == ACCURACY else _ratio(key, ticket[key], other))
    if not values:
        return "never"
    sign, trials = "+" if key == ACCURACY else "", len({row["trial"] for row in rows})
    missing = f", {trials - len(values)} never" if len(values) < trials else ""
    return f"{mean(values):{sign}.2f} ({min(values):{sign}.2f} to {max(values):{sign}.2f}{missing})"


def _ratio(key: str, ticket: float, other: float) -> float:
    return ticket / other if key == REACH else other / ticket


def _number(text: str) -> int | float | None:
    if not text:
        return None
    return int(text) if text.isdigit() else float(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
