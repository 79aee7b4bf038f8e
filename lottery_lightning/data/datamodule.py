"""The base of our data modules: whole sets as tensors on the training device."""

from collections.abc import Mapping
from typing import Literal

import lightning.pytorch as L
import torch
from torch import Tensor

from lottery_lightning.data.loader import Augment, EpochOrder, ShuffledTensorLoader, TensorLoader
from lottery_lightning.data.preprocessing import Preprocessing
from lottery_lightning.data.visits import Visits

Split = tuple[Tensor, Tensor]


class TensorDataModule(L.LightningDataModule):
    """Serves train, validation and test sets that fit on the device; a data set is a subclass with `load`.

    A subclass may set `augmentation`, which changes each training batch by draws of (data_seed, level, epoch, batch),
    and `preprocessing`, which says what made its images of pixels; a distilled set of it needs that.

    Args:
        batch_size: training batch of one process.
        eval_batch_size: batch of validation, test and prediction.
        data_seed: decides the order of the training data and its augmentation, with the level and the epoch.
        data_order: "new" shuffles anew at every level; "repeat" gives every level the order of level 0.
        split_seed: decides which training examples are held out for validation.
    """

    preprocessing: Preprocessing | None = None

    def __init__(
        self,
        batch_size: int = 60,
        eval_batch_size: int = 1000,
        data_seed: int = 0,
        data_order: Literal["new", "repeat"] = "new",
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise ValueError(f"batch_size={batch_size}, eval_batch_size={eval_batch_size}: both must be positive")
        if data_order not in ("new", "repeat"):
            raise ValueError(f"data_order={data_order!r} is not known: choose new or repeat")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.data_seed, self.data_order, self.split_seed = data_seed, data_order, split_seed
        self.level = 0
        self.splits: dict[str, Split] = {}
        self.augmentation: Augment | None = None
        self.visits: Visits | None = None

    def load(self) -> Mapping[str, Split]:
        """The splits "train", "val" and "test" as (images float32, labels int64), normalised, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must define load()")

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Images of pixels in [0, 1], (n, channels, height, width), by `preprocessing`: for `load` of a subclass."""
        return pixels if self.preprocessing is None else self.preprocessing(pixels)

    def set_level(self, level: int) -> None:
        """Called by the lottery's callbacks before each fit: each level has an order of its own."""
        self.level = level if self.data_order == "new" else 0

    def setup(self, stage: str) -> None:
        """Read the set once and keep it on the training device."""
        if stage == "fit":
            self.visits = None  # a task that makes visits says so anew at each fit
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        splits = self.splits or self.load()
        self.splits = {name: (images.to(device), labels.to(device)) for name, (images, labels) in splits.items()}

    def train_dataloader(self) -> ShuffledTensorLoader:
        order = EpochOrder(self.data_seed, self.level)
        kept = self.augmentation, self.visits, lambda: self.trainer.global_step if self.trainer else 0
        return ShuffledTensorLoader(*self.splits["train"], self.batch_size, order, *self._place(), *kept)

    def val_dataloader(self) -> TensorLoader:
        return TensorLoader(*self.splits["val"], self.eval_batch_size, *self._place())

    def test_dataloader(self) -> TensorLoader:
        return TensorLoader(*self.splits["test"], self.eval_batch_size, *self._place())

    def predict_dataloader(self) -> TensorLoader:
        return self.test_dataloader()

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def hold_out(images: Tensor, labels: Tensor, held: int, seed: int) -> tuple[Split, Split]:
    """Split off `held` random examples: (the rest, the held ones), decided by `seed` alone.

    Raises:
        ValueError: there are not so many.
    """
    if not 0 < held < len(labels):
        raise ValueError(f"cannot hold out {held} of {len(labels)} examples for validation")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rest, out = order[held:], order[:held]
    return (images[rest], labels[rest]), (images[out], labels[out])
