"""What the edge-popup experiment found: table, CSV, figure, finding and one line of JSON."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from lottery_callbacks.ticket import write_atomically
from lottery_lightning.experiments.ending import conclude
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.figures import edge_popup_figure

Row = dict[str, Any]
KEYS = ("network", "weights", "sparsity")


def report(rows: Sequence[Row], run_dir: Path) -> None:
    """Write results.csv, results.json and the figure, print table and finding, and end with one line of JSON."""
    write_csv(run_dir / "results.csv", rows)
    figure = run_dir / "edge_popup.png"
    write_atomically(figure, edge_popup_figure(list(cells(rows))))
    found, arms = finding(rows)
    summary = {"experiment": "edge-popup", "run_dir": str(run_dir), **found}
    files = f"{run_dir / 'results.csv'}, {figure}, tickets in {run_dir}/trial_*/*/ticket.safetensors"
    conclude(summary, search_table(rows), files, sentence(found), more={"arms": arms})


def cells(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows of each arm, one a trial: the dense network first, then by network, weights and sparsity."""
    names = [list(dict.fromkeys(row[key] for row in rows)) for key in KEYS[:2]]

    def place(row: Row) -> tuple[float, ...]:
        return *(known.index(row[key]) for known, key in zip(names, KEYS, strict=False)), row["sparsity"]

    for _, cell in groupby(sorted(rows, key=place), place):
        yield list(cell)


def finding(rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    """The figures of the one sentence, and those of each search, over trials; the best has the least validation loss.

    That loss is the mean of the last weights', as the accuracies are theirs.
    """
    searches = [cell for cell in cells(rows) if cell[0]["weights"] != "trained"]
    best = min(searches, key=lambda cell: mean(row["val_loss_end"] for row in cell))
    arms = [{key: cell[0][key] for key in KEYS} | _figures(cell) for cell in searches]
    dense = [row["dense_acc"] for row in best]
    found = {
        "trials": len(best),
        "searches": len(arms),
        "dense_acc": None if None in dense else round(mean(dense), 5),
        "best": arms[searches.index(best)],
    }
    return found, arms


def _figures(cell: Sequence[Row]) -> Row:
    accuracies, less = ([row[key] for row in cell] for key in ("test_acc_end", "acc_minus_dense"))
    return {
        "density": round(mean(row["density"] for row in cell), 5),
        "kept": round(mean(row["kept"] for row in cell)),
        "test_acc": round(mean(accuracies), 5),
        "test_acc_min": round(min(accuracies), 5),
        "test_acc_max": round(max(accuracies), 5),
        "acc_minus_dense": None if None in less else round(mean(less), 5),
    }


def sentence(found: Row) -> str:
    """The finding in one sentence."""
    best, searches = found["best"], found["searches"]
    text = f"The best of {searches} searches by validation loss, " if searches > 1 else "The search, "
    text += (
        f"{best['network']} with {best['weights']} weights at sparsity {best['sparsity']:g}, keeps {best['kept']:,} "
        f"random weights ({best['density']:.2%}), trains none, and reaches {best['test_acc']:.2%} test accuracy "
        f"({best['test_acc_min']:.2%} to {best['test_acc_max']:.2%}, trials: {found['trials']})"
    )
    if found["dense_acc"] is not None:
        text += f", {100 * best['acc_minus_dense']:+.2f} points beside the trained network's {found['dense_acc']:.2%}"
    return text + "."


def search_table(rows: Sequence[Row]) -> Table:
    """One row an arm, means over trials."""
    table = Table(
        title=f"edge-popup, trials: {len({row['trial'] for row in rows})}; test accuracy of the last weights, "
        "mean (min to max)"
    )
    names = ("network", "weights", "sparsity", "density\n%", "kept\nweights", "of", "test\nacc. %", "less the\ndense's")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells(rows):
        one, trained = _figures(cell), cell[0]["weights"] == "trained"
        less = one["acc_minus_dense"]
        table.add_row(
            cell[0]["network"],
            cell[0]["weights"],
            f"{cell[0]['sparsity']:g}",
            f"{100 * one['density']:.2f}",
            f"{one['kept']:,}",
            f"{cell[0]['prunable']:,}",
            f"{100 * one['test_acc']:.2f} ({100 * one['test_acc_min']:.2f} to {100 * one['test_acc_max']:.2f})",
            "" if trained or less is None else f"{100 * less:+.2f}",
        )
    return table
