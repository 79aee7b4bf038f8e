"""Image classification around any network."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lottery_lightning.tasks.visiting import VisitingModule


class ImageClassifier(VisitingModule):
    """Cross-entropy training of a network; it knows nothing of pruning.

    Logs `train/loss`, `val/loss`, `val/acc`, `test/loss`, `test/acc` (top-1, micro average).

    Args:
        network: maps images (batch, ...) to logits (batch, num_classes).
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning rate schedule from the optimizer; None for a constant rate.
        scheduler_interval: whether the schedule steps every "step" or every "epoch".
        num_classes: number of labels.
        steps_per_visit: optimizer steps in one call of `training_step`, with the same bits; see `VisitingModule`.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["step", "epoch"] = "step",
        num_classes: int = 10,
        steps_per_visit: int = 1,
    ) -> None:
        super().__init__(steps_per_visit)
        self.network = network
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        # NaN stays NaN; the default leaves such batches out, and "disable" forgets the weights of all.
        self.val_loss, self.test_loss = (MeanMetric(nan_strategy=torch.nan) for _ in range(2))
        self.val_acc, self.test_acc = (MulticlassAccuracy(num_classes, average="micro") for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.val_loss, self.val_acc)

    def on_validation_epoch_start(self) -> None:
        self.val_loss.reset()  # a reset in inference mode leaves tensors that a fit cannot change

    def on_test_epoch_start(self) -> None:
        self.test_loss.reset()

    def on_validation_epoch_end(self) -> None:
        self._log_means("val", self.val_loss, self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.test_loss, self.test_acc)

    def on_test_epoch_end(self) -> None:
        self._log_means("test", self.test_loss, self.test_acc)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.make_scheduler(optimizer), "interval": self.scheduler_interval}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _evaluate(self, batch: tuple[Tensor, Tensor], loss: MeanMetric, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        loss.update(F.cross_entropy(logits, labels), len(labels))

    def _log_means(self, split: str, loss: MeanMetric, accuracy: MulticlassAccuracy) -> None:
        """Once an epoch: an entry for each batch would cost a tenth of a small network's evaluation."""
        if loss.update_called:  # a subclass may evaluate and log in its own way
            self.log_dict({f"{split}/loss": loss, f"{split}/acc": accuracy})
