"""Random subset sum by Monte Carlo: how often samples have a subset near a target, beside the theorems' sizes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lottery_callbacks.functional.subset_sum import cost, subset_sum
from lottery_lightning.experiments.runs import stable_seed
from lottery_lightning.experiments.store import read_json, working_on, write_json
from lottery_lightning.experiments.subset_sum_report import report
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

    Bounds stand beside it with their open constants at 1: n_c is the first n >= 2k with C(n, k) >= sqrt(k) / eps, n_hyp
    that of theorem 2, n_amp that of corollary 1, for all targets at once; of any size n_c is `rss_size`.

    Finished cells are skipped on a rerun, and shared by several processes. At the end: table, success.csv, errors.csv,
    figure, one sentence of finding, one line of JSON.

    Args:
        run_dir: where everything is kept.
        sizes: the k.
        eps: the errors that count as success, from the largest.
        trials: of each k, n and kind of target.
        largest: n of fixed sizes goes from 2k to this, at most 40.
        largest_any: n of subsets of any size goes from 2 to this; 0 leaves them out.
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
        if min(sizes) < 1 or 2 * max(sizes) > largest or max(largest, largest_any) > 40 or largest_any < 0:
            raise ValueError(f"sizes={sizes}, largest={largest}, largest_any={largest_any}: choose 2k to 40 samples")
        if len(set(sizes)) < len(sizes) or len(set(eps)) < len(eps):
            raise ValueError(f"sizes={sizes}, eps={eps}: give each of them once")
        if not 0 < min(eps) <= max(eps) < 1:
            raise ValueError(f"eps={eps} is out of range: choose 0 < eps < 1")
        self.run_dir, self.seed = Path(run_dir), seed
        self.sizes, self.eps, self.trials = sorted(sizes), sorted(eps, reverse=True), trials
        self.largest, self.largest_any = largest, largest_any

    def run(self) -> None:
        """Do what is not done yet, then report; a cell that another process works on is left to it."""
        plan = list(self.plan())
        costs = [self.trials * cost(torch.zeros(1), torch.zeros(1, n), [size]).additions / 1e6 for size, _, n in plan]
        with ExperimentProgress(sum(costs), 1, unit="million additions") as progress:
            progress.console.print(f"{len(plan)} cells of {self.trials:,} targets: {sum(costs):,.0f} million additions")
            for (size, target, n), share in zip(plan, costs, strict=True):
                name = f"{f'k = {size}' if size else 'any size'}, {target} target, n = {n}"
                progress.start(name, share)
                with working_on(self._folder(size, target, n)) as mine:
                    if mine:
                        self._do(size, target, n, progress)
                progress.finish(name if n == (self.largest if size else self.largest_any) else None)
        cells = [read_json(self._folder(*cell) / "result.json") for cell in plan]
        if any(cell is None for cell in cells):
            print("some cells are left to another process; the last to finish reports")
            return
        report(cells, self.eps, self.run_dir)

    def plan(self) -> Iterator[tuple[int | None, Target, int]]:
        """Size (None: any), kind of target and n of each cell."""
        for n in range(2, self.largest_any + 1):
            yield None, "uniform", n
        targets: tuple[Target, ...] = ("uniform", "zero")
        for size in self.sizes:
            for target in targets:
                for n in range(2 * size, self.largest + 1):
                    yield size, target, n

    def _do(self, size: int | None, target: Target, n: int, progress: ExperimentProgress) -> None:
        path = self._folder(size, target, n) / "result.json"
        if path.exists():
            return
        generator = torch.Generator().manual_seed(stable_seed(self.seed, size, target, n))
        samples = torch.rand(self.trials, n, generator=generator, dtype=torch.float64) * 2 - 1
        z = (torch.rand(self.trials, generator=generator, dtype=torch.float64) * 2 - 1) * (size or 1) ** 0.5
        found = subset_sum(z if target == "uniform" else 0 * z, samples, size=size, progress=progress.tell)
        cell = {"size": size or "any", "target": target, "n": n, "trials": self.trials}
        write_json(path, cell | self._figures(found.errors))

    def _folder(self, size: int | None, target: Target, n: int) -> Path:
        return self.run_dir / "cells" / f"{size or 'any'}_{target}_{n:02d}"

    def _figures(self, errors: Tensor) -> Row:
        quantiles = {name: errors.quantile(q).item() for name, q in QUANTILES.items()}
        return quantiles | {"successes": {str(eps): int((errors <= eps).sum()) for eps in self.eps}}
