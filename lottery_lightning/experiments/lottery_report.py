"""What the lottery experiment found: rows, table, finding, CSV, figure and one line of JSON."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lightning.pytorch.loggers import Logger
from rich.table import Table

from lottery_callbacks import Ticket
from lottery_callbacks.functional.early_stop import first_iteration_reaching
from lottery_callbacks.ticket import write_atomically
from lottery_lightning.experiments.ending import conclude
from lottery_lightning.experiments.runs import MEASURED, Training
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.figures import lottery_figure, mask_figure
from lottery_lightning.loggers import close, log_image, log_level, log_table, make_logger

Row = dict[str, Any]
ARMS = {
    "ticket": "ticket",
    "reinit": "reinitialised",
    "layerwise_random": "layerwise random",
    "global_random": "global random",
    "one_shot": "one-shot",
}
COLUMNS: tuple[str, ...] = (
    "trial", "level", "arm", "draw", "density", "kept", "early_stop_iteration", "reach_dense_iteration",
    "min_val_loss", "test_acc_early_stop", "test_acc_end",
)  # fmt: skip


def report(
    records: Sequence[Mapping[str, Any]], run_dir: Path, training: Training, config: Mapping[str, Any] | None = None
) -> None:
    """Write results.csv, results.json and the figures, print table and finding, and end with one line of JSON.

    The first time, that is where there is no results.json yet, loggers get a run of the whole experiment, too.

    Args:
        records: of all runs.
        run_dir: of the experiment.
        training: how its runs trained; names the logger.
        config: what loggers record of the experiment.
    """
    rows = with_reach(records)
    write_csv(run_dir / "results.csv", rows, COLUMNS)
    figures = {"lottery": lottery_figure(rows, training.max_steps)}
    if any(_tickets(run_dir, rows)):
        figures["masks"] = mask_figure(_tickets(run_dir, rows))
    for name, png in figures.items():
        write_atomically(run_dir / f"{name}.png", png)
    found = finding(rows)
    summary = {"experiment": "lottery", "run_dir": str(run_dir), **found}
    if not (run_dir / "results.json").exists():
        logger = make_logger(training.logger, run_dir, run_dir.name, None, run_dir.name)
        _log(logger, rows, found, figures, config or {})
    pictures = ", ".join(str(run_dir / f"{name}.png") for name in figures)
    files = f"{run_dir / 'results.csv'}, {pictures}, tickets in {run_dir}/trial_*/tickets"
    conclude(summary, level_table(rows), files, sentence(found))


def with_reach(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Records with `reach_dense_iteration`: when each first reached its trial's dense minimum validation loss."""
    target = {r["trial"]: r["min_val_loss"] for r in records if r["arm"] == "ticket" and r["level"] == 0}
    rows = []
    for record in records:
        steps = [int(point["iteration"]) for point in record["curve"]]
        losses = [point["val/loss"] for point in record["curve"]]
        reach = first_iteration_reaching(steps, losses, target[record["trial"]])
        rows.append({key: value for key, value in record.items() if key != "curve"} | {"reach_dense_iteration": reach})
    return rows


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def paired(rows: Sequence[Row], key: str, level: int, arm: str, other: Callable[[Row], list[Row]]) -> list[float]:
    """Per trial, the mean of `key` over the arm's draws at a level, less that over `other(row)` of the same trial."""
    differences = []
    for trial in sorted({row["trial"] for row in rows}):
        own = select(rows, trial=trial, level=level, arm=arm)
        reference = other(own[0]) if own else []
        if own and reference:
            differences.append(mean(r[key] for r in own) - mean(r[key] for r in reference))
    return differences


