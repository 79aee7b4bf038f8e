"""Loss and error of a network on given data."""

import math
from collections.abc import Callable, Iterable
from itertools import chain
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
    """Cross-entropy of each example of a batch (inputs, class labels), and whether the highest logit is another's.

    Computed in float32 at least, on the network's device.

    Raises:
        ValueError: the batch is no such pair, or the network gives no tensor.
    """
    pair = isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not pair or batch[1].dtype != torch.int64:
        raise ValueError("the batches are no (inputs, class labels): give a loss that treats them")
    device = next(chain(network.parameters(), network.buffers()), batch[0]).device
    inputs, labels = (tensor.to(device) for tensor in batch)
    logits = network(inputs)
    if not isinstance(logits, Tensor):
        mend = "name the submodule that gives logits, or give a loss that treats it"
        raise ValueError(f"{type(network).__name__} gives a {type(logits).__name__} and no tensor: {mend}")
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
