"""What the geometry experiment found: table, CSVs, figures, finding and one line of JSON."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from lottery_callbacks.functional.landscape import Point, Surface
from lottery_callbacks.ticket import write_atomically
from lottery_lightning.experiments.ending import conclude
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.figures import curvature_figure, landscape_figure, relief_figure

Row = dict[str, Any]
NESTED = ("histogram", "spectrum", "surface")


def report(records: Sequence[Row], run_dir: Path) -> None:
    """Write CSVs, results.json and figures, print table and finding, and end with one line of JSON.

    Args:
        records: of each measurement: `what`, `name`, `trial`, and what was found.
        run_dir: the experiment's folder.
    """
    files = []
    curvatures = _of(records, "curvature")
    if curvatures:
        files += _written(run_dir / "results.csv", curvatures)
    if drawn := [row for row in curvatures if row["spectrum"]]:
        write_atomically(run_dir / "curvature.png", curvature_figure(drawn))
        files.append(run_dir / "curvature.png")
    surfaces = _of(records, "around") + _of(records, "plane")
    if surfaces:
        files += _written(run_dir / "planes.csv", surfaces)
    for what in ("around", "plane"):
        own = [row for row in _of(records, what) if row["trial"] == 0 and row["diverged"] < 1]
        first = {row["name"]: surface_of(row["surface"]) for row in own}
        for kind, draw in (("map", landscape_figure), ("relief", relief_figure)) if first else ():
            path = run_dir / f"{what}_{kind}.png"
            write_atomically(path, draw(first))
            files.append(path)
    trials = len({row["trial"] for row in records})
    found = cells(records)
    summary = {"experiment": "geometry", "run_dir": str(run_dir), "trials": trials, "networks": found}
    conclude(summary, geometry_table(found, trials), ", ".join(map(str, files)), sentence(found), 140)


def _of(records: Sequence[Row], what: str) -> list[Row]:
    return [row for row in records if row["what"] == what]


def _written(path: Path, rows: Sequence[Row]) -> list[Path]:
    flat = [{key: value for key, value in row.items() if key not in NESTED} for row in rows]
    write_csv(path, sorted(flat, key=lambda row: [r["name"] for r in flat].index(row["name"])))
    return [path]


def surface_of(kept: Row) -> Surface:
    """The surface of which `asdict` made these primitives."""
    xs, ys = tuple(kept["xs"]), tuple(kept["ys"])
    losses, errors = (tuple(map(tuple, kept[key])) for key in ("losses", "errors"))
    return Surface(
        xs, ys, losses, errors, kept["norms"], tuple(Point(*point) for point in kept["points"]), kept["unit"]
    )


def cells(records: Sequence[Row]) -> list[Row]:
    """The means over trials of each network's figures, and of each plane's; rounded to five digits.

    Of the figures that are compared also the least and the greatest of all trials, as `<figure>_range`.
    """
    found = []
    for name in dict.fromkeys(row["name"] for row in records):
        cell: Row = {"name": name}
        for what, figures in FIGURES.items():
            rows = [row for row in _of(records, what) if row["name"] == name]
            for key in figures if rows else ():
                place, values = key if what == "curvature" else f"{what}_{key}", [row[key] for row in rows]
                cell[place] = _round(mean(values))
                if place in COMPARED:
                    cell[f"{place}_range"] = [_round(min(values)), _round(max(values))]
        found.append(cell)
    return found


def _round(value: float) -> float:
    return float(f"{value:.5g}")


FIGURES = {
    "curvature": (
        "density", "loss", "error", "trace", "trace_error", "diagonal_mean", "diagonal_95", "diagonal_error", "largest",
        "smallest",
    ),
    "around": ("loss", "diverged", "mean_rise", "highest_rise"),
    "plane": ("loss", "diverged", "mean_rise", "highest_rise"),
}  # fmt: skip
COMPARED = {
    "trace": "the least trace",
    "largest": "the least largest eigenvalue",
    "around_mean_rise": "the least mean rise of the loss around it",
    "plane_mean_rise": "the least mean rise of the loss on the plane through them",
}


def sentence(found: Sequence[Row]) -> str:
    """The finding in one sentence: which network lies flattest; what has diverged is not compared."""
    parts = []
    for key, told in COMPARED.items():
        of = {cell["name"]: cell for cell in found if _comparable(cell, key)}
        if len(of) < 2:
            continue
        least = min(of, key=lambda name: of[name][key])
        others = ", ".join(f"{name} {_ranged(cell, key)}" for name, cell in of.items() if name != least)
        apart = all(
            cell[f"{key}_range"][0] > of[least][f"{key}_range"][1] for name, cell in of.items() if name != least
        )
        less = "" if apart else ", by means alone: ranges over trials overlap"
        parts.append(f"{least} has {told}, {_ranged(of[least], key)} ({others}{less})")
    return ("; ".join(parts) or "There is one network, and nothing to compare it with") + "."


def _comparable(cell: Row, key: str) -> bool:
    return math.isfinite(cell.get(key, math.nan)) and not cell.get(f"{key.split('_')[0]}_diverged", 0)


def _ranged(cell: Row, key: str) -> str:
    low, high = cell[f"{key}_range"]
    return f"{cell[key]:.4g}" + (f" [{low:.4g} to {high:.4g}]" if low < high else "")


def geometry_table(found: Sequence[Row], trials: int) -> Table:
    """One row a network or plane, means over trials."""
    table = Table(title=f"geometry on training batches, means over trials: {trials}")
    columns = {
        "density": "density\n%",
        "loss": "loss",
        "trace": "trace\n(s.e. of one)",
        "diagonal_mean": "diagonal\nmean",
        "diagonal_95": "95 % of |diagonal|\nbelow (s.e.)",
        "largest": "largest\neigenvalue",
        "smallest": "smallest",
        "around_mean_rise": "rise around,\nmean",
        "plane_mean_rise": "rise on\nplane, mean",
    }
    errors = {"trace": "trace_error", "diagonal_95": "diagonal_error"}
    table.add_column("network", justify="right", no_wrap=True)
    for name in columns.values():
        table.add_column(name, justify="right", no_wrap=True)
    for cell in found:
        values = {key: 100 * cell[key] if key == "density" else cell[key] for key in columns if key in cell}
        told = {key: f" ({cell[error]:.2g})" for key, error in errors.items() if error in cell}
        table.add_row(
            cell["name"], *(f"{values[key]:.4g}{told.get(key, '')}" if key in values else "" for key in columns)
        )
    return table
