"""Curvature at the end of each fit: trace, extreme eigenvalues and diagonal of the Hessian or GGN under the mask."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor

from lottery_callbacks import random_state
from lottery_callbacks.fit_data import (
    load_validation_data,
    on_device,
    prepared,
    training_batches,
    validation_batches,
)
from lottery_callbacks.functional.curvature import Curvature, Kind, Loss, require_curvlinops
from lottery_callbacks.functional.spectrum import Estimate, diagonal, extremes, seconds
from lottery_callbacks.masked_training import MaskedTraining
from lottery_callbacks.messages import one_of
from lottery_callbacks.names import named_parameters
from lottery_callbacks.sharding import refuse_sharded
from lottery_callbacks.spawned import SpawnSafe

MOST = 300  # products for the extreme eigenvalues of one matrix; 30 to 100 do as a rule
LONG = 10.0  # seconds from which on the time is said before
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class CurvatureSummary:
    """What is found of one matrix, a network's or the diagonal block of one parameter.

    Attributes:
        kept: its size, the kept coordinates.
        trace: its trace,
        trace_error: and the standard error of that; 0 where exact, NaN of one draw.
        largest: its largest eigenvalue, NaN where the search did not converge or the loss is not finite;
        smallest: its smallest.
        quantiles: of the diagonal's estimates, by `QUANTILES`, nearest rank; they are spread by their errors.
        error: the median standard error of an entry of the diagonal.
    """

    kept: int
    trace: float
    trace_error: float
    largest: float
    smallest: float
    quantiles: tuple[float, ...]
    error: float

    @property
    def mean(self) -> float:
        """The mean of the diagonal."""
        return self.trace / self.kept

    def metrics(self) -> dict[str, float]:
        """The values that loggers get, by name."""
        found = {key: value for key, value in asdict(self).items() if key not in ("kept", "quantiles", "error")}
        found |= {"diagonal/mean": self.mean, "diagonal/error": self.error}
        return found | {f"diagonal/q{round(100 * q):02d}": v for q, v in zip(QUANTILES, self.quantiles, strict=True)}


class CurvatureMonitor(SpawnSafe):
    """At the end of each fit measures the second derivatives of the mean loss at the weights that it has trained.

    Of the Hessian or the GGN in eval mode, on the coordinates that the fit's masks keep and all parameters without a
    mask (`functional.curvature`); masks are those of the callback that trains under some, if there is one. The paper
    that this follows (2310.18769) took one batch in train mode, over pruned weights too. A monitor: the run, and the
    runs after it, are bitwise those without it, where data draw from the global random states or from generators of
    their loaders. The extra `curvature` brings what it needs.

    `results` holds a `CurvatureSummary` of the last fit for "network" and, with `per_layer`, by parameter. Loggers get,
    at the last step, `curvature/<kind>/trace`, `trace_error`, `largest`, `smallest`, `diagonal/mean`, `diagonal/error`
    and `diagonal/q05` to `q95`; those of a parameter below `curvature/<kind>/<parameter>/`. Checkpoints keep nothing.

    Cost: `draws` products for trace and diagonal of all, and for the eigenvalues of each matrix 30 to 100, 300 at most;
    a product is about three passes forward and backward over the batches. One is timed, and where all may take more
    than ten seconds a line says so before. Another, over one batch, is made before the first step, so that what cannot
    be done is refused there. In memory meanwhile: the batches, and 30 vectors of the network's size.

    Under DDP the first process measures, on its own part of the data, and the others wait: no longer than the
    strategy's `timeout`. Mixed precision: the products are float32.

    Args:
        kind: "hessian" or "ggn".
        batches: so many batches of `data`, fewer where it has not as many in two epochs.
        draws: random vectors for trace and diagonal; where so few coordinates are left, both are exact.
        data: "train", the batches that would come next; or "val", the first ones.
        per_layer: whether to measure the diagonal block of each parameter too; its trace costs nothing.
        loss: of outputs and targets, the mean over a batch; cross-entropy by default.
        network: name of the submodule that maps inputs to outputs; None for the module's own `forward`.
        seed: of the random vectors, the same at each level.

    Raises:
        ValueError: before the first step, names what fits not: data, loss, precision, a strategy that shards.
    """

    found = ("results",)

    def __init__(
        self,
        kind: Kind = "hessian",
        batches: int = 10,
        draws: int = 100,
        data: str = "train",
        per_layer: bool = False,
        loss: Loss | None = None,
        network: str | None = None,
        seed: int = 0,
    ) -> None:
        self.kind: Kind = one_of("kind", kind, ("hessian", "ggn"))
        self.data = one_of("data", data, ("train", "val"))
        if min(batches, draws) < 1:
            raise ValueError(f"batches={batches}, draws={draws}: choose 1 or more of either")
        self.batches, self.draws, self.per_layer = batches, draws, per_layer
        self.loss, self.network, self.seed = loss, network, seed
        self.results: dict[str, CurvatureSummary] = {}

    # ---- before the first step

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        require_curvlinops()
        refuse_sharded(trainer, "measure curvature")
        target = self._target(pl_module)
        if getattr(type(target), "forward", None) is L.LightningModule.forward:
            raise ValueError(f"{type(target).__name__} has no forward: name the submodule that has one in network")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.data == "val":
            load_validation_data(trainer)
        if self.data == "val" and not sum(trainer.num_val_batches):
            raise ValueError("data='val' needs validation data, and there are none: give the fit some")
        if self.data == "train" and isinstance(trainer.train_dataloader, dict | list | tuple | CombinedLoader):
            raise ValueError("data='train' needs one training loader, and there are several: choose 'val'")
        matrix = self._matrix(trainer, pl_module, self._read(trainer, pl_module, 1))
        _ = matrix @ torch.ones(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)

    # ---- after the last

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.data == "val":
            load_validation_data(trainer)
        with on_device(trainer, pl_module):
            found = self._measure(trainer, pl_module) if trainer.is_global_zero else {}
        self.results = trainer.strategy.broadcast(found)
        values = {}
        for name, summary in self.results.items():
            place = f"curvature/{self.kind}" if name == "network" else f"curvature/{self.kind}/{name}"
            values |= {f"{place}/{key}": value for key, value in summary.metrics().items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, CurvatureSummary]:
        batches = self._read(trainer, module, self.batches)
        whole = self._matrix(trainer, module, batches)
        layers = [name for name, size in whole.sizes.items() if size] if self.per_layer else []
        products = min(self.draws, whole.shape[0]) + MOST * (1 + len(layers))
        if (expected := seconds(whole, products)) > LONG:
            rank_zero_info(f"curvature ({self.kind}): up to {products} products, up to {expected:.0f} s")
        generator = torch.Generator().manual_seed(self.seed)
        found = diagonal(whole, generator, self.draws, list(whole.sizes.values()))
        results = {"network": _summary(whole, found.trace(), found.values, found.errors, generator)}
        parts = zip(
            whole.sizes, *(v.split(list(whole.sizes.values())) for v in (found.values, found.errors)), strict=True
        )
        for part, (name, values, errors) in enumerate(parts):
            if name in layers:
                block = self._matrix(trainer, module, batches, name)
                results[name] = _summary(block, found.trace(part), values, errors, generator)
        summary = results["network"]
        rank_zero_info(
            f"curvature ({self.kind}): trace {summary.trace:.4g} +- {summary.trace_error:.2g}, "
            f"eigenvalues from {summary.smallest:.4g} to {summary.largest:.4g}"
        )
        return results

    def _matrix(
        self, trainer: L.Trainer, module: L.LightningModule, batches: Sequence[Any], name: str | None = None
    ) -> Curvature:
        """Of all trained parameters of the network, or of the one of that name."""
        callbacks: list[L.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        masks = next((callback.fit_masks for callback in callbacks if isinstance(callback, MaskedTraining)), {})
        target = self._target(module)
        inside = set(target.parameters())
        parameters = {
            key: parameter
            for key, parameter in named_parameters(module).items()
            if parameter in inside and (parameter.requires_grad if name is None else key == name)
        }
        masks = {key: mask for key, mask in masks.items() if key in parameters}
        return Curvature(target, batches, self.loss, self.kind, masks, parameters)

    def _read(self, trainer: L.Trainer, module: L.LightningModule, count: int) -> list[Any]:
        if self.data == "val":
            with validation_batches(trainer, module) as batches:
                return list(islice(batches, count))
        with random_state.forked():
            return list(prepared(trainer, module, training_batches(trainer, count)))

    def _target(self, module: L.LightningModule) -> torch.nn.Module:
        return module if self.network is None else module.get_submodule(self.network)


def _summary(
    matrix: Curvature, trace: Estimate, values: Tensor, errors: Tensor, generator: torch.Generator
) -> CurvatureSummary:
    try:
        ends = extremes(matrix, generator, most=MOST)
        largest, smallest = float(ends.largest), float(ends.smallest)
    except RuntimeError as error:  # a monitor ends no run
        rank_zero_warn(str(error))
        largest = smallest = math.nan
    ranks = values.sort().values
    quantiles = tuple(float(ranks[round(q * (len(ranks) - 1))]) for q in QUANTILES)
    return CurvatureSummary(matrix.shape[0], *trace, largest, smallest, quantiles, float(errors.median()))
