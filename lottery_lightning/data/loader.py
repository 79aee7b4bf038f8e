"""Batches from tensors that lie on the training device: no worker processes, no collation, no copies."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lottery_lightning.data.draws import generator
from lottery_lightning.data.visits import Visit, Visits

Augment = Callable[[Tensor, torch.Generator], Tensor]


class EpochOrder:
    """The order of the training set in one epoch: a permutation that (seed, level, epoch) alone decide.

    Lightning calls `set_epoch`, as on a distributed sampler; `batch` is the next batch of the epoch.
    """

    def __init__(self, seed: int, level: int = 0) -> None:
        self.seed, self.level = seed, level
        self.epoch, self.batch = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of `epoch`; in the midst of that epoch already, stay there."""
        if epoch != self.epoch:
            self.epoch, self.batch = epoch, 0

    def permutation(self, size: int) -> Tensor:
        """Indices of this epoch, on the CPU so that every device gets the same."""
        return torch.randperm(size, generator=self._generator())

    def generator(self, rank: int) -> torch.Generator:
        """For the augmentation of the present batch: a resumed epoch goes on with the draws of an unbroken one."""
        return self._generator("batch", self.batch, rank)

    def _generator(self, *parts: object) -> torch.Generator:
        return generator(self.seed, self.level, self.epoch, *parts)


class TensorLoader:
    """An iterable of (images, labels) batches in the stored order, for evaluation.

    Args:
        images: all images, on the training device.
        labels: their labels, there too.
        batch_size: of one process; the last batch may be smaller.
        rank: this process among `world_size`; each takes every `world_size`-th example.
        world_size: number of processes.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.images, self.labels = images, labels
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-len(self._share(self.labels)) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        shares = self._share(self.images), self._share(self.labels)
        yield from zip(*(share.split(self.batch_size) for share in shares), strict=True)

    def _share(self, examples: Tensor) -> Tensor:
        return examples[self.rank :: self.world_size]


class ShuffledTensorLoader(TensorLoader):
    """The same for training: each epoch in a new order, with a position that checkpoints keep.

    Over several processes the set is cut to a multiple of `world_size`, so that all make as many steps. The
    order is called `sampler` because Lightning calls `loader.sampler.set_epoch`. `augment(images, generator)`, if
    given, changes each batch at random. With `visits` it yields `Visit`s; its length counts them, `steps_per_epoch` the
    batches, and `steps_done()` is asked how many optimizer steps the fit has made.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: EpochOrder,
        rank: int = 0,
        world_size: int = 1,
        augment: Augment | None = None,
        visits: Visits | None = None,
        steps_done: Callable[[], int] = int,
    ) -> None:
        super().__init__(images, labels, batch_size, rank, world_size)
        self.sampler = order
        self.augment = augment
        self.visits = visits
        self.steps_done = steps_done

    @property
    def steps_per_epoch(self) -> int:
        return super().__len__()

    def examples(self, steps: int) -> int:
        """How many examples the first `steps` batches of this process have, over epochs."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * len(self._share(self.labels)) + rest * self.batch_size

    def __len__(self) -> int:
        return self.visits.per_epoch if self.visits else self.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        if self.sampler.batch == self.steps_per_epoch:
            self.sampler.set_epoch(self.sampler.epoch + 1)
        order = self._share(self.sampler.permutation(len(self.labels))).to(self.labels.device).split(self.batch_size)
        if self.visits is None:
            yield from self._batches(order[self.sampler.batch :])
            return
        for end in self.visits.of_epoch(self._first_step)[self.visits_done :]:
            yield Visit(self._batches(order[self.sampler.batch : end]))

    @property
    def visits_done(self) -> int:
        """Items of this epoch that lie behind its position."""
        return self.visits.before(self.sampler.batch, self._first_step) if self.visits else self.sampler.batch

    @property
    def _first_step(self) -> int:
        return self.steps_done() - self.sampler.batch

    def _batches(self, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in order:
            self.sampler.batch += 1  # before the yield: a checkpoint made during the step counts it as done
            images = self.images[batch]
            if self.augment is not None:
                images = self.augment(images, self.sampler.generator(self.rank))
            yield images, self.labels[batch]

    def _share(self, examples: Tensor) -> Tensor:
        return super()._share(examples[: len(examples) // self.world_size * self.world_size])

    def state_dict(self) -> dict[str, int]:
        """The position in the data; Lightning keeps it in every checkpoint."""
        return {"epoch": self.sampler.epoch, "batch": self.sampler.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position."""
        self.sampler.epoch, self.sampler.batch = state["epoch"], state["batch"]
