"""Other states in one network: put into it, and taken out again without a trace."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """What its state dict holds, itself and not detached; extra states that are no tensors are left out."""
    return {name: value for name, value in network.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def apart(state: State, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of `state`, with copies of what lies in the network's own memory: it may be its own state dict."""
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(network).values()}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {n: t.detach().clone() if t.untyped_storage().data_ptr() in own else t for n, t in tensors.items()}


@torch.no_grad()
def load(network: nn.Module, state: State) -> None:
    """Copy `state` into the network's parameters and buffers, in place."""
    for name, tensor in tensors_of(network).items():
        tensor.copy_(state[name])


@contextmanager
def preserved(network: nn.Module) -> Iterator[None]:
    """A block that may change the network's weights, buffers, modes and gradients: they are back after it, to the bit.

    Gradients are out of the way in it. Memory: one copy of the network.

    Raises:
        ValueError: before the block, names a part that is scripted or a tensor that is expanded: neither can be put
            back.
    """
    _require_writable(network)
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


@contextmanager
def same_draws(network: nn.Module) -> Iterator[None]:
    """A block that may draw: the generators of torch for the CPU and the network's devices are put back after it."""
    devices = {tensor.device for tensor in chain(network.parameters(), network.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _require_writable(network: nn.Module) -> None:
    for name, part in network.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(f"{name or 'the network'} is scripted: give it as it was before torch.jit.script")
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        strided = tensor.layout == torch.strided
        if strided and any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"{name} is expanded, and cannot be written to: make it a tensor of its own by clone()")
