"""What the instability experiment found: table, CSVs, figure, finding and one line of JSON."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from lottery_callbacks.functional.interpolation import Line
from lottery_callbacks.ticket import write_atomically
from lottery_lightning.experiments.ending import conclude
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.figures import instability_figure

Row = dict[str, Any]
PAIR = ("network", "density", "at", "k", "trial", "first", "second")


def report(pairs: Sequence[Row], run_dir: Path) -> None:
    """Write the CSVs, results.json and the figure, print table and finding, and end with one line of JSON.

    Args:
        pairs: the keys `PAIR` of each, and its `lines` by name, "plain" and perhaps "aligned"; those of one network and
            step side by side.
        run_dir: the experiment's folder.
    """
    rows = [row | {"lines": {kind: Line(**line) for kind, line in row["lines"].items()}} for row in pairs]
    write_csv(run_dir / "results.csv", [figures(row) for row in rows])
    write_csv(run_dir / "lines.csv", [point for row in rows for point in line_points(row)])
    figure, found = run_dir / "instability.png", cells(rows)
    write_atomically(figure, instability_figure(rows))
    summary = {"experiment": "instability", "run_dir": str(run_dir), **finding(rows)}
    files = f"{run_dir / 'results.csv'}, {run_dir / 'lines.csv'}, {figure}, states in {run_dir}/trial_*/tickets"
    conclude(summary, instability_table(found, summary), files, sentence(found), more={"starts": found})


def figures(row: Row) -> Row:
    """A pair's row of results.csv; of the line after matching where there is one."""
    lines = {"" if kind == "plain" else f"{kind}_": line for kind, line in row["lines"].items()}
    plain = row["lines"]["plain"]
    found = {key: row[key] for key in PAIR} | {"error_first": plain.errors[0], "error_second": plain.errors[-1]}
    for prefix, line in lines.items():
        found |= {f"{prefix}instability": line.instability, f"{prefix}barrier": line.barrier}
    return found


def line_points(row: Row) -> list[Row]:
    """A row a point of each of the pair's lines."""
    pair = {key: row[key] for key in PAIR}
    return [
        pair | {"line": kind, "t": t, "loss": loss, "error": error}
        for kind, line in row["lines"].items()
        for t, loss, error in zip(line.t, line.losses, line.errors, strict=True)
    ]


def cells(rows: Sequence[Row]) -> list[Row]:
    """The figures of each start over its pairs: mean, sd (of a sample; None for one pair), least, greatest."""
    found = []
    for _, cell in groupby(rows, lambda row: (row["network"], row["at"])):
        pairs = [figures(row) for row in cell]
        one = {key: pairs[0][key] for key in ("network", "at", "k")}
        one |= {"density": mean(pair["density"] for pair in pairs), "pairs": len(pairs)}
        one |= {"test_acc": 1 - mean((pair["error_first"] + pair["error_second"]) / 2 for pair in pairs)}
        for prefix in ("", "aligned_") if "aligned_instability" in pairs[0] else ("",):
            values = [pair[f"{prefix}instability"] for pair in pairs]
            one |= {
                f"{prefix}instability": mean(values),
                f"{prefix}instability_sd": stdev(values) if len(values) > 1 else None,
                f"{prefix}instability_min": min(values),
                f"{prefix}instability_max": max(values),
                f"{prefix}barrier": mean(pair[f"{prefix}barrier"] for pair in pairs),
                f"{prefix}stable": mean(values) < 0.02,
            }
        found.append(one)
    return found


def finding(rows: Sequence[Row]) -> Row:
    """The figures of the last line."""
    return {
        "trials": len({row["trial"] for row in rows}),
        "copies": 1 + max(row["second"] for row in rows),
        "points": len(rows[0]["lines"]["plain"].t),
        "norms": rows[0]["lines"]["plain"].norms,
        "stable_from": {name: _stable_from(own) for name, own in _by_network(cells(rows)).items()},
        "instability": {f"{cell['network']} at {cell['at']}": round(cell["instability"], 5) for cell in cells(rows)},
    }


def _by_network(found: Sequence[Row]) -> dict[str, list[Row]]:
    names = dict.fromkeys(cell["network"] for cell in found)
    return {name: sorted((cell for cell in found if cell["network"] == name), key=lambda c: c["k"]) for name in names}


def _stable_from(own: Sequence[Row]) -> int | None:
    """The least step from which on all are stable; None where the last is not."""
    unstable = [place for place, cell in enumerate(own) if not cell["stable"]]
    first = unstable[-1] + 1 if unstable else 0
    return own[first]["k"] if first < len(own) else None


def sentence(found: Sequence[Row]) -> str:
    """The finding in one sentence."""
    parts = []
    for name, own in _by_network(found).items():
        start = _stable_from(own)
        told = ", ".join(
            f"{100 * cell['instability']:.2f} ({100 * cell['instability_min']:.2f} to "
            f"{100 * cell['instability_max']:.2f}) from step {cell['k']:,}"
            for cell in own
        )
        stable = "not stable from any of these steps on" if start is None else f"stable from step {start:,} on"
        parts.append(f"{name} ({own[0]['density']:.2%} of the weights) is {stable}: instability {told}")
    return "; ".join(parts) + f" (points of error, stable below 2, pairs: {found[0]['pairs']})."


def instability_table(found: Sequence[Row], summary: Row) -> Table:
    """One row a start, and another where lines were evaluated after matching too."""
    table = Table(
        title=f"instability in points of test error, trials: {summary['trials']}, copies: {summary['copies']}; t over "
        f"{summary['points']} points, statistics of batch norm: {summary['norms']}"
    )
    names = ("network", "density\n%", "k", "pairs", "instability\nmean", "sd", "min to max", "loss\nbarrier")
    for name in (*names, "test\nacc. %", "stable"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in found:
        for prefix in ("", "aligned_") if "aligned_instability" in cell else ("",):
            middle, sd, low, high = (cell[f"{prefix}instability{part}"] for part in ("", "_sd", "_min", "_max"))
            table.add_row(
                cell["network"] + (", matched" if prefix else ""),
                f"{100 * cell['density']:.2f}",
                f"{cell['k']:,}",
                str(cell["pairs"]),
                f"{100 * middle:.2f}",
                "" if sd is None else f"{100 * sd:.2f}",
                f"{100 * low:.2f} to {100 * high:.2f}",
                f"{cell[f'{prefix}barrier']:.4f}",
                f"{100 * cell['test_acc']:.2f}",
                "yes" if cell[f"{prefix}stable"] else "no",
            )
    return table
