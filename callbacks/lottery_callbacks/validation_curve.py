"""The validation curve of a run, kept with its checkpoints."""

from typing import Any

import lightning.pytorch as L

from lottery_callbacks.functional.early_stop import early_stop_iteration, first_iteration_reaching, lowest
from lottery_callbacks.spawned import SpawnSafe


class ValidationCurve(SpawnSafe):
    """Records metrics at every validation; a monitor: it changes nothing of the run.

    `curve.rows` is a list of {"iteration": optimizer steps, metric: value, ...}. It is part of every checkpoint,
    so a resumed run has the whole curve. The sanity check is not recorded. A new fit begins a new curve.

    Args:
        loss: the logged metric to minimise.
        metrics: further logged metrics to record.
    """

    found = ("rows",)

    def __init__(self, loss: str = "val/loss", metrics: tuple[str, ...] = ("val/acc",)) -> None:
        self.loss = loss
        self.metrics = tuple(metrics)
        self.rows: list[dict[str, float]] = []
        self._fitting = False

    @property
    def state_key(self) -> str:
        return self._generate_state_key(loss=self.loss, metrics=self.metrics)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._fitting = stage == "fit"
        if self._fitting:
            self.rows = []  # a checkpoint, if any, is loaded after this

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        logged = trainer.callback_metrics
        if self.loss not in logged:
            raise ValueError(f"{self.loss!r} was not logged: there are {', '.join(logged) or 'no metrics'}")
        names = [self.loss, *(name for name in self.metrics if name in logged)]
        self.rows.append({"iteration": trainer.global_step} | {name: float(logged[name]) for name in names})

    @property
    def early_stop_iteration(self) -> int:
        """The iteration of minimum validation loss (arXiv 1803.03635); never used to stop anything."""
        return early_stop_iteration(*self._loss_curve())

    def first_iteration_reaching(self, target: float) -> int | None:
        """The first iteration whose validation loss is at most `target`, or None."""
        return first_iteration_reaching(*self._loss_curve(), target)

    @property
    def minimum(self) -> float:
        """The minimum validation loss."""
        return lowest(self._loss_curve()[1])

    def _loss_curve(self) -> tuple[list[int], list[float]]:
        return [int(row["iteration"]) for row in self.rows], [row[self.loss] for row in self.rows]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fitting:  # a test of a checkpoint leaves the curve as it is
            self.rows = [dict(row) for row in state_dict["rows"]]
