"""What the strong ticket experiment found: table, CSV, figure, finding and one line of JSON."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from rich.table import Table

from lottery_callbacks.ticket import write_atomically
from lottery_lightning.experiments.ending import conclude
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.experiments.targets import Row, by_question, over_trials
from lottery_lightning.figures import strong_ticket_figure

NUMBERS = ("accuracy", "kept_ratio", "density", "overparameterisation", "misses", "max_error", "certified", "seconds")


def report(rows: Sequence[Row], run_dir: Path) -> None:
    """Write results.csv, results.json and the figure, print table and finding, and end with one line of JSON."""
    write_csv(run_dir / "results.csv", rows)
    figure = run_dir / "strong_tickets.png"
    write_atomically(figure, strong_ticket_figure(by_question(rows)))
    found = finding(rows)
    summary = {"experiment": "strong-ticket", "run_dir": str(run_dir), **found}
    files = f"{run_dir / 'results.csv'}, {figure}, misses and the like in {run_dir}/trial_*/*/problems.csv"
    conclude(summary, ticket_table(rows), files, sentence(found), width=140)


def finding(rows: Sequence[Row]) -> Row:
    """The figures of the one sentence: means over trials (of errors the largest), by arm."""
    arms = {
        cell[0]["question"]: {key: round(over_trials(cell, key), 6) for key in NUMBERS} for cell in by_question(rows)
    }
    accuracy = round(mean(row["target_accuracy"] for row in rows), 5)
    return {"trials": len({row["trial"] for row in rows}), "target_acc": accuracy, "arms": arms}


def sentence(found: Row) -> str:
    """The finding in one sentence: of the arms within a tenth of a point of the target, the sparsest."""
    near = {name: arm for name, arm in found["arms"].items() if arm["accuracy"] >= found["target_acc"] - 0.001}
    if not near:
        return f"No ticket comes within 0.1 points of the trained network's test accuracy ({found['target_acc']:.2%})."
    name = min(near, key=lambda name: near[name]["density"])
    arm = near[name]
    return (
        f"The sparsest ticket within 0.1 points of the trained network ({found['target_acc']:.2%}) is that of {name}: "
        f"it keeps {arm['density']:.2%} of a random network {arm['overparameterisation']:,.0f} times as large, "
        f"{arm['kept_ratio']:.2f} weights for each of the target's, at {arm['accuracy']:.2%}."
    )


def ticket_table(rows: Sequence[Row]) -> Table:
    """One row an arm, means over trials; of errors the largest."""
    table = Table(
        title=f"strong tickets, trials: {len({row['trial'] for row in rows})}; means, counts of all, largest errors; "
        "found and certified on inputs of norm 1"
    )
    names = (
        "question",
        "kept a\nweight",
        "density\n%",
        "m / m_t",
        "misses",
        "too few\nunits",
        "out of\nreach",
        "weight\nerror",
    )
    names += ("found\nerror", "certi-\nfied", "seconds", "test\nacc. %", "less the\ntarget's")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for cell in by_question(rows):
        one = {key: over_trials(cell, key) for key, value in cell[0].items() if isinstance(value, int | float)}
        found = "" if cell[0]["found"] is None else f"{one['found']:.0e}"
        table.add_row(
            cell[0]["question"],
            f"{one['kept_ratio']:.2f}",
            f"{100 * one['density']:.2f}",
            f"{one['overparameterisation']:,.0f}",
            *(f"{sum(row[key] for row in cell):,}" for key in ("misses", "infeasible", "out_of_reach")),
            f"{one['max_error']:.0e}",
            found,
            f"{one['certified']:.0e}",
            f"{one['seconds']:.1f}",
            f"{100 * one['accuracy']:.2f}",
            f"{100 * one['accuracy_minus_target']:+.2f}",
        )
    return table
