"""What is known of an ordinary loader: whether it can go on inside an epoch, and which generators it holds."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from lightning.fabric.utilities.types import _Stateful
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from lottery_callbacks import random_state

KNOWN_SAMPLERS = ("torch.utils.data.", "lightning.")  # their order is a function of seeds, generators and `set_epoch`


def keeps_position(loader: Any) -> bool:
    """Whether Lightning saves and restores the loader's position, by its `state_dict` and `load_state_dict`."""
    return isinstance(loader, _Stateful)


def indexed(loader: Any) -> bool:
    """Whether the loader's order is one of indices, and nobody else keeps its position."""
    ordinary = isinstance(loader, DataLoader) and not keeps_position(loader)
    return ordinary and not isinstance(loader.dataset, IterableDataset)


def reason_to_stop(loader: Any, done: int, cycles: bool) -> str | None:
    """Why `loader` cannot go on after `done` batches of an epoch; None where it can."""
    if keeps_position(loader):
        return None
    if not isinstance(loader, DataLoader):
        return f"{type(loader).__name__} is not a DataLoader and has no state_dict"
    if not indexed(loader):
        return f"its data set {type(loader.dataset).__name__} is iterable and keeps no position"
    if cycles and done > len(loader):
        return "a shorter loader beside it has begun again within the epoch"
    unknown = [part for part in _samplers(loader) if not type(part).__module__.startswith(KNOWN_SAMPLERS)]
    if unknown and not _repeats(loader):
        return f"{type(unknown[0]).__name__} draws another order each time, from no generator or seed that it holds"
    return None


def _samplers(loader: DataLoader) -> list[Any]:
    parts = [loader.batch_sampler, loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    return [part for part in parts if part is not None]


def _repeats(loader: DataLoader, count: int = 64) -> bool:
    """Whether a copy of the loader's sampler, asked twice at one random state, gives the same order."""
    shared = {id(loader.dataset): loader.dataset}  # not copied
    try:
        sampler = copy.deepcopy(loader.batch_sampler if loader.batch_sampler is not None else loader.sampler, shared)
    except Exception:  # what cannot be copied cannot be tried without a trace
        return True
    orders = []
    for _ in range(2):
        with positioned(None, [sampler]):
            orders.append([_plain(index) for index in islice(iter(sampler), count)])
    return orders[0] == orders[1]


def _plain(index: Any) -> Any:
    return index.tolist() if hasattr(index, "tolist") else index


def collect(loaders: Sequence[Any]) -> dict[str, Any]:
    """The global random state, with that of the generators of each loader, as tensors and primitives."""
    generators = [[_state(one) for one in generators_of(loader)] for loader in loaders]
    return random_state.collect() | {"generators": generators}


def restore(state: dict[str, Any], loaders: Sequence[Any]) -> None:
    """Go back to what `collect` gave; a loader with other generators keeps the state of its own."""
    random_state.restore(state)
    for loader, saved in zip(loaders, state.get("generators", []), strict=False):
        found = generators_of(loader)
        for generator, one in zip(found, saved, strict=True) if len(found) == len(saved) else ():
            _set_state(generator, one)


def _state(source: Any) -> Any:
    return source.seed if isinstance(source, DistributedSampler) else random_state.of_generator(source)


def _set_state(source: Any, state: Any) -> None:
    if isinstance(source, DistributedSampler):
        source.seed = state
    else:
        random_state.set_generator(source, state)


@contextmanager
def positioned(state: dict[str, Any] | None, loaders: Sequence[Any], put_back: bool = True) -> Iterator[None]:
    """A block that begins at `state`, or where it is; after it the global random state is as before.

    So are the loaders' generators if they are `put_back`; else they go on from where the block left them.
    """
    before = collect(loaders if put_back else ())
    if state is not None:
        restore(state, loaders)
    try:
        yield
    finally:
        restore(before, loaders)


def generators_of(loader: Any) -> list[Any]:
    """The random generators that a loader, its samplers and its data sets hold, each once, in a fixed order.

    A `DistributedSampler` counts as one: its seed, which Lightning takes from `seed_everything`, gives its order.
    """
    found: dict[int, Any] = {}
    seen: set[int] = set()

    def search(value: Any, within: bool = False) -> None:
        if random_state.is_generator(value):
            found.setdefault(id(value), value)
        elif within or isinstance(value, DataLoader | Sampler | Dataset):
            if id(value) not in seen:
                seen.add(id(value))
                if isinstance(value, DistributedSampler):
                    found[id(value)] = value
                for name, part in vars(value).items() if hasattr(value, "__dict__") else ():
                    search(part, within="sampler" in name)  # those of one's own need not be a Sampler
        elif isinstance(value, list | tuple) and len(value) <= 64:
            for part in value:
                search(part)

    search(loader, within=True)
    return list(found.values())
