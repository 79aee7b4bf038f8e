"""What the Monte Carlo experiment found: rows, table, CSV, figure, finding and one line of JSON."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lottery_callbacks.functional.bounds import counting_size, rfss_size, rfss_size_all_targets, rss_size
from lottery_callbacks.ticket import write_atomically
from lottery_lightning.experiments.ending import conclude
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.figures import subset_sum_figure

Row = dict[str, Any]


def report(cells: Sequence[Row], eps: Sequence[float], run_dir: Path) -> None:
    """Write the tables, results.json and the figure, print table and finding, and end with one line of JSON."""
    successes = list(success_rows(cells, eps))
    errors = [{key: value for key, value in cell.items() if key != "successes"} for cell in cells]
    write_csv(run_dir / "success.csv", successes)
    write_csv(run_dir / "errors.csv", errors)
    figure = run_dir / "subset_sum.png"
    write_atomically(figure, subset_sum_figure(successes, errors))
    crossings = list(crossings_of(successes))
    found = finding(crossings, errors)
    summary = {"experiment": "subset-sum", "run_dir": str(run_dir), "trials": cells[0]["trials"], **found}
    files = f"{run_dir / 'success.csv'}, {run_dir / 'errors.csv'}, {figure}"
    conclude(summary, crossing_table(crossings), files, sentence(found), more={"crossings": crossings})


def success_rows(cells: Iterable[Row], eps: Sequence[float]) -> Iterator[Row]:
    """One row a cell and eps: success rate and its 95 % interval."""
    for cell in cells:
        for limit in eps:
            successes, trials = cell["successes"][str(limit)], cell["trials"]
            low, high = wilson(successes, trials)
            row = {key: cell[key] for key in ("size", "target", "n")} | {"eps": limit, "trials": trials}
            yield row | {"success": successes / trials, "low": round(low, 5), "high": round(high, 5)}


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a binomial proportion, of 95 % by default (Wilson 1927).

    >>> [round(end, 3) for end in wilson(50, 100)]
    [0.404, 0.596]
    """
    p, scale = successes / trials, 1 + z * z / trials
    middle = (p + z * z / (2 * trials)) / scale
    half = z / scale * (p * (1 - p) / trials + z * z / (4 * trials * trials)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def crossings_of(rows: Sequence[Row]) -> Iterator[Row]:
    """For each size, eps and kind of target whose n_c was measured: success there and at 2 n_c, beside the bounds.

    A fixed size is left out where n_c = 2k, where n begins: there even the least n has more subsets than asked.
    """
    at = {(row["size"], row["eps"], row["target"], row["n"]): row for row in rows}
    for size, eps, target in dict.fromkeys(key[:3] for key in at):
        fixed = size != "any"
        n_c = counting_size(size, eps) if fixed else rss_size(eps)
        here, twice = at.get((size, eps, target, n_c)), at.get((size, eps, target, 2 * n_c))
        if here and not (fixed and n_c == 2 * size):
            yield {
                "size": size,
                "eps": eps,
                "target": target,
                "n_hyp": rfss_size(size, eps) if fixed else None,
                "n_c": n_c,
                "n_amp": rfss_size_all_targets(size, eps) if fixed else None,
                "at_n_c": [here["success"], here["low"], here["high"]],
                "at_2_n_c": [twice["success"], twice["low"], twice["high"]] if twice else None,
            }


def finding(crossings: Sequence[Row], errors: Sequence[Row]) -> Row:
    """The figures of the one sentence: extremes of the success at n_c and 2 n_c, bits of error that a sample gains."""
    found: Row = {}
    for target in ("uniform", "zero"):
        some = [row for row in crossings if row["target"] == target and row["size"] != "any"]
        for key in ("at_n_c", "at_2_n_c"):
            if rates := [row[key][0] for row in some if row[key]]:
                found[f"{target}_{key}"] = [min(rates), max(rates)]
    points = [(row["n"], row["median_error"]) for row in errors if row["size"] == "any"]
    if len(points) > 1:
        (begin, first), (end, last) = points[len(points) // 2 if len(points) > 2 else 0], points[-1]
        found |= {"bits_a_sample_any_size": math.log2(first / last) / (end - begin), "bits_a_sample_from_n": begin}
    return found


def sentence(found: Row) -> str:
    """The finding in one sentence."""
    text = []
    if "uniform_at_n_c" in found:
        low, high = found["uniform_at_n_c"]
        text.append(f"At n_c exactly k samples reach a uniform target with probability {low:.2f} to {high:.2f}")
    if "uniform_at_2_n_c" in found:
        text.append("at 2 n_c with {:.3f} to {:.3f}".format(*found["uniform_at_2_n_c"]))
    if "zero_at_n_c" in found:
        text.append("the target 0 at n_c with {:.2f} to {:.2f}".format(*found["zero_at_n_c"]))
    if "bits_a_sample_any_size" in found:
        bits, begin = found["bits_a_sample_any_size"], found["bits_a_sample_from_n"]
        text.append(f"with subsets of any size the median error falls by {bits:.2f} bits a sample from n = {begin} on")
    return "; ".join(text) + "." if text else "No n_c was measured."


def crossing_table(crossings: Sequence[Row]) -> Table:
    """One row a kind of target, size and eps."""
    table = Table(title="success of n samples, with 95 % intervals; bounds with open constants of 1")
    for name in ("target", "k", "eps", "n_hyp", "n_c", "n_amp", "success at n_c", "at 2 n_c"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in crossings:
        cells = [str(row[key] or "") for key in ("target", "size", "eps", "n_hyp", "n_c")]
        cells.append(f"{row['n_amp']:.1e}" if row["n_amp"] else "")
        table.add_row(*cells, *(_interval(row[key]) for key in ("at_n_c", "at_2_n_c")))
    return table


def _interval(rate: Sequence[float] | None) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*rate) if rate else "not run"
