"""What the heavy tails experiment found: table, CSVs, figure, finding and one line of JSON."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from lottery_callbacks.ticket import write_atomically
from lottery_lightning.experiments.ending import conclude
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.figures import heavy_tails_figure

Row = dict[str, Any]
FIGURES = (
    "steps", "test_acc", "column_ratio", "column_acc", "magnitude_ratio", "magnitude_acc", "singular_ratio",
    "singular_acc", "tail_index",
)  # fmt: skip


def report(rows: Sequence[Row], run_dir: Path) -> None:
    """Write CSVs, results.json and the figure, print table and finding, and end with one line of JSON."""
    rows = sorted(rows, key=_order(rows))
    write_csv(run_dir / "results.csv", [{key: value for key, value in row.items() if key != "curves"} for row in rows])
    points = [
        {key: row[key] for key in ("trial", "network", "alpha")} | point for row in rows for point in row["curves"]
    ]
    write_csv(run_dir / "curves.csv", points)
    figure = run_dir / "heavy_tails.png"
    write_atomically(figure, heavy_tails_figure(rows))
    found = list(cells(rows))
    trials = len({row["trial"] for row in rows})
    summary = {"experiment": "heavy-tails", "run_dir": str(run_dir), "trials": trials, "arms": found}
    files = f"{run_dir / 'results.csv'}, {run_dir / 'curves.csv'}, {figure}"
    conclude(summary, heavy_tails_table(found, rows, trials), files, sentence(found), width=170)


def _order(rows: Sequence[Row]) -> Any:
    """By width, then network as given, no noise first, then alpha falling, then trial."""
    networks = list(dict.fromkeys(row["network"] for row in rows))

    def place(row: Row) -> tuple[float, ...]:
        return (
            row["width"],
            networks.index(row["network"]),
            -3.0 if row["alpha"] is None else -row["alpha"],
            row["trial"],
        )

    return place


def cells(rows: Sequence[Row]) -> Iterator[Row]:
    """The means of each arm over trials, and the range of the pruning ratio of columns; NaN where one has diverged."""
    for network, alpha in dict.fromkeys((row["network"], row["alpha"]) for row in rows):
        own = [row for row in rows if (row["network"], row["alpha"]) == (network, alpha)]
        cell: Row = {"network": network, "alpha": alpha, "width": own[0]["width"]}
        cell |= {key: round(mean(row[key] for row in own), 5) for key in FIGURES}
        cell |= {
            f"column_ratio_{end.__name__}": round(end(row["column_ratio"] for row in own), 5) for end in (min, max)
        }
        left = [row["narrowed"] / row["parameters"] for row in own if row["narrowed"] is not None]
        yield cell | {"narrowed": round(mean(left), 5) if left else None}


def sentence(found: Sequence[Row]) -> str:
    """The finding in one sentence, of the widest network."""
    own = [cell for cell in found if cell["network"] == found[-1]["network"]]
    told = ", ".join(
        f"{100 * cell['column_ratio']:.1f} % ({_name(cell['alpha'])}: test accuracy {cell['test_acc']:.2%}, then "
        f"{cell['column_acc']:.2%})"
        for cell in own
    )
    return f"Of the columns of {own[0]['network']} (width {own[0]['width']:,}) can go, at the budget: {told}."


def _name(alpha: float | None) -> str:
    return "no noise" if alpha is None else f"alpha {alpha:g}"


def heavy_tails_table(found: Sequence[Row], rows: Sequence[Row], trials: int) -> Table:
    """One row an arm, means over trials; the step size beside the bound of the paper's theorem for 1 < alpha < 2.

    The theorem is of one hidden layer in the mean-field scaling, its second layer fixed (`networks.MeanField`).
    """
    table = Table(title=f"heavy-tailed SGD, means over trials: {trials}; pruned at the budget, without retraining")
    names = ("network", "alpha", "steps", "test\nacc. %", "columns\npruned %", "min to max", "then\nacc. %")
    names += ("weights\npruned %", "then\nacc. %", "by singular\nvalues %", "then\nacc. %", "tail\nindex")
    names += ("parameters\nleft %", "lr", "lr of the\ntheorem")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    rates = {(row["network"], row["alpha"]): row["lr"] for row in rows}
    for cell in found:
        percent = [
            f"{100 * cell[key]:.2f}"
            for key in ("column_acc", "magnitude_ratio", "magnitude_acc", "singular_ratio", "singular_acc")
        ]
        lr = rates[cell["network"], cell["alpha"]]
        table.add_row(
            cell["network"],
            "" if cell["alpha"] is None else f"{cell['alpha']:g}",
            f"{cell['steps']:,.0f}",
            f"{100 * cell['test_acc']:.2f}",
            f"{100 * cell['column_ratio']:.1f}",
            f"{100 * cell['column_ratio_min']:.1f} to {100 * cell['column_ratio_max']:.1f}",
            *percent,
            f"{cell['tail_index']:.2f}",
            "" if cell["narrowed"] is None else f"{100 * cell['narrowed']:.1f}",
            "" if lr is None else f"{lr:g}",
            f"{theorem_rate(cell['width'], cell['alpha']):.1e}" if cell["alpha"] and 1 < cell["alpha"] < 2 else "",
        )
    return table


def theorem_rate(width: int, alpha: float) -> float:
    """The largest step size of the paper's main theorem, n^(-alpha / 2 - 1) for n columns."""
    return width ** (-alpha / 2 - 1)
