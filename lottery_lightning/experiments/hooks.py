"""Callbacks that single experiments add to their runs."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lottery_lightning.experiments.store import write_json


class StopAt(L.Callback):
    """Ends a fit at the first validation whose accuracy is at least so high; also a fit that is resumed after it."""

    def __init__(self, accuracy: float) -> None:
        self.accuracy, self.reached = accuracy, False

    def visit_ends(self, per_epoch: int, last: float) -> tuple[int, ...]:
        """None beside those of validation; see `fit_steps`."""
        return ()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.reached

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "val/acc" not in trainer.callback_metrics:
            raise ValueError("until needs 'val/acc', and the model logs none in validation_step: leave until out")
        if float(trainer.callback_metrics["val/acc"]) >= self.accuracy:
            self.reached = trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reached = state_dict["reached"]


class FirstRate(L.Callback):
    """Writes down the first optimizer's learning rate as it was made, before any schedule; None where there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def visit_ends(self, per_epoch: int, last: float) -> tuple[int, ...]:
        """None; see `fit_steps`."""
        return ()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.path.exists():
            write_json(self.path, trainer.optimizers[0].defaults.get("lr") if trainer.optimizers else None)
