"""The order of a fit's ordinary DataLoaders: where an epoch's order was drawn, and going on inside that epoch.

Lightning begins a resumed or rewound epoch with the loader's first batch, and calls `iter` on the loader once more than
an unbroken fit does. `observe` corrects both, for every loader that is a `DataLoader` over a map-style data set:

- before each epoch's order is drawn, the random state is copied (global ones, and the generators that loader, sampler
  and data set hold);
- a fit that goes on inside an epoch draws that order again and skips the batches that were done as indices, so that no
  skipped example is loaded;
- a fit that goes on at an epoch's end draws the next order from the checkpoint's random state, as the unbroken fit did.

Loaders with `state_dict` and `load_state_dict` are left to Lightning, which keeps their position. For all others one
warning says what differs. Examples that draw random numbers in worker processes cannot be repeated inside an epoch,
since the workers' own random state is not known here; at an epoch's end they are.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, islice
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from lottery_callbacks import random_state
from lottery_callbacks.loader_state import collect, indexed, keeps_position, positioned, reason_to_stop, restore

LIGHTNING_WARNING = "You're resuming from a checkpoint that ended before the epoch ended"


class LoaderOrder:
    """The order of the training loaders of one Trainer; made by `observe`, one for all callbacks.

    Attributes:
        drawn: the random states from which the present epoch's order was drawn, by loader: "iter", before its iterator
            was made, and "first", before its first batch was asked for, where loaders without workers draw; "kept" says
            which loaders keep their workers from the epoch before.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.drawn: dict[str, Any] = {}
        self._trainer = trainer
        self._resumed: dict[str, Any] | None = None  # a checkpoint's random state, until the first epoch begins
        self._is_resumed = False
        self._saved: dict[str, Any] | None = None  # `drawn` of the epoch in which the fit goes on, until it does
        self.said: set[str] = set()  # replaced by one that outlives the Trainer, where there is one

    # ---- what callbacks use

    def state_dict(self) -> dict[str, Any]:
        """The random state of this process now, with the order of the running epoch, as tensors and primitives."""
        progress: Any = self._trainer.fit_loop.epoch_loop.batch_progress
        ended = progress.is_last_batch and progress.current.processed >= progress.current.ready
        return collect(self._loaders()) | {"order": {} if ended else dict(self.drawn)}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state_dict`; call from `on_fit_start`.

        The random state is restored now, and again before the first epoch: what is drawn in between, by the loaders
        that Lightning makes then, belongs to no unbroken fit.
        """
        random_state.restore(state)
        self._resumed, self._is_resumed, self._saved = state, True, state.get("order", {})

    def inside_epoch(self) -> dict[str, Any]:
        """`drawn` where the epoch of the batch just trained goes on after it, else empty; for rewind points."""
        ordinary = any(isinstance(loader, DataLoader) and not keeps_position(loader) for loader in self._loaders())
        if self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or not ordinary:
            return {}
        self._warn(self._trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        return dict(self.drawn)

    def rewind(self, drawn: dict[str, Any]) -> None:
        """Let the fit go on in the epoch whose order was `drawn`; its later epochs are drawn as ever."""
        self._saved, self._is_resumed = drawn, False

    # ---- what Lightning's loops call

    def _loaders(self) -> list[Any]:
        combined = self._trainer.fit_loop._combined_loader
        return [] if combined is None else combined.flattened

    def make_iterators(self, combined: CombinedLoader, make: Callable[[], Any]) -> None:
        """Have the iterators of an epoch made, each loader's after a look at the random state."""
        loaders = combined.flattened
        if not any(map(indexed, loaders)):
            self.drawn = {}
            make()
            return
        kept = [getattr(loader, "_iterator", None) is not None for loader in loaders]  # draw nothing for workers
        self.drawn = {"iter": [None] * len(loaders), "first": [None] * len(loaders), "kept": kept}
        combined._flattened = [
            _Watched(loader, partial(self._note, self.drawn, place)) for place, loader in enumerate(loaders)
        ]
        try:
            make()
        finally:
            combined._flattened = loaders
        assert combined._iterator is not None
        combined._iterator.iterables = loaders

    def _note(self, drawn: dict[str, Any], place: int, when: str, loader: Any) -> None:
        drawn[when][place] = collect([loader])

    def before_epoch(self) -> None:
        """At the start of each epoch, before its hooks."""
        if self._resumed:
            restore(self._resumed, self._loaders())
            self._resumed = None

    def after_iterators(self, fetcher: Any, setup: Any) -> None:
        """Before the first batch of an epoch; `setup` is the iterator in use before Lightning may have made another."""
        progress, batches = self._trainer.fit_loop.epoch_loop.batch_progress, self._trainer.num_training_batches
        done = progress.current.ready
        if self._saved is None or (done and (done >= batches or (progress.is_last_batch and math.isinf(batches)))):
            return  # a fit from the start, or one that only finishes an epoch
        saved, self._saved = self._saved, None
        loaders, combined = self._loaders(), self._trainer.fit_loop._combined_loader
        assert combined is not None
        if done:
            self._warn(done, saved)
        if (done or self._is_resumed) and saved and any(map(indexed, loaders)):  # the epoch had begun
            self._continue(combined, saved, done)
            if not done:  # else Lightning takes batch 0 for one that a validation follows, and validates first
                self._trainer.fit_loop.epoch_loop.restarting = False
        elif not done and self._is_resumed and combined._iterator is setup and not any(map(keeps_position, loaders)):
            iter(fetcher)  # Lightning would use the iterator that it made before the hooks of this epoch

    def _continue(self, combined: CombinedLoader, drawn: dict[str, Any], done: int) -> None:
        """Put iterators in place that go on after `done` batches of the order that was `drawn`."""
        loaders, iterator = combined.flattened, combined._iterator
        assert iterator is not None
        for place, loader in enumerate(loaders):
            if not indexed(loader):
                continue
            begun, first = drawn["iter"][place], drawn["first"][place]
            with positioned(begun, [loader], put_back=self._is_resumed):
                at = begun if drawn["kept"][place] else None if loader.num_workers else first
                rest = _skipping(loader, done, at, put_back=self._is_resumed)
                iterator.iterators[place] = iter(rest)
                loader._iterator = rest._iterator  # that of persistent workers
        iterator._idx = done
        self.drawn = dict(drawn)

    def warn_of_validation(self, step: int, left_out: str) -> None:
        """Say that a resumed fit leaves out what was due right after its checkpoint."""
        if self._is_resumed and self._saved is not None:
            self._say(
                f"the checkpoint of step {step} was written before {left_out}, which the resumed fit leaves out: write "
                "checkpoints at other steps (ModelCheckpoint(every_n_train_steps=...)), or use ResumeCheckpoint"
            )

    def _warn(self, done: int, drawn: dict[str, Any] | None = None) -> None:
        """Say once, where the loaders cannot go on after `done` batches of an epoch, what differs."""
        loaders, combined = self._loaders(), self._trainer.fit_loop._combined_loader
        cycles = len(loaders) > 1 and combined is not None and combined._mode == "max_size_cycle"
        reasons = [why for one in loaders if (why := reason_to_stop(one, done, cycles))]
        if drawn is not None and not drawn and not reasons and any(map(indexed, loaders)):
            reasons = ["the checkpoint or rewind point does not hold the order of its epoch"]
        if reasons:
            self._say(
                f"the training loader cannot go on after batch {done} of an epoch: {reasons[0]}; a fit that is resumed "
                "or rewound there sees other batches than an unbroken one. Resume or rewind at the end of an epoch "
                '(rewind="1ep"), or use a loader with state_dict and load_state_dict',
                key=reasons[0],
            )

    def _say(self, line: str, key: str = "") -> None:
        """Warn once of each `key`, which is the line itself if none is given."""
        if (key or line) not in self.said:
            self.said.add(key or line)
            rank_zero_warn(line)


def observe(trainer: L.Trainer) -> LoaderOrder:
    """The order of the Trainer's training loaders, from now on; call from `setup`, before the loaders are made."""
    loop: Any = trainer.fit_loop
    found = vars(loop).get("_loader_order")
    if found is not None:
        return found
    order = loop._loader_order = LoaderOrder(trainer)
    setup_data, load_states, reset = loop.setup_data, loop._load_combined_loader_states, loop.epoch_loop.reset
    on_run_start = loop.epoch_loop.on_run_start

    def before_epoch() -> None:  # Lightning calls it when a run begins, and then first in each epoch
        begins_run = loop._combined_loader is None
        setup_data()
        if not begins_run:
            order.before_epoch()

    def observed() -> None:  # between making the loaders and their iterators
        load_states()
        combined = loop._combined_loader
        kind: Any = type(combined)
        combined.__class__ = _observed(kind.__base__ if hasattr(kind, "observed") else kind, order)

    def quiet_reset() -> None:  # Lightning's own warning would be wrong here, or said twice
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=LIGHTNING_WARNING)
            ended = loop.epoch_loop.batch_progress.is_last_batch
            reset()
            if loop.epoch_loop.restarted_on_train_batch_end and ended:
                order.warn_of_validation(trainer.global_step, "the end of its epoch")

    def begin_epoch(fetcher: Any) -> None:
        setup = loop._combined_loader._iterator
        on_run_start(fetcher)
        epoch = loop.epoch_loop
        if epoch.restarting and epoch.restarted_on_train_batch_end and epoch._should_check_val_fx(fetcher):
            order.warn_of_validation(trainer.global_step, "the validation of that step")
        order.after_iterators(fetcher, setup)

    loop.setup_data, loop._load_combined_loader_states = before_epoch, observed
    loop.epoch_loop.reset, loop.epoch_loop.on_run_start = quiet_reset, begin_epoch
    return order


def _observed(kind: type[CombinedLoader], order: LoaderOrder) -> type[CombinedLoader]:
    """A subclass of the fit's `CombinedLoader` that copies the random state where the order of an epoch is drawn."""

    class Observed(kind):
        observed = True

        def __iter__(self) -> Any:
            order.make_iterators(self, super().__iter__)
            return self

    return Observed


class _Watched:
    """A loader that calls `note` before its iterator is made, and before the first batch."""

    def __init__(self, loader: Any, note: Callable[[str, Any], None]) -> None:
        self.loader = loader
        self.note = note

    def __iter__(self) -> Iterator[Any]:
        self.note("iter", self.loader)
        return self._batches(iter(self.loader))

    def _batches(self, iterator: Iterator[Any]) -> Iterator[Any]:
        self.note("first", self.loader)
        yield from iterator


class _Skipping:
    """Indices of a sampler, without the first `count` of its first pass, which begins at the random state `first`."""

    def __init__(self, sampler: Any, count: int, first: Callable[[], AbstractContextManager[None]]) -> None:
        self.sampler = sampler
        self.count = count
        self.first = first
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        if self.passes > 1:
            yield from self.sampler
            return
        with self.first():
            indices = iter(self.sampler)
            done = list(islice(indices, self.count or 1))
        yield from indices if self.count else chain(done, indices)  # where none is skipped, the order is drawn by one


def _skipping(loader: DataLoader, count: int, first: dict[str, Any] | None, put_back: bool) -> DataLoader:
    """A twin of `loader`, whose first pass leaves out `count` batches of the order that `first` gives.

    None is for workers that are started: they ask for the indices at once, after the draw of their own seed.
    """
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    begin = nullcontext if first is None else partial(positioned, first, [loader], put_back)
    twin = copy.copy(loader)
    vars(twin)[name] = _Skipping(getattr(loader, name), count, begin)  # a DataLoader forbids to set it
    vars(twin)["_iterator"] = None
    return twin
