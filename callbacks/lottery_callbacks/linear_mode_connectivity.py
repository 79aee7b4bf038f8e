"""Linear mode connectivity: loss and error on the lines from what a fit has trained to other networks."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn

from lottery_callbacks import random_state
from lottery_callbacks.apply_ticket import ApplyTicket
from lottery_callbacks.fit_data import (
    load_validation_data,
    on_device,
    prepared,
    training_batches,
    validation_batches,
)
from lottery_callbacks.foreign import plain
from lottery_callbacks.functional.evaluation import Loss, Metrics, classification, evaluate_on
from lottery_callbacks.functional.in_place import preserved
from lottery_callbacks.functional.interpolation import Line, along, even, require_same_tensors
from lottery_callbacks.functional.running_statistics import Norms, batch_norms
from lottery_callbacks.iterative_magnitude_pruning import IterativeMagnitudePruning
from lottery_callbacks.messages import one_of
from lottery_callbacks.names import canonical
from lottery_callbacks.sharding import refuse_sharded
from lottery_callbacks.spawned import SpawnSafe

Place = str | os.PathLike[str]
Report = Callable[[L.Trainer, Mapping[str, Line]], object]


class LinearModeConnectivity(SpawnSafe):
    """At the end of each fit evaluates the networks on the lines from its last weights (t = 0) to others (t = 1).

    The others are the last weights of the level before and the given checkpoints; barrier and instability are those of
    `functional.interpolation.Line` (arXiv 1912.05671, 2310.18769), on the validation data that the fit sees. A monitor:
    the run, and the runs after it, are bitwise those without it, where data draw from the global random states or from
    generators of their loaders; a data set that keeps a state of its own is read as at a validation.

    `results` holds the `Line` of the last fit by name, "previous" and those of `to`. Loggers get, at the last step,
    `lmc/<name>/barrier`, `lmc/<name>/instability`, `lmc/<name>/loss@<t>` and `lmc/<name>/error@<t>`; `report` may add a
    figure, as `lottery_lightning.loggers.log_lines` does.

    The level before is known to the object that saw it, and to a fit that is resumed from a checkpoint: levels of
    `IterativeMagnitudePruning` and `ApplyTicket` go by their number, other fits by their order. Where it is not known a
    line says so; a checkpoint of it may be given in `to`. Under DDP the first process's network is evaluated, by each
    process on its own part of the data, and sums are added up.

    Kept in checkpoints: the last weights of the level before, one copy of the network, which is in memory too (CPU).
    Cost: a batch at the start, a validation a point and line; norms="reestimate": `norm_batches` more batches a point.

    Args:
        to: checkpoints of the same module, of Lightning or plain state dicts: a list, whose names are those of the
            files without suffix, or a dict by name.
        previous: whether to evaluate the line to the level before.
        points: number of even points t from 0 to 1, the ends included.
        norms: batch norm statistics inside (0, 1): "average" interpolates them, "reestimate" computes them anew.
        norm_batches: training batches that "reestimate" takes, the same at every point; kept in memory meanwhile.
        loss: of the module and a batch, the loss of each example, or these and whether each is wrong (1912.05671's
            error); it must not log. By default cross-entropy, of batches (inputs, class labels).
        network: name of the submodule that maps inputs to logits; None for the module's own `forward`.
        report: called at the end, on the first process, with the Trainer and `results`, if any; in a config a path.

    Raises:
        ValueError: before the first step, names a checkpoint that is missing or of another architecture, data that the
            loss cannot treat or that there are none of, a network that cannot be put back, a strategy that shards.
    """

    found = ("results", "_last")

    def __init__(
        self,
        to: Sequence[Place] | Mapping[str, Place] = (),
        previous: bool = True,
        points: int = 30,
        norms: Norms = "average",
        norm_batches: int = 20,
        loss: Loss | None = None,
        network: str | None = None,
        report: Report | None = None,
    ) -> None:
        even(points)  # refuses what makes no line
        if norm_batches < 1:
            raise ValueError(f"norm_batches={norm_batches} give no statistics: choose 1 or more")
        self.to = _named(to)
        self.previous, self.points, self.norm_batches = previous, points, norm_batches
        self.norms: Norms = one_of("norms", norms, ("average", "reestimate"))
        self.loss, self.network, self.report = loss, network, report
        self.results: dict[str, Line] = {}
        self._last: dict[str, Any] = {}  # "level" and "tensors" of the fit before
        self._level: int | None = None
        self._fitting = False
        if previous and "previous" in self.to:
            raise ValueError("a checkpoint is named 'previous', as is the level before: give a dict of other names")

    @property
    def state_key(self) -> str:
        return self._generate_state_key(points=self.points, norms=self.norms, network=self.network, to=sorted(self.to))

    # ---- before the first step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._fitting = stage == "fit"
        if self._fitting:
            refuse_sharded(trainer, "evaluate lines")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        target = pl_module if self.network is None else pl_module.get_submodule(self.network)
        if self.loss is None and getattr(type(target), "forward", None) is L.LightningModule.forward:
            raise ValueError(
                f"{type(target).__name__} has no forward: name the submodule that maps inputs to logits in network, "
                "or give LinearModeConnectivity a loss"
            )
        callbacks: list[L.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        levels = [c.level for c in callbacks if isinstance(c, IterativeMagnitudePruning | ApplyTicket)]
        self._level = levels[0] if levels else None
        if self._level is not None and self._last and self._last["level"] != self._level - 1:
            self._last = {}
        if self.previous and self._level and not self._last:
            rank_zero_warn(
                f"the last weights of level {self._level - 1} are not known here, and there will be no line to them: "
                "give its checkpoint in to"
            )
        for _ in self._others(_tensors(pl_module)):
            pass  # refuses what is missing or of another architecture

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._require_data(trainer)
        with preserved(pl_module), validation_batches(trainer, pl_module) as batches:
            evaluate_on(islice(batches, 1), lambda _, batch: self._measure(trainer, pl_module, batch))(pl_module)

    def _require_data(self, trainer: L.Trainer) -> None:
        load_validation_data(trainer)
        if not sum(trainer.num_val_batches):
            mend = "give the fit some, and the module a validation_step"
            raise ValueError(f"LinearModeConnectivity evaluates on validation data, and there are none: {mend}")
        if self.norms == "reestimate" and isinstance(trainer.train_dataloader, dict | list | tuple | CombinedLoader):
            raise ValueError("norms='reestimate' needs one training loader, and there are several: choose 'average'")

    # ---- after the last

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._require_data(trainer)  # a fit that was torn after its last step comes here without a start
        own: dict[str, Tensor] = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(pl_module).items()}
        own = trainer.strategy.broadcast(own)  # statistics of batch norm are each process's own
        with on_device(trainer, pl_module):
            self.results = dict(self._lines(trainer, pl_module, own))
        self._last = {"level": self._level, "tensors": own} if self.previous else {}
        for name, line in self.results.items():
            found = {"barrier": line.barrier, "instability": line.instability}
            found |= {f"loss@{t:.3f}": loss for t, loss in zip(line.t, line.losses, strict=True)}
            found |= {f"error@{t:.3f}": error for t, error in zip(line.t, line.errors, strict=True)}
            for logger in trainer.loggers:
                values = {f"lmc/{name}/{key}": value for key, value in found.items()}
                logger.log_metrics(values, step=trainer.global_step)
            rank_zero_info(f"line to {name}: barrier {line.barrier:.4g}, instability {line.instability:.4g}")
        if self.report and self.results and trainer.is_global_zero:
            self.report(trainer, self.results)

    def _lines(
        self, trainer: L.Trainer, module: L.LightningModule, own: dict[str, Tensor]
    ) -> Iterator[tuple[str, Line]]:
        names = [name for name, value in module.state_dict().items() if isinstance(value, Tensor)]
        drawn: list[Any] = []

        def measure(_: nn.Module, batch: Any) -> Tensor | tuple[Tensor, Tensor]:
            return self._measure(trainer, module, batch)

        def add_up(sums: Tensor) -> Tensor:
            return trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum")

        def evaluate(_: nn.Module) -> Metrics:
            with validation_batches(trainer, module) as batches:
                return evaluate_on(batches, measure, add_up)(module)

        def reestimate(_: nn.Module) -> None:
            drawn.extend(() if drawn else training_batches(trainer, self.norm_batches))
            with random_state.forked():
                for batch in prepared(trainer, module, drawn):
                    self._measure(trainer, module, batch)
            for norm in batch_norms(module) if trainer.world_size > 1 else ():  # each process has seen its own data
                for mean in (norm.running_mean, norm.running_var):
                    assert mean is not None
                    mean.copy_(trainer.strategy.reduce(mean.clone(), reduce_op="mean"))

        for name, other in self._others(own):
            first, second = ({key: state[canonical(key)] for key in names} for state in (own, other))
            yield name, along(module, first, second, evaluate, self.points, self.norms, reestimate)

    def _others(self, own: Mapping[str, Tensor]) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """The networks at t = 1, one after the other in memory."""
        if self.previous and self._last:
            yield "previous", _checked("previous", own, self._last["tensors"])
        for name, path in self.to.items():
            yield name, _checked(name, own, _read(path))

    def _measure(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> Tensor | tuple[Tensor, Tensor]:
        with trainer.precision_plugin.val_step_context():
            if self.loss is not None:
                return self.loss(module, batch)
            return classification(module if self.network is None else module.get_submodule(self.network), batch)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return dict(self._last)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fitting:
            self._last = dict(state_dict)


def _named(to: Sequence[Place] | Mapping[str, Place]) -> dict[str, Path]:
    if isinstance(to, str | os.PathLike):
        raise ValueError(f"to={str(to)!r} is one path: give a list of them, or a dict by name")
    pairs = list(to.items()) if isinstance(to, Mapping) else [(Path(path).stem, path) for path in to]
    named = {name: Path(path) for name, path in pairs}
    if len(named) < len(pairs):
        raise ValueError("two checkpoints have files of one name: give a dict of names and paths")
    return named


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {canonical(name): value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _checked(name: str, own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    try:
        require_same_tensors(own, other)
    except ValueError as error:
        raise ValueError(f"line to {name!r}: {error}") from None
    return other


def _read(path: Path) -> dict[str, Tensor]:
    """The network of a checkpoint, under the plain network's names."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, where bytes are no checkpoint
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is missing or no checkpoint ({why}): give one of torch or Lightning") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}: give a state dict, or a checkpoint of Lightning")
    found = found.get("state_dict", found)
    tensors, masks = plain({name: value for name, value in found.items() if isinstance(value, Tensor)})
    return tensors | {name: tensors[name] * mask for name, mask in masks.items()}
