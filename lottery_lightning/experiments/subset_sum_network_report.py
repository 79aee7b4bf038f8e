"""What the subset sum of a network's weights found: rows, table, CSV, figure, finding and one line of JSON."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from rich.table import Table

from lottery_callbacks.ticket import write_atomically
from lottery_lightning.experiments.ending import conclude
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.experiments.targets import Row, by_question, over_trials
from lottery_lightning.figures import network_figure

NUMBERS = (
    "kept", "kept_ratio", "empty", "misses", "median_error", "max_error", "seconds", "accuracy",
    "accuracy_minus_target",
)  # fmt: skip


def report(rows: Sequence[Row], run_dir: Path, n: int) -> None:
    """Write results.csv, results.json and the figure, print table and finding, and end with one line of JSON."""
    write_csv(run_dir / "results.csv", rows)
    figure = run_dir / "subset_sum_network.png"
    write_atomically(figure, network_figure(by_question(rows), n))
    found = finding(rows, n)
    summary = {"experiment": "subset-sum-network", "run_dir": str(run_dir), **found}
    files = f"{run_dir / 'results.csv'}, {figure}, misses in {run_dir}/trial_*/*/misses.csv"
    conclude(summary, arm_table(rows, n), files, sentence(found))


def finding(rows: Sequence[Row], n: int) -> Row:
    """The figures of the one sentence: means over trials, by arm."""
    weights = rows[0]["weights"]
    found: Row = {"trials": len({row["trial"] for row in rows}), "weights": weights, "samples": n * weights}
    found["target_acc"] = round(mean(row["target_accuracy"] for row in rows), 5)
    keys = ("accuracy", "kept_ratio", "misses", "max_error", "seconds")
    found["questions"] = {
        cell[0]["question"]: {key: round(over_trials(cell, key), 6) for key in keys} for cell in by_question(rows)
    }
    return found


def sentence(found: Row) -> str:
    """The finding in one sentence."""
    whole = found["questions"]["any size"]
    text = (
        f"Sums of any size of {found['samples']:,} random samples approximate {found['weights']:,} weights to "
        f"{whole['max_error']:.1e}, keeping {whole['kept_ratio']:.2f} samples a weight, in {whole['seconds']:.1f} s: "
        f"test accuracy {whole['accuracy']:.2%} beside {found['target_acc']:.2%}"
    )
    for name, arm in found["questions"].items():
        if name.startswith("k = ") and not arm["misses"]:
            return f"{text}; {name} samples a weight suffice for the tolerance, at {arm['accuracy']:.2%}."
    return text + "."


def arm_table(rows: Sequence[Row], n: int) -> Table:
    """One row an arm, means over trials."""
    table = Table(title=f"weights as sums of n = {n} samples, means over trials: {len({row['trial'] for row in rows})}")
    names = ("question", "kept", "kept a\nweight", "empty", "misses", "median\nerror", "largest\nerror", "seconds")
    for name in (*names, "test\nacc. %", "less the\ntarget's"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in by_question(rows):
        m = {key: over_trials(cell, key) for key in NUMBERS}
        counts = [f"{m['kept']:,.0f}", f"{m['kept_ratio']:.2f}", f"{m['empty']:,.0f}", f"{m['misses']:,.0f}"]
        errors = [f"{m['median_error']:.1e}", f"{m['max_error']:.1e}", f"{m['seconds']:.2f}"]
        accuracy = [f"{100 * m['accuracy']:.2f}", f"{100 * m['accuracy_minus_target']:+.2f}"]
        table.add_row(cell[0]["question"], *counts, *errors, *accuracy)
    return table
