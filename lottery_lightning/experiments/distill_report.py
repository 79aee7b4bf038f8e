"""What the distill experiment found: table, CSV, figure, finding and one line of JSON."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from lottery_callbacks.ticket import write_atomically
from lottery_lightning.experiments.ending import conclude
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.figures.distill import CEILING, distill_figure

Row = dict[str, Any]
Losses = Mapping[int, Sequence[tuple[int, float]]]


def report(rows: Sequence[Row], losses: Losses, run_dir: Path) -> None:
    """Write results.csv, results.json and the figure, print table and finding, and end with one line of JSON."""
    write_csv(run_dir / "results.csv", rows)
    figure = run_dir / "distill.png"
    write_atomically(figure, distill_figure(rows, losses))
    found = list(cells(rows))
    trials = len({row["trial"] for row in rows})
    summary = {"experiment": "distill", "run_dir": str(run_dir), "trials": trials, "sets": found}
    files = (
        f"{run_dir / 'results.csv'}, {figure}, sets in {run_dir}/trial_*/sets/*.safetensors, their forming in "
        f"{run_dir}/trial_*/pictures/*.png"
    )
    conclude(summary, distill_table(found, trials), files, sentence(found, trials), width=150)


def cells(rows: Sequence[Row]) -> Iterator[Row]:
    """Each set's figures over trials: the whole data first, then as given; the standard deviation is the sample's."""
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        accuracies = [row["test_acc"] for row in own]
        over = [row["acc_minus_random"] for row in own]
        yield {
            "method": method,
            "stored": own[0]["stored"],
            "decoded": own[0]["decoded"],
            "test_acc": round(mean(accuracies), 5),
            "test_acc_sd": round(stdev(accuracies), 5) if len(own) > 1 else None,
            "test_acc_min": round(min(accuracies), 5),
            "test_acc_max": round(max(accuracies), 5),
            "test_acc_early_stop": round(mean(row["test_acc_early_stop"] for row in own), 5),
            "acc_minus_random": None if None in over else round(mean(over), 5),
            "making_real_points": round(mean(row["making_real_points"] for row in own)),
            "training_points": round(mean(row["training_points"] for row in own)),
            "making_seconds": round(mean(row["making_seconds"] for row in own), 1),
            "training_seconds": round(mean(row["training_seconds"] for row in own), 1),
        }


def sentence(found: Sequence[Row], trials: int) -> str:
    """The finding in one sentence: the distilled set, which is the last, beside the best of the others."""
    (whole,) = (cell for cell in found if cell["method"] == CEILING)
    distilled, others = found[-1], [cell for cell in found[:-1] if cell["method"] != CEILING]
    stored, decoded = distilled["stored"], distilled["decoded"]
    text = (
        f"Trained on {stored:,} images{'' if decoded == stored else f' ({decoded:,} decoded)'} made by "
        f"{distilled['method']}, the network reaches {_percent(distilled)} test accuracy "
        f"({'one trial' if trials == 1 else f'mean of {trials} trials'})"
    )
    if others:
        best = max(others, key=lambda cell: cell["test_acc"])
        less = 100 * (distilled["test_acc"] - best["test_acc"])
        text += f", {less:+.2f} points beside the best of as many real images ({best['method']}: {_percent(best)})"
    return text + f"; trained on all {whole['stored']:,} real images it reaches {_percent(whole)}."


def distill_table(found: Sequence[Row], trials: int) -> Table:
    """One row a set, means over trials."""
    table = Table(
        title=f"training on small sets, trials: {trials}; test accuracy of the last weights, mean (min to max)"
    )
    names = (
        "method", "stored\nimages", "decoded", "test acc. %", "sd", "at early\nstop %", "over\nrandom",
        "real points\nto make it", "points\nof training", "making\ns", "training\ns",
    )  # fmt: skip
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for cell in found:
        over, deviation = cell["acc_minus_random"], cell["test_acc_sd"]
        table.add_row(
            cell["method"],
            f"{cell['stored']:,}",
            f"{cell['decoded']:,}",
            f"{100 * cell['test_acc']:.2f} ({100 * cell['test_acc_min']:.2f} to {100 * cell['test_acc_max']:.2f})",
            "" if deviation is None else f"{100 * deviation:.2f}",
            f"{100 * cell['test_acc_early_stop']:.2f}",
            "" if over is None else f"{100 * over:+.2f}",
            f"{cell['making_real_points']:,}",
            f"{cell['training_points']:,}",
            f"{cell['making_seconds']:,.0f}",
            f"{cell['training_seconds']:,.0f}",
        )
    return table


def _percent(cell: Row) -> str:
    return f"{cell['test_acc']:.2%}"
