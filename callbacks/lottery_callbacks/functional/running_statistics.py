"""Running statistics of norms: which layers keep them, and what they are on given data."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lottery_callbacks.functional.modes import evaluating

Norms = Literal["average", "reestimate"]


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """The batch norm layers that keep running statistics."""
    return [part for part in network.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


def treatment(network: nn.Module, norms: Norms) -> str:
    """What becomes of its running statistics, as a result records it.

    "none" where there are none; "average" where instance norm alone keeps some, since these are not re-estimated.
    """
    if batch_norms(network):
        return norms
    kept = any(isinstance(part, _NormBase) and part.running_mean is not None for part in network.modules())
    return "average" if kept else "none"


@torch.no_grad()
def estimate_anew(network: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """Batch norm's running statistics become the means over the batches that `run(network)` runs through the network.

    They are reset first. Batch norm alone is in train mode, each batch counts the same, nothing is differentiated. Of
    lower precisions the layers compute in float32 meanwhile and the means are rounded once at the end: a mean that is
    kept up in bfloat16 stands still after some dozen batches.

    Raises:
        ValueError: `run` ran no batch.
    """
    norms = batch_norms(network)
    with evaluating(network), ExitStack() as stack:
        for norm in norms:
            stack.enter_context(_averaging(norm))
        run(network)
        if not any(norm.num_batches_tracked for norm in norms):
            raise ValueError(
                "reestimate ran no batch through the batch norm layers: run the network over training inputs"
            )


@contextmanager
def _averaging(norm: _BatchNorm) -> Iterator[None]:
    momentum, counter = norm.momentum, norm.num_batches_tracked
    tensors = [*norm.parameters(), *norm.buffers()]
    low = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    for tensor, values in low:
        tensor.data = values.float()
    if counter is None:  # torch does without, but then it cannot average
        norm.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    norm.reset_running_stats()
    norm.momentum, norm.training = None, True
    try:
        yield
    finally:
        norm.momentum, norm.training, norm.num_batches_tracked = momentum, False, counter
        for tensor, values in low:
            tensor.data = values.copy_(tensor.data)
