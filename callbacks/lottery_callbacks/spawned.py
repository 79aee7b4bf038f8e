"""What a callback found under a strategy that spawns or forks processes, brought back to the process of the user."""

import io
import uuid
from typing import Any, Self
from weakref import WeakValueDictionary

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

_living: WeakValueDictionary[str, "SpawnSafe"] = WeakValueDictionary()


class SpawnSafe(L.Callback):
    """Base of callbacks whose results are there after `ddp_spawn`, `ddp_fork` and `ddp_notebook` too.

    Such a strategy trains a copy of each callback in another process, and Lightning brings back the weights and logged
    metrics alone. The first process sends the attributes named in `found` along with them, and they are set on the
    callback that was given to the Trainer, when `fit` returns.
    """

    found: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        self._identity = uuid.uuid4().hex
        _living[self._identity] = self
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = self._identity
        self.__dict__.update(state)
        if self._identity in _living:  # a copy within one process is another callback; one in a worker is the same
            self._identity = own

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        launcher = getattr(getattr(trainer, "strategy", None), "launcher", None)  # some strategies have none
        if stage != "fit" or not isinstance(launcher, _MultiProcessingLauncher):
            return
        others = launcher.get_extra_results  # of Lightning, and of other callbacks

        def with_own(trainer: L.Trainer) -> dict[str, Any]:
            return others(trainer) | {self._identity: _Parcel(self)}

        launcher.get_extra_results = with_own


class _Parcel:
    """Carries what a callback found through the launcher's queue; received where it is unpickled."""

    def __init__(self, callback: SpawnSafe) -> None:
        buffer = io.BytesIO()  # bytes: tensors would share memory with a process that ends
        torch.save({name: getattr(callback, name) for name in callback.found}, buffer)
        self.address, self.content = callback._identity, buffer.getvalue()

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self.address, self.content)


def _receive(address: str, content: bytes) -> None:
    if callback := _living.get(address):
        callback.__dict__.update(torch.load(io.BytesIO(content), map_location="cpu", weights_only=False))
