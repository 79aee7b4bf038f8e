"""Gradual and one-shot pruning inside one fit."""

from typing import Any

import lightning.pytorch as L
import torch

from lottery_callbacks.fit_steps import iterations
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.schedules import budget_at, cubic, geometric, updates
from lottery_callbacks.functional.steps import Step
from lottery_callbacks.pruning import Pruning, warn_of_collapse
from lottery_callbacks.pruning_within_fit import PruningWithinFit, provenance


class GradualPruning(PruningWithinFit):
    """Prunes to `sparsity` while it trains (Zhu & Gupta, arXiv 1710.01878), by any score.

    ```python
    GradualPruning(0.9, begin="500it", end="5ep", every="100it")                      # magnitude, cubic schedule
    GradualPruning(0.9, pruning=Pruning(score="snip", scope="global"))                # at initialisation
    GradualPruning(0.9, pruning=Pruning(score="synflow", scope="global"), rounds=100)
    ```

    At step t of an update the sparsity is s_f + (s_i - s_f)(1 - (t - begin) / (end - begin))^3 and each group of the
    scope keeps exactly total - round(s_t * total) weights, one at least. A pruned weight never returns. Deviation
    from the paper: `end` is an update also where `every` does not divide its distance from `begin`.
    `begin == end`, the default, prunes once; at "0it" before the first optimizer step.

    Args:
        sparsity: s_f, the fraction of prunable weights removed in the end, in (0, 1).
        begin: the first update, "0it", "500it" or "2ep".
        end: the last update; by default `begin`.
        every: distance between updates.
        pruning: score, scope and exclusions; by default magnitude, layerwise. Rates per layer are refused.
        initial: s_i, the sparsity of the first update where it is not the last.
        rounds: times that one update scores anew, each removing the same fraction of the survivors: the densities
            d^(i / rounds) of SynFlow (Tanaka et al., arXiv 2006.05467, 100 rounds), whose code truncates the counts
            that are rounded here: `Pruning(counts="truncated")`.
        seed: of scores that draw.

    Reset and kept: see `PruningWithinFit`. Cost: `rounds` scores and selections an update.

    Raises:
        ValueError: a bad argument, or a schedule that does not fit the run; each names the mend.
    """

    def __init__(
        self,
        sparsity: float,
        begin: str = "0it",
        end: str | None = None,
        every: str = "100it",
        pruning: Pruning | None = None,
        initial: float = 0.0,
        rounds: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(pruning, seed)
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity={sparsity} is outside (0, 1): it is the fraction of prunable weights removed")
        if not 0 <= initial <= sparsity:
            raise ValueError(f"initial={initial} is outside [0, {sparsity}]: it is the sparsity to begin with")
        if rounds < 1:
            raise ValueError(f"rounds={rounds}: an update scores once at least")
        self.sparsity = sparsity
        self.begin, self.end, self.every = Step.parse(begin), Step.parse(end or begin), Step.parse(every)
        self.initial = initial
        self.rounds = rounds

    @property
    def rule(self) -> dict[str, Any]:
        return provenance(self.pruning) | {
            "sparsity": self.sparsity,
            "begin": str(self.begin),
            "end": str(self.end),
            "every": str(self.every),
            "initial": self.initial,
            "rounds": self.rounds,
            "seed": self.seed,
        }

    def steps(self, per_epoch: int) -> list[int]:
        begin, end = (iterations(step, per_epoch) for step in (self.begin, self.end))
        return [begin] if begin == end else updates(begin, end, iterations(self.every, per_epoch))

    def update(self, trainer: L.Trainer, module: L.LightningModule, step: int, generator: torch.Generator) -> None:
        """Prune to the sparsity of `step`, in rounds; a round that would remove nothing scores nothing."""
        before, scores = self.masks, {}
        for target in geometric(M.density(before), self._sparsity(step), self.rounds):
            budget = budget_at(target, self.masks, self.pruning.scope, self.pruning.counts)
            if sum(budget.values()) < sum(M.kept(self.masks).values()):
                evidence = self.evidence(trainer, module, generator)
                scores = self.pruning.scores(evidence, self.masks)
                self.change_masks(trainer, module, self.pruning.select(evidence, scores, self.masks, budget))
        if self.masks is not before:
            following = next((after for after in self.updates if after > step), step)
            budget = budget_at(self._sparsity(following), self.masks, self.pruning.scope, self.pruning.counts)
            warn_of_collapse(before, self.masks, M.keep_highest(scores, self.masks, budget))

    def _sparsity(self, step: int) -> float:
        return cubic(step, self.updates[0], self.updates[-1], self.sparsity, self.initial)
