"""Claims L2 to L5 from a lottery's results.csv: paired differences by level, as a Markdown table.

    python scripts/lottery_claims.py results/lth/lenet_mnist_small.csv

A pair is a ticket and its counterpart of the same trial and level (the dense network: of the same trial). Cells are
mean (min to max) over trials. Accuracy differences are in points of test accuracy at the early-stop iteration;
"iterations" are ratios counterpart / ticket of the early-stop iteration, above 1 where the ticket is sooner;
"reach" is the first iteration at which the validation loss is at most the dense run's minimum.
"""

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Row = dict[str, Any]
COLUMNS: tuple[tuple[str, str, Callable[[Row, Row], float | None]], ...] = (
    ("ticket - dense", "dense", lambda a, b: 100 * (a["test_acc_early_stop"] - b["test_acc_early_stop"])),
    ("iterations dense / ticket", "dense", lambda a, b: b["early_stop_iteration"] / a["early_stop_iteration"]),
    ("reach / dense", "dense", lambda a, b: _ratio(a["reach_dense_iteration"], b["reach_dense_iteration"])),
    ("ticket - reinit", "reinit", lambda a, b: 100 * (a["test_acc_early_stop"] - b["test_acc_early_stop"])),
    ("iterations reinit / ticket", "reinit", lambda a, b: b["early_stop_iteration"] / a["early_stop_iteration"]),
    ("ticket - random", "random", lambda a, b: 100 * (a["test_acc_early_stop"] - b["test_acc_early_stop"])),
    ("ticket - one-shot", "one_shot", lambda a, b: 100 * (a["test_acc_early_stop"] - b["test_acc_early_stop"])),
    ("iterations one-shot / ticket", "one_shot", lambda a, b: b["early_stop_iteration"] / a["early_stop_iteration"]),
)


def main(path: str) -> None:
    rows = read(Path(path))
    levels = sorted({row["level"] for row in rows if row["level"]})
    print("| level | density % | " + " | ".join(name for name, *_ in COLUMNS) + " |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for level in levels:
        density = next(row["density"] for row in rows if row["level"] == level)
        cells = [cell(pairs(rows, level, arm), difference) for _, arm, difference in COLUMNS]
        print(f"| {level} | {100 * density:.1f} | " + " | ".join(cells) + " |")


def read(path: Path) -> list[Row]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    text = {"arm"}
    return [{key: _number(value) if key not in text else value for key, value in row.items()} for row in rows]


def pairs(rows: Sequence[Row], level: int, arm: str) -> list[tuple[Row, Row]]:
    """(ticket, counterpart) of each trial and draw; the counterpart "dense" is level 0 of the trial."""
    tickets = {row["trial"]: row for row in rows if row["arm"] == "ticket" and row["level"] == level}
    others = [r for r in rows if ((r["level"] == 0) if arm == "dense" else (r["arm"] == arm and r["level"] == level))]
    return [(tickets[other["trial"]], other) for other in others]


def cell(found: Sequence[tuple[Row, Row]], difference: Callable[[Row, Row], float | None]) -> str:
    values = [value for ticket, other in found if (value := difference(ticket, other)) is not None]
    if not values:
        return "never"
    missing = f", {len(found) - len(values)} never" if len(values) < len(found) else ""
    return f"{mean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f}{missing})"


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _number(text: str) -> int | float | None:
    if not text:
        return None
    return int(text) if text.isdigit() else float(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
