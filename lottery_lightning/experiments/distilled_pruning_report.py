"""What the distilled pruning experiment found: table, CSVs, figures, finding and one line of JSON."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from lottery_callbacks.functional.interpolation import Line
from lottery_callbacks.ticket import write_atomically
from lottery_lightning.experiments.ending import conclude
from lottery_lightning.experiments.instability_report import figures, line_points
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.figures import distilled_lines_figure, distilled_pruning_figure

Row = dict[str, Any]
SPENT = ("decoded_points", "stored_points", "seconds", "making_points", "making_seconds")


def report(pairs: Sequence[Row], ledger: Sequence[Row], run_dir: Path) -> None:
    """Write the CSVs, results.json and the figures, print table and finding, and end with one line of JSON.

    Args:
        pairs: a row a pair of copies, as `Instability.rows`, with its `route` and `level`; those of one side by side.
        ledger: a row a route, level and trial, what the ticket cost to find.
        run_dir: the experiment's folder.
    """
    rows = [row | {"lines": {kind: Line(**line) for kind, line in row["lines"].items()}} for row in pairs]
    found = cells(rows, ledger)
    places = [{key: row[key] for key in ("route", "level")} for row in rows]
    write_csv(run_dir / "results.csv", [place | figures(row) for place, row in zip(places, rows, strict=True)])
    points = (place | point for place, row in zip(places, rows, strict=True) for point in line_points(row))
    write_csv(run_dir / "lines.csv", list(points))
    write_csv(run_dir / "ledger.csv", ledger)
    pictures = {"distilled_pruning": distilled_pruning_figure(found), "lines": distilled_lines_figure(rows)}
    for name, png in pictures.items():
        write_atomically(run_dir / f"{name}.png", png)
    summary = {"experiment": "distilled-pruning", "run_dir": str(run_dir), **finding(rows, found)}
    names = ", ".join(str(run_dir / f"{name}.png") for name in pictures)
    files = f"{', '.join(str(run_dir / f'{name}.csv') for name in ('results', 'lines', 'ledger'))}, {names}"
    conclude(summary, pruning_table(found, summary), files, sentence(found), width=180, more={"cells": found})


def cells(rows: Sequence[Row], ledger: Sequence[Row]) -> list[Row]:
    """The figures of each route and level: over copies and pairs mean, least and greatest, and means of the ledger.

    `ratio_decoded`, `ratio_stored` and `ratio_seconds` are what the route on real data consumed (where there is none,
    the first one) over what this one did, each without the making of a set.
    """
    found = []
    against = next((row["route"] for row in ledger if row["real"]), ledger[0]["route"])
    for (route, level), cell in groupby(rows, lambda row: (row["route"], row["level"])):
        pairs = list(cell)
        ends = _accuracies(pairs)
        values = [row["lines"]["plain"].instability for row in pairs]
        one = {"route": route, "level": level, "density": mean(row["density"] for row in pairs)}
        one |= {
            "trials": len({row["trial"] for row in pairs}),
            "copies": len({copy for _, copy in ends}),
            "pairs": len(pairs),
        }
        for name, some in (("test_acc", list(ends.values())), ("instability", values)):
            one |= {name: mean(some), f"{name}_min": min(some), f"{name}_max": max(some)}
        one |= {"barrier": mean(row["lines"]["plain"].barrier for row in pairs)}
        spent, theirs = (_spent(ledger, name, level) for name in (route, against))
        if spent:
            one |= spent
            if None not in (theirs["decoded_points"], spent["decoded_points"]):
                for name in ("decoded", "stored"):
                    one[f"ratio_{name}"] = theirs["decoded_points"] / spent[f"{name}_points"]
            one["ratio_seconds"] = theirs["seconds"] / spent["seconds"]
        found.append(one)
    return found


def _accuracies(pairs: Sequence[Row]) -> dict[tuple[int, int], float]:
    """The test accuracy of each copy, by trial and copy: the lines' ends are evaluations of the copies themselves."""
    ends = {}
    for row in pairs:
        errors = row["lines"]["plain"].errors
        ends |= {(row["trial"], row["first"]): 1 - errors[0], (row["trial"], row["second"]): 1 - errors[-1]}
    return ends


def _spent(ledger: Sequence[Row], route: str, level: int) -> Row:
    own = [row for row in ledger if (row["route"], row["level"]) == (route, level)]
    return {key: None if own[0][key] is None else mean(row[key] for row in own) for key in SPENT} if own else {}


def finding(rows: Sequence[Row], found: Sequence[Row]) -> Row:
    """The figures of the last line."""
    line = rows[0]["lines"]["plain"]
    keys = ("route", "level", "density", "test_acc", "instability", "ratio_stored", "ratio_decoded", "ratio_seconds")
    some = [{key: cell[key] for key in keys if key in cell} for cell in found]
    return {
        "trials": len({row["trial"] for row in rows}),
        "copies": 1 + max(row["second"] for row in rows),
        "k": rows[0]["k"],
        "points": len(line.t),
        "norms": line.norms,
        "tickets": [{k: round(v, 5) if isinstance(v, float) else v for k, v in cell.items()} for cell in some],
    }


def sentence(found: Sequence[Row]) -> str:
    """The finding in one sentence: the sparsest tickets."""
    level = max(cell["level"] for cell in found)
    parts = []
    for cell in found:
        if cell["level"] in (0, level):
            parts.append(
                f"{cell['route']} {100 * cell['test_acc']:.2f} %, instability {100 * cell['instability']:.2f}"
                + (f", found with {_fewer(cell)} fewer training examples" if cell.get("ratio_stored", 1) > 1 else "")
            )
    density = found[-1]["density"]
    return f"On real data, tickets of {density:.2%} of the weights: {'; '.join(parts)} (points of test error)."


def _fewer(cell: Row) -> str:
    stored, decoded = (f"{cell[f'ratio_{name}']:,.1f} times" for name in ("stored", "decoded"))
    return stored if stored == decoded else f"{stored} (stored; {decoded} decoded)"


def pruning_table(found: Sequence[Row], summary: Row) -> Table:
    """One row a route and level."""
    table = Table(
        title=f"tickets trained on real data from step {summary['k']:,}, trials: {summary['trials']}, copies: "
        f"{summary['copies']}; points: training examples drawn to find the ticket, thousands"
    )
    names = ("route", "level", "density\n%", "test acc. %\nmean", "min to max", "instability\nmean", "min to max")
    spending = ("points\ndecoded", "stored", "times fewer\n(stored)", "seconds\nto find", "points to\nmake set")
    for name in (*names, *spending):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in found:
        accuracy, instability = (
            (f"{100 * cell[key]:.2f}", f"{100 * cell[f'{key}_min']:.2f} to {100 * cell[f'{key}_max']:.2f}")
            for key in ("test_acc", "instability")
        )
        spent = ("",) * 5
        if "seconds" in cell:
            thousands = [cell[f"{key}_points"] for key in ("decoded", "stored", "making")]
            decoded, stored, made = ("not told" if some is None else f"{some / 1000:,.0f}" for some in thousands)
            ratio = f"{cell['ratio_stored']:,.1f}" if "ratio_stored" in cell else ""
            spent = (decoded, stored, ratio, f"{cell['seconds']:,.0f}", made)
        table.add_row(
            cell["route"], str(cell["level"]), f"{100 * cell['density']:.2f}", *accuracy, *instability, *spent
        )
    return table
