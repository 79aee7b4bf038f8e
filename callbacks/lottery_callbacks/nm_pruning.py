"""N:M pruning inside one fit."""

from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lottery_callbacks.fit_steps import iterations
from lottery_callbacks.functional.nm import indivisible, keep_n_of_m
from lottery_callbacks.functional.steps import Step
from lottery_callbacks.messages import describe
from lottery_callbacks.pruning import Pruning
from lottery_callbacks.pruning_within_fit import PruningWithinFit, provenance


class NMPruning(PruningWithinFit):
    """Keeps the N highest scores of every M consecutive weights along the input, once, and trains on.

    2:4 is the pattern that NVIDIA's sparse tensor cores take (Mishra et al., arXiv 2104.08378, whose recipe is this
    with magnitude on a trained network): after the fit, `torch.sparse.to_sparse_semi_structured(layer.weight)`
    stores a half or bfloat16 Linear weight on the GPU at half the size. Convolutions get the pattern along their
    input channels (see `functional.nm`).

    A weight whose input dimension is no multiple of M stays dense; an info line names it, and it counts as
    prunable in densities. Transposed convolutions, whose dimension 1 is the output, should be excluded.

    Args:
        n: weights kept in a group, below m.
        m: weights in a group.
        at: the step to prune at, "0it" (before the first optimizer step), "500it", "2ep".
        pruning: score and exclusions; by default magnitude. Rates and scopes other than "layerwise" are refused.
        seed: of scores that draw.

    Reset and kept: see `PruningWithinFit`. Cost: one score and one sort of groups of M.

    Raises:
        ValueError: a bad argument, a step behind the run's end, or no weight with whole groups.
    """

    def __init__(self, n: int = 2, m: int = 4, at: str = "0it", pruning: Pruning | None = None, seed: int = 0) -> None:
        super().__init__(pruning, seed)
        if not 1 <= n < m:
            raise ValueError(f"{n}:{m} is no pattern: keep n of m weights, with 1 <= n < m")
        if self.pruning.scope != "layerwise":
            raise ValueError(
                f"scope={self.pruning.scope!r} has no meaning for {n}:{m}: each group keeps n; leave it out"
            )
        if self.pruning.counts != "rounded":
            raise ValueError(
                f"counts={self.pruning.counts!r} has no meaning for {n}:{m}: each group keeps n; leave it out"
            )
        self.n, self.m = n, m
        self.at = Step.parse(at)

    @property
    def rule(self) -> dict[str, Any]:
        return provenance(self.pruning) | {"pattern": f"{self.n}:{self.m}", "at": str(self.at), "seed": self.seed}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if dense := indivisible(self.masks, self.m):
            if len(dense) == len(self.masks):
                raise ValueError(f"nothing to prune: no input dimension is a multiple of {self.m} in {describe(dense)}")
            rank_zero_info(f"left dense, the input dimension is no multiple of {self.m}: {', '.join(dense)}")

    def steps(self, per_epoch: int) -> list[int]:
        return [iterations(self.at, per_epoch)]

    def update(self, trainer: L.Trainer, module: L.LightningModule, step: int, generator: torch.Generator) -> None:
        """Prune to the pattern."""
        scores = self.pruning.scores(self.evidence(trainer, module, generator), self.masks)
        self.change_masks(trainer, module, keep_n_of_m(scores, self.masks, self.n, self.m))
