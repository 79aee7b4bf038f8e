"""The making of a distilled set as an ordinary Lightning fit."""

import copy
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from lottery_lightning.data.augment import SiameseAugmentation
from lottery_lightning.data.distilled_set import DistilledSet, decode
from lottery_lightning.data.draws import generator
from lottery_lightning.data.preprocessing import Preprocessing
from lottery_lightning.distillation.draws import draw_network
from lottery_lightning.distillation.matching import Matching
from lottery_lightning.distillation.real_batches import indices_of_classes

PRIMITIVES = (bool, int, float, str, type(None))


class Distiller(L.LightningModule):
    """Synthetic images that a method makes like the real ones of `RealBatches`; they are all that the fit trains.

    A step decodes the images, draws an augmentation for each class (its operation and parameters are one for all real
    and synthetic images of the class), and takes a step of SGD on the method's loss, logged as `train/matching_loss`.
    Draws depend on (seed, step) alone; the method's network and memory are in the `state_dict`: a killed and resumed
    fit gives the same bits as an unbroken one. Images are not clamped. Dropout is off.

    Args:
        method: what is matched.
        network: copied and redrawn by `reset_parameters`; its own weights do not matter.
        images: to begin with, preprocessed, (n, channels, height, width).
        labels: their classes, (n,) int64; each of 0 to the highest has an image.
        factor: matching sees `decode(images, factor)`.
        augmentation: strategy of `SiameseAugmentation`, "" for none.
        seed: of all draws.

    Raises:
        ValueError: a class has no image, labels are soft, or the network cannot be redrawn.
    """

    images: nn.Parameter
    labels: Tensor
    decoded_labels: Tensor

    def __init__(
        self,
        method: Matching,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        factor: int = 1,
        augmentation: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.method, self.factor, self.seed = method, factor, seed
        self.augment = SiameseAugmentation(augmentation)
        self.images = nn.Parameter(images.detach().clone())
        self.register_buffer("labels", labels.clone())
        self.register_buffer("decoded_labels", labels.repeat_interleave(factor**2), persistent=False)
        self.of_class = indices_of_classes(self.decoded_labels)
        self.network = copy.deepcopy(network)
        draw_network(self.network, seed, "network", 0)
        self.memory = method.memory(self.network)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.of_class)

    @property
    def points_per_step(self) -> int:
        """Real images that a step reads."""
        return self.method.points_per_step(self.classes)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The matching loss of the images to a batch (classes, real_batch, channels, height, width)."""
        if (len(batch), batch.shape[2:]) != (self.classes, self.images.shape[1:]):
            raise ValueError(
                f"real images are {len(batch)} classes of {tuple(batch.shape[2:])}, synthetic ones {self.classes} of "
                f"{tuple(self.images.shape[1:])}: begin with images of the same data"
            )
        images = decode(self.images, self.factor)
        now = self.augment, self.seed, self.global_step
        self.method.prepare(self.network, self.memory, images.detach(), self.decoded_labels, *now)
        real = [self._augmented(part, label) for label, part in enumerate(batch)]
        synthetic = [self._augmented(images[part.to(images.device)], label) for label, part in enumerate(self.of_class)]
        loss = self.method.loss(self.network, real, synthetic)
        self.log("train/matching_loss", loss.detach(), batch_size=1)
        return loss

    def _augmented(self, images: Tensor, label: int) -> Tensor:
        return self.augment(images, generator(self.seed, "augmentation", self.global_step, label), same=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: see `RealBatches`."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.images], self.method.lr, self.method.momentum)

    def distilled_set(
        self, preprocessing: Preprocessing, network: str = "", provenance: Mapping[str, Any] | None = None
    ) -> DistilledSet:
        """The images as they are now.

        Args:
            preprocessing: that of the real images.
            network: what they are made for, in words; by default the network's class.
            provenance: beside `making_seed`, `steps`, `hyperparameters` (of the method) and `real_points` (so many were
                consumed).
        """
        steps = self.global_step
        own = {name: value for name, value in vars(self.method).items() if isinstance(value, PRIMITIVES)}
        points = steps * self.points_per_step
        found = {"making_seed": self.seed, "steps": steps, "real_points": points, "hyperparameters": own}
        return DistilledSet(
            self.images.detach().cpu().clone(),
            self.labels.cpu().clone(),
            preprocessing,
            self.augment.strategy,
            network or type(self.network).__name__,
            self.method.name,
            self.factor,
            found | dict(provenance or {}),
        )
