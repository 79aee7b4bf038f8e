"""Random subset sum by Monte Carlo: how often samples have a subset near a target, beside the theorems' sizes."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lottery_callbacks.functional.bounds import counting_size, rfss_size, rfss_size_all_targets
from lottery_callbacks.functional.subset_sum import subset_sum
from lottery_lightning.experiments.runs import stable_seed
from lottery_lightning.experiments.store import read_json, write_csv, write_json
from lottery_lightning.figures import subset_sum_figure
from lottery_lightning.progress import ExperimentProgress

Target = Literal["uniform", "zero"]
Row = dict[str, Any]
QUANTILES = {"median_error": 0.5, "error_90": 0.9}


class SubsetSum:
    """How near the nearest subset comes, over the number n of samples, and how often within eps.

    A trial draws n samples, uniform on [-1, 1], and one target z, and finds the nearest sum of exactly k of them,
    exactly. z is uniform on [-sqrt k, sqrt k], where arXiv 2410.14754 (theorem 2) promises a success of constant
    probability, or 0, which asks for k real samples as well. With subsets of any size (arXiv 2006.07990, after Lueker)
    z is uniform on [-1, 1]. All trials are independent; a success rate has its 95 % interval (Wilson).

    Where a rate stands beside a bound, the bound's open constants are 1: n_c is the first n >= 2k with C(n, k) >=
    sqrt(k) / eps, n_hyp that of theorem 2, n_amp that of corollary 1, for all targets at once.

    Finished numbers of samples are skipped on a rerun. At the end: table, success.csv, errors.csv, figure, one sentence
    of finding, one line of JSON.

    Args:
        run_dir: where everything is kept.
        sizes: the k.
        eps: the errors that count as success, from the largest.
        trials: of each k, n and kind of target.
        largest: n of fixed sizes goes from 2k to this, at most 40.
        largest_any: n of subsets of any size goes from 2 to this.
        seed: of all draws.
    """

    def __init__(
        self,
        run_dir: Path,
        sizes: Sequence[int] = (2, 3, 4, 5, 6),
        eps: Sequence[float] = (0.1, 0.01, 0.001, 0.0001),
        trials: int = 10_000,
        largest: int = 40,
        largest_any: int = 24,
        seed: int = 0,
    ) -> None:
        if trials < 1 or not sizes or not eps:
            raise ValueError(f"trials={trials}, sizes={sizes}, eps={eps}: an experiment has at least one of each")
        if min(sizes) < 1 or 2 * max(sizes) > min(largest, 40) or max(largest, largest_any) > 40:
            raise ValueError(f"sizes={sizes}, largest={largest}, largest_any={largest_any}: 2k samples to 40")
        if not 0 < min(eps) <= max(eps) < 1:
            raise ValueError(f"eps={eps} is out of range: choose 0 < eps < 1")
        self.run_dir, self.seed = Path(run_dir), seed
        self.sizes, self.eps, self.trials = list(sizes), sorted(eps, reverse=True), trials
        self.largest, self.largest_any = largest, largest_any

    def run(self) -> None:
        """Do what is not done yet, then report."""
        plan = list(self.plan())
        rows: list[Row] = []
        with ExperimentProgress(len(plan), self.trials, unit="targets") as progress:
            for size, target, n in plan:
                progress.start(f"{_of(size)}, {target} target, n = {n}")
                rows.append(self._cell(size, target, n, progress))
                progress.finish(None)
        self._report(rows)

    def plan(self) -> Iterator[tuple[int | None, Target, int]]:
        """Size (None: any), kind of target and n of each cell."""
        for n in range(2, self.largest_any + 1):
            yield None, "uniform", n
        targets: tuple[Target, ...] = ("uniform", "zero")
        for size in self.sizes:
            for target in targets:
                for n in range(2 * size, self.largest + 1):
                    yield size, target, n

    def _cell(self, size: int | None, target: Target, n: int, progress: ExperimentProgress) -> Row:
        path = self.run_dir / "cells" / f"{size or 'any'}_{target}_{n:02d}" / "result.json"
        if (record := read_json(path)) is not None:
            return record
        generator = torch.Generator().manual_seed(stable_seed(self.seed, size, target, n))
        samples = torch.rand(self.trials, n, generator=generator, dtype=torch.float64) * 2 - 1
        z = (torch.rand(self.trials, generator=generator, dtype=torch.float64) * 2 - 1) * (size or 1) ** 0.5
        found = subset_sum(z if target == "uniform" else 0 * z, samples, size=size, progress=progress.tell)
        record = {"size": size or "any", "target": target, "n": n, "trials": self.trials} | self._figures(found.errors)
        write_json(path, record)
        return record

    def _figures(self, errors: Tensor) -> Row:
        quantiles = {name: errors.quantile(q).item() for name, q in QUANTILES.items()}
        return quantiles | {"successes": {str(eps): int((errors <= eps).sum()) for eps in self.eps}}

    def _report(self, cells: Sequence[Row]) -> None:
        successes = list(success_rows(cells, self.eps))
        errors = [{key: value for key, value in cell.items() if key != "successes"} for cell in cells]
        write_csv(self.run_dir / "success.csv", successes)
        write_csv(self.run_dir / "errors.csv", errors)
        figure = self.run_dir / "subset_sum.png"
        figure.write_bytes(subset_sum_figure(successes, errors))
        crossings = list(crossings_of(successes))
        found = finding(crossings, errors)
        summary = {"experiment": "subset-sum", "run_dir": str(self.run_dir), "trials": self.trials, **found}
        write_json(self.run_dir / "results.json", summary | {"crossings": crossings})
        console = Console()
        console.width = max(console.width, 120)
        console.print(crossing_table(crossings))
        print(f"\n{self.run_dir / 'success.csv'}, {self.run_dir / 'errors.csv'}, {figure}")
        print(sentence(found))
        print(json.dumps(summary))


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

    Left out where n_c = 2k, where n begins: there even the least n has more subsets than asked.
    """
    at = {(row["size"], row["eps"], row["target"], row["n"]): row for row in rows if row["size"] != "any"}
    for size, eps, target in sorted({key[:3] for key in at}, key=lambda key: (key[2] != "uniform", key[0], -key[1])):
        n_c = counting_size(size, eps)
        if n_c > 2 * size and (here := at.get((size, eps, target, n_c))):
            twice = at.get((size, eps, target, 2 * n_c))
            yield {
                "size": size,
                "eps": eps,
                "target": target,
                "n_hyp": rfss_size(size, eps),
                "n_c": n_c,
                "n_amp": rfss_size_all_targets(size, eps),
                "at_n_c": [here["success"], here["low"], here["high"]],
                "at_2_n_c": [twice["success"], twice["low"], twice["high"]] if twice else None,
            }