def finding(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of the one sentence.

    The best level has the least validation loss; the sparsest matching one is the last whose mean test accuracy is
    not below the dense network's (levels before it may be); the controls are compared there.
    """
    dense = select(rows, arm="ticket", level=0)
    levels = sorted({row["level"] for row in rows if row["level"]})
    accuracy = {lv: mean(r["test_acc_early_stop"] for r in select(rows, arm="ticket", level=lv)) for lv in [0, *levels]}
    loss = {lv: mean(r["min_val_loss"] for r in select(rows, arm="ticket", level=lv)) for lv in levels}
    best = min(levels, key=lambda lv: loss[lv])  # chosen on the validation set, reported on the test set
    matching = [lv for lv in levels if accuracy[lv] >= accuracy[0]]
    last = max(matching, default=best)

    def density(level: int) -> float:
        return round(select(rows, arm="ticket", level=level)[0]["density"], 5)

    found: dict[str, Any] = {
        "trials": len(dense),
        "dense_acc": round(accuracy[0], 5),
        "best_density": density(best),
        "best_acc": round(accuracy[best], 5),
        "best_minus_dense": summarise(
            paired(rows, "test_acc_early_stop", best, "ticket", lambda row: select(dense, trial=row["trial"]))
        ),
        "sparsest_matching_density": density(last) if matching else None,
    }
    for arm in list(ARMS)[1:]:
        if select(rows, arm=arm, level=last):
            found[f"ticket_minus_{arm}"] = summarise(
                paired(
                    rows,
                    "test_acc_early_stop",
                    last,
                    "ticket",
                    lambda row, arm=arm: select(rows, trial=row["trial"], level=row["level"], arm=arm),
                )
            )
    return found


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Mean and extremes."""
    return {"mean": round(mean(values), 5), "min": round(min(values), 5), "max": round(max(values), 5)}


def sentence(found: Mapping[str, Any]) -> str:
    """The finding in one sentence; accuracies are test accuracies at the early-stop iteration."""
    small = found["sparsest_matching_density"]
    dense = f"as accurate as the dense network ({found['dense_acc']:.2%})"
    text = f"The sparsest ticket {dense} keeps {small:.1%} of the weights" if small else f"No ticket is {dense}"
    gain = found["best_minus_dense"]
    text += (
        f"; the best, at {found['best_density']:.1%}, differs from it by {100 * gain['mean']:+.2f} points"
        f" ({100 * gain['min']:+.2f} to {100 * gain['max']:+.2f}, trials: {found['trials']})"
    )
    arms = [(arm, found[f"ticket_minus_{arm}"]["mean"]) for arm in ARMS if f"ticket_minus_{arm}" in found]
    if arms:
        where = f"{small:.1%}" if small else f"{found['best_density']:.1%}"
        text += f"; at {where} tickets differ by " + ", ".join(
            f"{100 * difference:+.2f} points from {ARMS[arm]}" for arm, difference in arms
        )
    return text + "."


def level_table(rows: Sequence[Row]) -> Table:
    """One row a level, one column an arm: means over trials and draws."""
    table = Table(title="early-stop iteration · test accuracy there / at the end of training (%), means over trials")
    arms = [arm for arm in ARMS if select(rows, arm=arm)]
    for name in ("level", "density %", *(ARMS[arm] for arm in arms)):
        table.add_column(name, justify="right", no_wrap=True)
    for level in sorted({row["level"] for row in rows}):
        cells = [select(rows, level=level, arm=arm) for arm in arms]
        table.add_row(str(level), f"{100 * cells[0][0]['density']:.1f}", *(_cell(cell) for cell in cells))
    return table


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    stop, early, end = (
        mean(r[k] for r in rows) for k in ("early_stop_iteration", "test_acc_early_stop", "test_acc_end")
    )
    return f"{stop:,.0f} · {100 * early:.2f} / {100 * end:.2f}"


def _tickets(run_dir: Path, rows: Sequence[Row]) -> Iterator[tuple[int, Ticket]]:
    """The tickets that were trained, trial by trial, where their files are still there."""
    for row in select(rows, arm="ticket"):
        path = run_dir / f"trial_{row['trial']}" / "tickets" / f"level_{row['level']:02d}.safetensors"
        if path.exists():
            yield row["trial"], Ticket.load(path)


def _log(
    logger: Logger | bool,
    rows: Sequence[Row],
    found: Mapping[str, Any],
    figures: Mapping[str, bytes],
    config: Mapping[str, Any],
) -> None:
    """One more run for the dashboards: the level as axis, all runs in a table, the figures, the finding's numbers."""
    if isinstance(logger, bool):
        return
    logger.log_hyperparams(dict(config))
    last = max(row["level"] for row in rows)
    for level in range(last + 1):
        values = {"prune/density": select(rows, level=level, arm="ticket")[0]["density"]}
        for arm in ARMS:
            if cell := select(rows, level=level, arm=arm):
                values |= {f"{arm}/{key}": mean(row[key] for row in cell) for key in MEASURED}
        if level == last:
            means = {key: value["mean"] if isinstance(value, Mapping) else value for key, value in found.items()}
            values |= {f"finding/{key}": value for key, value in means.items() if value is not None}
        log_level(logger, values, level)
    table = [
        {key: row[key] for key in COLUMNS}
        | {f"kept/{layer}": kept for layer, kept in row.get("kept_per_layer", {}).items()}
        for row in rows
    ]
    log_table(logger, "levels", table, last)
    for name, png in figures.items():
        log_image(logger, name, png, last)
    close(logger)
