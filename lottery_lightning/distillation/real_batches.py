"""The real images that synthetic ones are matched to."""

from collections.abc import Callable, Iterator

import lightning.pytorch as L
import torch
from torch import Tensor

from lottery_lightning.data.draws import generator
from lottery_lightning.data.loader import TensorLoader


class RealBatches(L.LightningDataModule):
    """At step s, `real_batch` images of each class, drawn by (seed, s) alone, without replacement within a step.

    A class with fewer images is drawn whole, as often as it goes, before any image comes once more. A batch is
    (classes, real_batch, channels, height, width), on the training device, where the whole set lies. The place in the
    data is the fit's step, so that a resumed fit needs no other. Every process gets the same batches.

    One item is to be validated on: nothing, but validation is when `ResumeCheckpoint` and pictures have their turn.

    Args:
        images: the real training images, preprocessed, (n, channels, height, width).
        labels: their classes, (n,) int64; each of 0 to the highest must have an image.
        real_batch: images of a class, the method's `real_batch`.
        seed: of the draws.
        steps: of an epoch; with the fit's `max_steps` here progress bars count the whole.

    Raises:
        ValueError: a class has no image, or `labels` are no classes.
    """

    def __init__(self, images: Tensor, labels: Tensor, real_batch: int, seed: int = 0, steps: int = 1000) -> None:
        super().__init__()
        self.of_class = indices_of_classes(labels)
        self.images, self.real_batch, self.seed, self.steps = images, real_batch, seed, steps

    def setup(self, stage: str) -> None:
        if self.trainer:
            self.images = self.images.to(self.trainer.strategy.root_device)

    def batch(self, step: int) -> Tensor:
        """What `step` matches."""
        source = generator(self.seed, "real", step)
        drawn = torch.stack([_draw(indices, self.real_batch, source) for indices in self.of_class])
        return self.images[drawn.to(self.images.device)]

    def train_dataloader(self) -> "_Steps":
        return _Steps(self.batch, self.steps, lambda: self.trainer.global_step if self.trainer else 0)

    def val_dataloader(self) -> TensorLoader:
        return TensorLoader(torch.zeros(1), torch.zeros(1), 1)


class _Steps:
    """Batches from the fit's step to the end of its epoch; sized, so that Lightning reads none ahead."""

    def __init__(self, batch: Callable[[int], Tensor], steps: int, done: Callable[[], int]) -> None:
        self.batch, self.steps, self.done = batch, steps, done

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        first = self.done()
        for step in range(first, (first // self.steps + 1) * self.steps):
            yield self.batch(step)

    def state_dict(self) -> dict[str, int]:
        """The fit's step; Lightning warns of loaders that cannot say where they are."""
        return {"step": self.done()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: the resumed fit's step is the place."""


def indices_of_classes(labels: Tensor) -> list[Tensor]:
    """Where each class, from 0 to the highest, is among hard `labels`, on the CPU.

    Raises:
        ValueError: `labels` are probabilities, or a class is missing.
    """
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(f"labels are {tuple(labels.shape)} {labels.dtype}: matching takes one class an image")
    classes = int(labels.max()) + 1
    found = [(labels == label).nonzero().flatten().cpu() for label in range(classes)]
    if missing := [label for label, indices in enumerate(found) if not len(indices)]:
        raise ValueError(f"class {missing[0]} of {classes} has no image: give one of each at least")
    return found


def _draw(indices: Tensor, count: int, source: torch.Generator) -> Tensor:
    rounds = [torch.randperm(len(indices), generator=source) for _ in range(-(-count // len(indices)))]
    return indices[torch.cat(rounds)[:count]]
