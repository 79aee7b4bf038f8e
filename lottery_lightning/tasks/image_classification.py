"""Image classification around any network."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
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
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", self.test_acc, batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        schedule: dict[str, Any] = {"scheduler": self.make_scheduler(optimizer)}
        if self.automatic_optimization:  # with visits it is stepped by hand
            schedule["interval"] = self.scheduler_interval
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _evaluate(self, split: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{split}/loss", loss, batch_size=len(labels), on_epoch=True, sync_dist=True)
        self.log(f"{split}/acc", accuracy, batch_size=len(labels), on_epoch=True)
