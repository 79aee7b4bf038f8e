"""What a fit consumes."""

import time
from typing import Any

import lightning.pytorch as L

from lottery_lightning.data import ShuffledTensorLoader, TensorDataModule


class Cost(L.Callback):
    """Counts what one fit consumes, also one that was killed and resumed."""

    def __init__(self) -> None:
        self._seconds, self._began = 0.0, 0.0
        self._first: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter() - self._seconds
        self._first = trainer.global_step if self._first is None else self._first

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds = time.perf_counter() - self._began

    def of(self, trainer: Any) -> dict[str, Any]:
        """The `seconds` and training `points` of its finished fit.

        Seconds include validation, and leave out what a killed fit did after its last checkpoint. Points are the
        training examples that optimizer steps drew, from the rewind point's step on; None of loaders that are not ours.
        """
        points, data = None, trainer.datamodule
        loader = data.train_dataloader() if isinstance(data, TensorDataModule) else None
        if isinstance(loader, ShuffledTensorLoader):
            points = loader.examples(trainer.global_step) - loader.examples(self._first or 0)
        return {"seconds": self._seconds, "points": points}

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - self._began, "first": self._first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds, self._first = state_dict["seconds"], state_dict["first"]
