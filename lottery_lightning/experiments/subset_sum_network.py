"""A trained network with each weight replaced by a sum of random samples: Pensia's experiment, and sparser ones."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lottery_callbacks import Pruning
from lottery_callbacks.functional.subset_sum import cost, subset_sum
from lottery_lightning.experiments.runs import Training, stable_seed
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.experiments.subset_sum_network_report import report
from lottery_lightning.experiments.targets import Row, Targets, Work

SHARE = 0.02  # of a training's time, for an arm


@dataclass(frozen=True)
class Arm:
    """What each weight is replaced by; the tolerance says which errors are misses.

    Attributes:
        name: "any", "size", "smallest" or "magnitude".
        tolerance: of the smallest subsets and of the control.
        size: samples of a "size", least size of a "smallest".
    """

    name: str
    tolerance: float
    size: int | None = None

    def question(self) -> dict[str, Any]:
        """The arguments of `subset_sum`."""
        if self.name == "smallest":
            return {"tolerance": self.tolerance, "min_size": self.size}
        return {"size": self.size}

    def sizes(self, n: int) -> Sequence[int | None]:
        """All sizes that may be solved for."""
        return range(self.size or 0, n + 1) if self.name == "smallest" else [self.size]

    def __str__(self) -> str:
        if self.name == "size":
            return f"k = {self.size}"
        return {
            "any": "any size",
            "smallest": f"smallest{f' from {self.size}' if self.size else ''}, {self.tolerance:g}",
            "magnitude": f"magnitude, {self.tolerance:g}",
        }[self.name]


class SubsetSumNetwork:
    """The experiment of Pensia et al. (arXiv 2006.07990, section 4), exactly, and with subsets of fixed sizes.

    A network is trained. Then each entry of its weight matrices is replaced by the nearest sum of a subset of n random
    samples, uniform between the least and the greatest of its weights; a row of a weight (its first index) shares n
    samples, as in the published code. Biases and norm layers stay. The network is dense as before: it is not yet the
    pruned random network of the theorem, whose ticket would keep the chosen samples as edges. Sums are found on the
    CPU. Arms, on the same samples:

    - any size: the published question.
    - k: exactly k samples each (arXiv 2410.14754), for each of `sizes`.
    - smallest: the smallest subset within a tolerance, the empty one among them; *smallest from 1*: without that.
    - magnitude: the control. Weights within the tolerance of 0 are removed, all others stay as they are.

    A miss is a weight whose error is above the arm's tolerance (of any size and of k: the least). Finished arms are
    skipped on a rerun, a torn training is resumed. At the end: table, results.csv, figure, one sentence of finding, one
    line of JSON; an arm's folder has its misses.csv, where there are any.

    Args:
        model: the LightningModule; it logs `val/loss` and `test/acc`, and is initialised by `reset_parameters`.
        data: the data module; its `data_seed`, if it has one, is added to the trial's seed.
        run_dir: where everything is kept.
        n: samples of a set, at most 40.
        sizes: the fixed sizes k.
        tolerances: of the smallest subsets and of their control.
        trials: number of trials; trial t has seed `seed + t`.
        training: how the network is trained; its last weights are the target.
        seed: of the first trial.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: L.LightningDataModule,
        run_dir: Path,
        n: int = 21,
        sizes: Sequence[int] = (1, 2, 3, 4, 5, 6),
        tolerances: Sequence[float] = (0.01, 0.02, 0.03),
        trials: int = 1,
        training: Training = Training(),
        seed: int = 0,
    ) -> None:
        if not 1 <= n <= 40 or not all(1 <= size <= n for size in sizes):
            raise ValueError(f"n={n}, sizes={list(sizes)}: choose n of 1 to 40 samples and sizes of 1 to n")
        if not tolerances or min(tolerances) <= 0:
            raise ValueError(f"tolerances={list(tolerances)}: give one or more, above 0")
        self.targets = Targets(model, data, Path(run_dir), trials, training, seed)
        self.run_dir, self.n = Path(run_dir), n
        least = min(tolerances)
        self.arms = [Arm("any", least), *(Arm("size", least, size) for size in sorted(sizes))]
        self.arms += [Arm("smallest", tolerance, size) for size in (0, 1) for tolerance in tolerances]
        self.controls = [Arm("magnitude", tolerance) for tolerance in tolerances]
        names = [str(arm) for arm in (*self.arms, *self.controls)]
        if len(set(names)) < len(names):
            raise ValueError(f"sizes={list(sizes)}, tolerances={list(tolerances)}: give each of them once")

    def run(self) -> None:
        """Do what is not done yet, then report; a trial that another process works on is left to it."""
        arms = {str(arm): partial(self._approximate, arm) for arm in (*self.arms, *self.controls)}
        if rows := self.targets.run(arms, {"n": self.n}, SHARE):
            report(rows, self.run_dir, self.n)

    def _approximate(self, arm: Arm, work: Work) -> Row:
        """Replace the model's weights in place; what was found of them, and how accurate they are."""
        weights = {name: weight.detach() for name, weight in Pruning().prunable(work.model).items()}
        values = torch.cat([weight.flatten() for weight in weights.values()])
        if arm in self.controls:
            found = _remove(weights, values, arm.tolerance)
        else:
            found = self._sum(arm, work, weights, values)
        errors = (values - torch.cat([weight.flatten() for weight in weights.values()])).abs()
        found |= {"weights": len(values), "kept_ratio": found["kept"] / len(values)}
        found |= {"median_error": errors.median().item(), "max_error": errors.max().item()}
        return vars(arm) | found | {"accuracy": work.runner.test(work.run, work.model, found)}

    def _sum(self, arm: Arm, work: Work, weights: dict[str, Tensor], values: Tensor) -> Row:
        progress = work.progress
        instances = {name: (w.flatten(1), self._samples(work.seed, name, w, values)) for name, w in weights.items()}
        additions = sum(cost(*instance, arm.sizes(self.n)).additions for instance in instances.values())
        progress.console.print(
            f"trial {work.run.trial} {arm}: {len(values):,} weights, {additions:.2g} additions at most"
        )
        count: Row = {"kept": 0, "empty": 0, "misses": 0, "seconds": 0.0}
        misses: list[Row] = []
        behind = 0
        for name, (targets, samples) in instances.items():

            def tell(done: int, total: int, behind: int = behind, here: int = targets.numel()) -> None:
                progress.tell(behind + here * done // total, len(values))

            subset_sum(targets[:1, :1], samples[:1], **arm.question())  # loads what is compiled, or compiles it
            began = time.perf_counter()
            found = subset_sum(targets, samples, **arm.question(), progress=tell)
            count["seconds"] += time.perf_counter() - began
            behind += targets.numel()
            count["kept"] += int(found.sizes.sum())
            count["empty"] += int(found.empty.sum())
            for row, column in (found.errors > arm.tolerance).nonzero().tolist():
                weight, total = targets[row, column].item(), found.sums[row, column].item()
                misses.append({"layer": name, "row": row, "column": column, "weight": weight, "sum": total})
            weights[name].copy_(found.sums.view_as(weights[name]))
        if misses:
            write_csv(work.run.run_dir / "misses.csv", misses)
        return count | {"misses": len(misses)}

    def _samples(self, seed: int, name: str, weight: Tensor, values: Tensor) -> Tensor:
        """Samples of each row, uniform between the least and the greatest of all weights; the same for each arm."""
        generator = torch.Generator().manual_seed(stable_seed(seed, name, "samples"))
        unit = torch.rand(len(weight), self.n, generator=generator, dtype=torch.float64)
        return unit * (values.max() - values.min()) + values.min()


def _remove(weights: dict[str, Tensor], values: Tensor, tolerance: float) -> Row:
    """Magnitude pruning, in place, of what is within the tolerance of 0."""
    for weight in weights.values():
        weight.masked_fill_(weight.abs() <= tolerance, 0)
    kept = int((values.abs() > tolerance).sum())
    return {"kept": kept, "empty": len(values) - kept, "misses": 0, "seconds": 0.0}
