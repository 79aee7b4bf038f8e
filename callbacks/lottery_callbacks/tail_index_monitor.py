"""Tail indices of weights and of gradient noise during a fit."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lottery_callbacks.fit_data import prepared, training_batches
from lottery_callbacks.fit_steps import iterations, makes_visits, steps_per_epoch
from lottery_callbacks.functional.masks import Masks
from lottery_callbacks.functional.steps import Step
from lottery_callbacks.functional.tail_index import Estimate, centred, gradient_noise, hill, log_moment
from lottery_callbacks.masked_training import MaskedTraining
from lottery_callbacks.pruning import Pruning
from lottery_callbacks.sharding import refuse_sharded
from lottery_callbacks.spawned import SpawnSafe
from lottery_callbacks.undisturbed import undisturbed


class TailIndexMonitor(SpawnSafe):
    """Estimates every so often, and at the end of each fit (a level), how heavy the tails of each layer are.

    Loggers get, for each weight that `Pruning(exclude=...)` would prune:

    - `tail_index/columns/<weight>`: Hill's estimate from the norms of the incoming weights of each neuron, or filter;
    - `tail_index/weights/<weight>`: the log-moment estimate from the weights less their median;
    - `tail_index/gradient_noise/<weight>`: the log-moment estimate from the gradients of `batches` minibatches at the
      present weights less their mean (Simsekli et al., arXiv 1901.06053).

    `estimates` holds the last ones with their intervals, by these names without `tail_index/`; see
    `functional.tail_index` for what they mean, and how little the few values of a small layer say. What is pruned is
    left out, of the noise too. Where nothing can be estimated, of too few values or after a divergence, a name is
    missing.

    A monitor: the run is bitwise that without it. Minibatches are the next of the fit's only training loader, read once
    more and put back (see `fit_data`; a data set that keeps a state of its own is read as at a validation), and go
    through `training_step` in training mode, dropout included (see `undisturbed`). Under DDP each process measures on
    its own data, and the first one's are logged.

    Kept in checkpoints: nothing. Cost of a measurement: a selection and some passes over the weights; `batches` forward
    and backward passes and as many copies of the layers' gradients.

    Args:
        every: optimizer steps or epochs between measurements, "500it" or "1ep"; None for the end of each fit alone.
        batches: minibatches for the noise, at least two; 0 leaves it out.
        exclude: names or patterns of weights to leave out.

    Raises:
        ValueError: `every` is no step or counts epochs of unknown length; a pattern matches nothing; the strategy
            shards weights; the noise is asked for, and the module optimizes by hand or has several training loaders.
    """

    found = ("estimates",)

    def __init__(self, every: str | None = "1ep", batches: int = 8, exclude: Sequence[str] = ()) -> None:
        self.every = None if every is None else Step.parse(every)
        if self.every is not None and not self.every.count:
            raise ValueError(f"every={every}: give one step or epoch at least, or None for the end of the fit alone")
        if batches < 0 or batches == 1:
            raise ValueError(f"batches={batches}: noise is seen between two batches or more; 0 leaves it out")
        self.batches = batches
        self.layers = Pruning(exclude=exclude)
        self.estimates: dict[str, Estimate] = {}
        self._steps, self._measured, self._before = 0, -1, 0

    def visit_ends(self, per_epoch: int, last: float) -> Iterable[int]:
        """Its own steps; see `fit_steps`."""
        distance = self.every.in_iterations(per_epoch) if self.every else 0
        return range(distance, int(last) + 1, distance) if distance else ()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse_sharded(trainer, "measure tails")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.layers.check(pl_module)
        self._steps = iterations(self.every, steps_per_epoch(trainer)) if self.every else 0
        self._measured, self._before = -1, trainer.global_step
        if not self.batches:
            return
        if not (pl_module.automatic_optimization or makes_visits(trainer)):
            raise ValueError(
                f"TailIndexMonitor needs the loss of training_step, and {type(pl_module).__name__} optimizes manually: "
                "leave the noise out with batches=0"
            )
        if isinstance(trainer.train_dataloader, dict | list | tuple | CombinedLoader):
            raise ValueError(
                "TailIndexMonitor takes the minibatches of one training loader, and there are several: leave the noise "
                "out with batches=0"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, before, self._before = trainer.global_step, self._before, trainer.global_step
        if self._steps and step // self._steps > before // self._steps:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._measured != trainer.global_step:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._measured = trainer.global_step
        weights: dict[str, Tensor] = dict(self.layers.prunable(module))
        self.estimates = dict(_of_weights(weights))
        if self.batches:
            gradients = list(_gradients(trainer, module, weights, self.batches))
            self.estimates |= _of_noise(gradients, _masks(trainer))
        for logger in trainer.loggers:
            values = {f"tail_index/{name}": estimate.alpha for name, estimate in self.estimates.items()}
            logger.log_metrics(values, step=trainer.global_step)


def _of_weights(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Estimate]]:
    for name, weight in weights.items():
        weight = weight.detach().double()
        yield from _estimated(f"columns/{name}", hill, weight.flatten(1).norm(dim=1))
        yield from _estimated(f"weights/{name}", lambda weight: log_moment(centred(weight)), weight)


def _of_noise(gradients: Sequence[Mapping[str, Tensor]], masks: Masks) -> dict[str, Estimate]:
    if len(gradients) < 2:
        return {}
    found: dict[str, Estimate] = {}
    for name in gradients[0]:
        noise = gradient_noise([one[name] for one in gradients])
        if name in masks:
            noise = noise[:, masks[name].to(noise.device).flatten()]
        found |= _estimated(f"gradient_noise/{name}", log_moment, noise)
    return found


def _estimated(name: str, of: Callable[[Tensor], Estimate], values: Tensor) -> list[tuple[str, Estimate]]:
    try:
        return [(name, of(values))]
    except ValueError:  # too few values, or a divergence: no reason to end a run
        return []


def _masks(trainer: L.Trainer) -> Masks:
    callbacks: list[L.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((callback.fit_masks for callback in callbacks if isinstance(callback, MaskedTraining)), {})


def _gradients(
    trainer: L.Trainer, module: L.LightningModule, weights: Mapping[str, Tensor], count: int
) -> Iterator[dict[str, Tensor]]:
    """Of each minibatch, those of the weights that its loss has; a batch without a loss is passed over."""
    step: Any = getattr(module, "loss") if makes_visits(trainer) else module.training_step  # noqa: B009
    counted = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    with undisturbed(module):  # one block for all: draws of dropout go on from batch to batch
        for index, batch in enumerate(prepared(trainer, module, training_batches(trainer, count))):
            with torch.enable_grad(), trainer.precision_plugin.train_step_context():
                output = step(batch, index) if counted else step(batch)
            loss = output["loss"] if isinstance(output, Mapping) else output
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                continue
            loss = loss if scaler is None else scaler.scale(loss)  # a scale changes no tail index
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            pairs = zip(weights.items(), found, strict=True)
            yield {name: torch.zeros_like(weight) if g is None else g for (name, weight), g in pairs}
