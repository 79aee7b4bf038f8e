"""Pruning at chosen steps of one fit: what gradual, one-shot and N:M pruning share."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lottery_callbacks.fit_steps import counts_steps, last_step, steps_per_epoch
from lottery_callbacks.functional import masks as M
from lottery_callbacks.masked_training import log_densities
from lottery_callbacks.pruning import Pruning
from lottery_callbacks.pruning_callback import PruningCallback
from lottery_callbacks.rewinding import RewindPoint
from lottery_callbacks.ticket import Ticket


class PruningWithinFit(PruningCallback, ABC):
    """Base of the callbacks that start dense and update their masks at the steps `self.updates` of one fit.

    The update of step t comes after t optimizer steps, before the gradients of the next one: that of step 0 sees
    the initial weights. Where several are due at once (two optimizers step in one visit), the last one stands. Each
    update logs densities to the trainer's loggers, as `SparsityMonitor` does.

    Reset at the start of a fit: the masks. Kept in checkpoints, beside what `MaskedTraining` keeps: the number of
    updates done and the rule, so that a killed fit goes on to the same bits.

    Raises:
        ValueError: the pruning has rates per layer; the Trainer averages weights; an update falls behind the run's last
            step; epochs where their length is unknown; a checkpoint of another rule.
    """

    found = ("masks", "fit_masks", "updates", "done")

    def __init__(self, pruning: Pruning | None, seed: int) -> None:
        super().__init__(pruning)
        if self.pruning.rates:
            raise ValueError("rates per layer belong to levels: give a sparsity for all, and `exclude` layers")
        self.seed = seed
        self.updates: list[int] = []
        self.done = 0

    @property
    @abstractmethod
    def rule(self) -> dict[str, Any]:
        """The arguments, as JSON primitives: what a resumed fit must share, and a ticket's provenance."""

    @abstractmethod
    def steps(self, per_epoch: int) -> list[int]:
        """The optimizer steps of the updates, ascending, where an epoch has `per_epoch` of them."""

    @abstractmethod
    def update(self, trainer: L.Trainer, module: L.LightningModule, step: int, generator: torch.Generator) -> None:
        """Prune as the update of `step` says, by `change_masks`."""

    def plan(self, module: L.LightningModule) -> str:
        """What is pruned and what is left out, with the reasons, for people to read."""
        return self.pruning.plan(module)

    def ticket(self, module: L.LightningModule) -> Ticket:
        """The masks, with the present state of `module` as the rewind point.

        The trained module makes a ticket that goes on from its weights; a copy of the initial one, a ticket that
        begins anew.

        Raises:
            ValueError: there has been no fit.
        """
        if not self.fit_masks:
            raise ValueError("no fit has begun: call ticket(module) after trainer.fit")
        return Ticket(self.fit_masks, RewindPoint.of(module), self.rule | {"level": 1})

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pruning.check(pl_module)
        callbacks: list[L.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if any(isinstance(callback, WeightAveraging) for callback in callbacks):
            raise ValueError(
                f"{type(self).__name__} changes its masks, and an average over them is not sparse: leave "
                "WeightAveraging out, or prune by IterativeMagnitudePruning"
            )
        self.masks = self.pruning.initial_masks(pl_module)
        rank_zero_info(self.plan(pl_module))
        self.done = 0
        if saved := self._resumed:
            for key, own in self.rule.items():
                if saved["rule"].get(key) != own:
                    raise ValueError(
                        f"{trainer.ckpt_path} was pruned by another rule: {key} is {saved['rule'].get(key)!r} there "
                        f"and {own!r} now; resume it by its own rule"
                    )
            self.masks, self.done = saved["masks"], saved["done"]
        self.resumes(trainer)
        self.apply_masks(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        per_epoch = steps_per_epoch(trainer)
        self.updates, last = self.steps(per_epoch), last_step(trainer, per_epoch)
        if last <= self.updates[-1] and counts_steps(trainer) and not getattr(trainer, "fast_dev_run", False):
            raise ValueError(
                f"the last pruning is due at step {self.updates[-1]}, and the run's last step is {last}: "
                "prune earlier or train longer"
            )

    def visit_ends(self, per_epoch: int, last: float) -> Iterable[int] | None:
        collecting = super().visit_ends(per_epoch, last)
        return collecting if collecting is None else self.steps(per_epoch)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        due = bisect_right(self.updates, trainer.global_step)
        if due > self.done:
            step = self.updates[due - 1]
            self.update(trainer, pl_module, step, torch.Generator().manual_seed(1_000_003 * self.seed + step))
            self.done = due
            log_densities(trainer, self.masks)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.done < len(self.updates) and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"the run ended at step {trainer.global_step}, before the last pruning at step {self.updates[-1]}: "
                f"density is {M.density(self.masks):.4g}"
            )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"done": self.done, "rule": self.rule}


def provenance(pruning: Pruning) -> dict[str, Any]:
    """A rule of pruning as JSON primitives."""
    return {
        "pruning": str(pruning),
        "exclude": list(pruning.exclude),
        "include": list(pruning.include),
        "batches": pruning.batches,
    }
