"""The data of a fit, read once more without leaving a trace in it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import lightning.pytorch as L
from torch.utils.data import DataLoader

from lottery_callbacks import random_state
from lottery_callbacks.loader_state import positioned


def load_validation_data(trainer: L.Trainer) -> None:
    """Have the fit's validation loaders made, where Lightning has made none yet; it takes them over later.

    It makes them before the first validation: in an epoch without one, and in a fit that was torn after its last step
    and is only finished, there are none. To be called by all processes. The global random state stays.
    """
    if trainer.val_dataloaders is not None:
        return
    stage, trainer.validating = trainer.state.stage, True
    try:
        with random_state.forked():
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
    finally:
        trainer.state.stage = stage


@contextmanager
def on_device(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """A block of `on_fit_end` with the module on the fit's device: the Trainer has moved it to the CPU before."""
    module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        module.cpu()


@contextmanager
def validation_batches(trainer: L.Trainer, module: L.LightningModule) -> Iterator[Iterable[Any]]:
    """A block with the validation batches that the fit sees, for one pass, as `validation_step` gets them.

    The Trainer is `validating` in it. After it the global random state and the generators of the loaders are as before.
    `load_validation_data` comes before where Lightning may have no loaders yet.
    """
    loaders: Any = trainer.val_dataloaders
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    parts = [
        _limited(trainer, module, loader, limit, index)
        for index, (loader, limit) in enumerate(zip(loaders, trainer.num_val_batches, strict=True))
    ]
    stage, trainer.validating = trainer.state.stage, True  # hooks of batches may ask
    try:
        with _untouched(loaders):
            yield chain.from_iterable(parts)
    finally:
        trainer.state.stage = stage


def training_batches(trainer: L.Trainer, count: int) -> list[Any]:
    """The next `count` training batches of the fit's only loader, fewer where it has not so many in two epochs.

    They are raw: `prepared` makes of them what `training_step` gets. What is put back is as in `validation_batches`;
    our own loader keeps its place in the epoch, and gives batches also where the fit makes visits.
    """
    loader: Any = trainer.train_dataloader
    with _untouched([loader]):
        return list(islice(chain(loader, loader), count))  # ours goes on where the fit has ended in an epoch


def prepared(trainer: L.Trainer, module: L.LightningModule, batches: Iterable[Any], index: int = 0) -> Iterator[Any]:
    """Batches of loader `index` in the fit's precision, on its device, after the module's and the data's own hooks."""
    for batch in batches:
        batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), index)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=index)


def _limited(
    trainer: L.Trainer, module: L.LightningModule, loader: Any, limit: float, index: int
) -> Iterator[Any]:  # a generator: the loader draws when it is begun
    yield from prepared(trainer, module, islice(loader, None if limit == float("inf") else int(limit)), index)


@contextmanager
def _untouched(loaders: Sequence[Any]) -> Iterator[None]:
    """A block that may read loaders; visits are off in it.

    The global random state, the generators that loaders hold, and the places of our own are put back.
    Persistent workers are left alone: others read here, since theirs would begin anew and not draw when they should.
    """
    begun = [(loader, loader._iterator) for loader in loaders if isinstance(loader, DataLoader)]
    for loader, _ in begun:
        loader._iterator = None
    ours = [one for one in loaders if hasattr(one, "load_state_dict") and not isinstance(one, DataLoader)]
    places = [(loader, loader.state_dict(), getattr(loader, "visits", None)) for loader in ours]
    for loader, _, visits in places:
        if visits is not None:
            loader.visits = None
    try:
        with positioned(None, loaders):
            yield
    finally:
        for loader, iterator in begun:
            loader._iterator = iterator
        for loader, place, visits in places:
            loader.load_state_dict(place)
            if visits is not None:
                loader.visits = visits
