"""Validation at exact optimizer steps."""

import sys
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as L

from lottery_callbacks.fit_steps import iterations, last_step, steps_per_epoch
from lottery_callbacks.functional.steps import Step


class ValidateEvery(L.Callback):
    """Validates after every so many optimizer steps of the whole fit, and after its last step.

    `Trainer.val_check_interval` counts batches, which are no optimizer steps under accumulation or with several steps a
    visit; this sets it aside (through `trainer.val_check_batch`, for each batch anew) and counts `trainer.global_step`.
    Lightning's EarlyStopping and ModelCheckpoint still take its default to mean the ends of epochs: give them
    `check_on_train_epoch_end=False` and `save_on_train_epoch_end=False`. The last step is that of `max_steps`, or of
    `max_epochs` where an epoch's length is known; of several steps in one batch the batch's end counts.

    Args:
        every: distance of validations, "100it" or "1ep".

    Raises:
        ValueError: `every` is 0 or no step string, or counts epochs of unknown length; the Trainer skips epochs, or
            validates by the clock.
    """

    def __init__(self, every: str = "1ep") -> None:
        self.every = Step.parse(every)
        if not self.every.count:
            raise ValueError(f"every={every}: give one step or epoch at least")
        self._steps, self._last, self._step = 0, 0.0, -1

    def visit_ends(self, per_epoch: int, last: float) -> Iterable[int]:
        """Its own steps; see `fit_steps`."""
        distance = self.every.in_iterations(per_epoch)
        return range(distance, int(last) + 1, distance)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.check_val_every_n_epoch not in (None, 1):
            raise ValueError("check_val_every_n_epoch and ValidateEvery both say when to validate: leave it out")
        if getattr(trainer, "_val_check_time_interval", None) is not None:
            raise ValueError("a time as val_check_interval and ValidateEvery both say when to validate: leave it out")
        per_epoch = steps_per_epoch(trainer)
        self._steps, self._last = iterations(self.every, per_epoch), last_step(trainer, per_epoch)
        self._step = -1
        self._decide(trainer)  # a resumed fit looks at once

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._decide(trainer)

    def _decide(self, trainer: L.Trainer) -> None:
        step, before = trainer.global_step, self._step
        passed = step % self._steps == 0 if before < 0 else step // self._steps > before // self._steps
        due = step > max(0, before) and (passed or step >= self._last)  # accumulation leaves the step as it was
        self._step = step
        trainer.val_check_batch = 1 if due else sys.maxsize
