"""The strong ticket of whatever a fit has trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lottery_callbacks.chain_of import chain_of
from lottery_callbacks.fit_data import on_device, validation_batches
from lottery_callbacks.functional.modes import evaluating
from lottery_callbacks.functional.strong_edges import Inputs, Split
from lottery_callbacks.functional.strong_layer import strong_layer
from lottery_callbacks.strong_network import StrongNetwork, strong_network


class SubsetSumTicket(L.Callback):
    """At the end of a fit builds the strong ticket of the trained network, and compares them on the validation data.

    The ticket is what `strong_network` builds by subset sums (arXiv 2006.07990, 2410.14754): a random network of twice
    the depth, pruned, whose weights nobody trained. The module is left as it is; fits are not changed. Loggers get, at
    the last step, `strong/density`, `strong/kept_ratio` (kept weights for each of the target's), `strong/weight_error`
    (the largest, of the rescaled weights), `strong/output_difference` (the largest on the data), and, where batches are
    (inputs, class labels), `strong/accuracy` and `strong/target_accuracy`.

    After the fit `ticket` holds the `StrongNetwork` and `found` these figures. Under DDP each process compares on its
    own part of the data, and the first one's figures are logged. Cost: `strong_network`'s, and one pass over the data.

    Args:
        n: half the hidden units of an input.
        size: exactly that many products for each weight and sign; None for sums of any size.
        tolerance: without `size`, the smallest sums within it.
        network: name of the submodule to approximate; None for the module itself.
        split: see `strong_network`.
        inputs: "nonnegative" where the network's inputs are known to be >= 0.
        seed: of the random network.

    Raises:
        ValueError: before the first step, names a layer that cannot be treated; at the end, weights that are not
            finite, and data below 0 where they were said to be above.
    """

    def __init__(
        self,
        n: int = 30,
        size: int | None = 3,
        tolerance: float | None = None,
        network: str | None = None,
        split: Split = "sign",
        inputs: Inputs = "any",
        seed: int = 0,
    ) -> None:
        self.question: dict[str, Any] = {"n": n, "size": size, "tolerance": tolerance, "seed": seed}
        self.question |= {"split": split, "inputs": inputs}
        strong_layer(torch.zeros(1, 1), layer=0, **self.question)  # refuses what is no question, before the fit
        self.network = network
        self.ticket: StrongNetwork | None = None
        self.found: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        chain_of(self._target(pl_module))

    @torch.no_grad()
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with on_device(trainer, pl_module):
            self._build(trainer, pl_module)
        if self.ticket is not None:
            self.ticket.to("cpu")  # where Lightning leaves the module

    def _build(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        target = self._target(pl_module)
        if self.network is None and self.question["inputs"] == "nonnegative":
            with _batches(trainer, pl_module) as batches:  # before minutes of sums
                if any((inputs < 0).any() for inputs, *_ in islice(batches, 1)):
                    raise ValueError("inputs='nonnegative', but the validation data are below 0: leave it 'any'")
        self.ticket = ticket = strong_network(target, **self.question)
        self.found = {
            "strong/density": ticket.density,
            "strong/kept_ratio": sum(ticket.counts) / ticket.weights,
            "strong/weight_error": float(ticket.errors.max()),
        }
        with evaluating(pl_module):
            self.found |= self._compare(trainer, pl_module, ticket)
        for logger in trainer.loggers:
            logger.log_metrics(self.found, step=trainer.global_step)
        told = ", ".join(f"{key.removeprefix('strong/')} {value:.4g}" for key, value in self.found.items())
        rank_zero_info(f"strong ticket: {told}")

    def _compare(self, trainer: L.Trainer, module: L.LightningModule, ticket: StrongNetwork) -> dict[str, float]:
        """What the module gives for the validation data, and what it gives with the ticket in its place."""
        differences, right, count = [], [0, 0], 0
        with _batches(trainer, module) as batches:
            for inputs, *others in batches:
                found = ticket(inputs) if self.network is None else self._with(ticket, module, inputs)
                outputs = [module(inputs), found]
                differences.append((outputs[0] - outputs[1]).abs().max())
                labels = others[0] if others else None
                if _are_classes(labels, outputs[0]):
                    right = [now + int((o.argmax(1) == labels).sum()) for now, o in zip(right, outputs, strict=True)]
                    count += len(outputs[0])
        found = {"strong/output_difference": float(torch.stack(differences).max())} if differences else {}
        if count:
            found |= {"strong/target_accuracy": right[0] / count, "strong/accuracy": right[1] / count}
        return found

    def _with(self, ticket: StrongNetwork, module: L.LightningModule, inputs: Any) -> Tensor:
        target = self._target(module)
        target.forward = ticket.forward  # on the object, which may have several names in the module
        try:
            return module(inputs)
        finally:
            del target.forward

    def _target(self, module: nn.Module) -> nn.Module:
        return module if self.network is None else module.get_submodule(self.network)


def _are_classes(labels: Any, outputs: Tensor) -> bool:
    """Whether these are class labels for logits of two classes or more."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or outputs.ndim != 2:
        return False
    return labels.shape == outputs.shape[:1] and outputs.shape[1] > 1


@contextmanager
def _batches(trainer: L.Trainer, module: L.LightningModule) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Inputs and what comes with them, of the validation batches that the fit sees, where they are tensors."""
    if trainer.val_dataloaders is None:
        yield iter(())
        return
    with validation_batches(trainer, module) as batches:
        tuples = (tuple(batch) if isinstance(batch, list | tuple) else (batch,) for batch in batches)
        yield (batch for batch in tuples if batch and isinstance(batch[0], Tensor))
