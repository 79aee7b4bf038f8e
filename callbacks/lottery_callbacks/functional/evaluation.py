"""Loss and error of a network on given data, and a place in which to change it and put it back."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lottery_callbacks.functional.modes import evaluating

Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]


class Metrics(NamedTuple):
    """What a network scores: its mean loss, and its error (1 - accuracy); NaN where there is no accuracy."""

    loss: float
    error: float = math.nan


Evaluate = Callable[[nn.Module], Metrics]


def classification(network: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each example of a batch (inputs, class labels), and whether the highest logit is another's."""
    device = next(network.parameters()).device
    inputs, labels = (tensor.to(device) for tensor in batch)
    logits = network(inputs)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) != labels


def evaluate_on(
    batches: Iterable[Any], loss: Loss = classification, reduce: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Evaluate:
    """A function that evaluates a network: mean loss and error over all examples in one pass, in eval mode, no grad.

    Args:
        batches: a loader, or a list such as `[(images, labels)]`; it is gone through at each evaluation.
        loss: of a network and a batch, the loss of each example, or these and whether each is wrong.
        reduce: adds the sums (of losses, of wrong ones, of examples; float64 [3]) up over several processes.

    Sums are float64 on the CPU. The function raises ValueError where there is no example.
    """

    def evaluate(network: nn.Module) -> Metrics:
        sums = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad(), evaluating(network):
            for batch in batches:
                found = loss(network, batch)
                losses, wrong = found if isinstance(found, tuple) else (found, found.new_full((), math.nan))
                totals = [losses.cpu().double().sum(), wrong.cpu().double().sum()]
                sums += torch.stack([*totals, sums.new_tensor(losses.numel())])
        losses, wrong, count = reduce(sums).tolist()
        if not count:
            raise ValueError("there is no example to evaluate on: give a loader or a list, which can be read again")
        return Metrics(losses / count, wrong / count)

    return evaluate


@contextmanager
def preserved(network: nn.Module) -> Iterator[None]:
    """A block that may change the network's weights, buffers, modes and gradients: they are back after it, to the bit.

    Gradients are out of the way in it. Memory: one copy of the network.
    """
    values = [(tensor, tensor.detach().clone()) for tensor in (*network.parameters(), *network.buffers())]
    parts = [(part, dict(part._buffers), part.training) for part in network.modules()]
    gradients = [(parameter, parameter.grad) for parameter in network.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for part, buffers, training in parts:
            part._buffers.update(buffers)
            part.training = training
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
