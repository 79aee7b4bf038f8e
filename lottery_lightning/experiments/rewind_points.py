"""A dense run that keeps its state at several steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lottery_callbacks import ApplyTicket, RewindPoint, Ticket
from lottery_callbacks.fit_steps import counts_steps, iterations, last_step, steps_per_epoch
from lottery_callbacks.functional.steps import Step
from lottery_callbacks.rewinding import refuse_unwritable


class RewindPoints(ApplyTicket):
    """Trains as `dense` does and writes the state at each step k as a ticket that keeps all weights.

    The run is bit for bit the one without it, and a fit with `ApplyTicket` of one of these tickets, in the same order
    of the data, is the rest of it (up to dropout, which the global random state draws). Captured is what
    `IterativeMagnitudePruning` rewinds to: see `RewindPoint`. Kept in checkpoints: which are written already.

    Args:
        dense: what trains all weights, as `dense_fit` makes it.
        paths: where the ticket of each step is written.

    Raises:
        ValueError: a step is not before the run's last one, is another's equal, or counts epochs of unknown length.
    """

    def __init__(self, dense: ApplyTicket, paths: Mapping[Step, Path]) -> None:
        super().__init__(dense.ticket, dense.weights, seed=dense.seed)
        self.paths = paths
        self._written: list[str] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._written = list(self._resumed.get("written", ()))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        per_epoch = steps_per_epoch(trainer)
        last = last_step(trainer, per_epoch)
        at = {step: iterations(step, per_epoch) for step in self.paths}
        for step, count in at.items():
            if count >= last and counts_steps(trainer):
                raise ValueError(f"{step} is step {count}, and the run's last step is {last}: take an earlier one")
            if same := [other for other in at if other != step and at[other] == count]:
                raise ValueError(f"{step} and {same[0]} are both step {count}: give one of them")
        if any(at.values()):
            refuse_unwritable(trainer)
        self._write([step for step in self.paths if not step.count], trainer, pl_module)  # after what is refused

    def visit_ends(self, per_epoch: int, last: float) -> list[int]:
        """The steps themselves; see `fit_steps`."""
        return [step.in_iterations(per_epoch) for step in self.paths]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        epochs = trainer.current_epoch + trainer.is_last_batch
        reached = {"it": trainer.global_step, "ep": epochs}
        self._write([step for step in self.paths if reached[step.unit] >= step.count], trainer, pl_module)

    def _write(self, steps: list[Step], trainer: L.Trainer, module: L.LightningModule) -> None:
        for step in steps:
            if str(step) not in self._written:
                Ticket(self.masks, RewindPoint.capture(trainer, module)).save(self.paths[step])
                self._written.append(str(step))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"written": list(self._written)}