def finding(crossings: Sequence[Row], errors: Sequence[Row]) -> Row:
    """The figures of the one sentence: extremes of the success at n_c and 2 n_c, bits of error that a sample gains."""
    found: Row = {}
    for target in ("uniform", "zero"):
        some = [row for row in crossings if row["target"] == target]
        for key in ("at_n_c", "at_2_n_c"):
            if rates := [row[key][0] for row in some if row[key]]:
                found[f"{target}_{key}"] = [min(rates), max(rates)]
    points = [(row["n"], row["median_error"]) for row in errors if row["size"] == "any"]
    (n_0, first), (n_1, last) = points[len(points) // 2], points[-1]
    if n_1 > n_0:
        found["bits_a_sample_any_size"] = float(torch.tensor(first / last).log2() / (n_1 - n_0))
        found["bits_a_sample_from_n"] = n_0
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
    table = Table(title="success of exactly k of n samples, with 95 % intervals; bounds with open constants of 1")
    for name in ("target", "k", "eps", "n_hyp", "n_c", "n_amp", "success at n_c", "at 2 n_c"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in crossings:
        cells = [str(row[key]) for key in ("target", "size", "eps", "n_hyp", "n_c")] + [f"{row['n_amp']:.1e}"]
        table.add_row(*cells, *(_interval(row[key]) for key in ("at_n_c", "at_2_n_c")))
    return table


def _interval(rate: Sequence[float] | None) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*rate) if rate else "not run"


def _of(size: int | None) -> str:
    return "any size" if size is None else f"k = {size}"
