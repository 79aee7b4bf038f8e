"""Synaptic flow: how much of what enters a network of absolute weights passes through each of them."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lottery_callbacks.functional.modes import evaluating

NEUTRAL = {"running_mean": 0.0, "running_var": 1.0}


def synaptic_flow(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    batch: Any,
    statistics: Literal["neutral", "running"] = "neutral",
) -> dict[str, Tensor]:
    """dR/d|w| in float64 (Tanaka et al., arXiv 2006.05467), R the sum of `module(ones)` with all parameters absolute.

    `ones` has the shape of one example of the batch's first float tensor. Norm layers that keep running statistics are
    evaluated at mean 0 and variance 1, so that R is a sum of products of absolute weights, or at the absolute values of
    their own. Modes and tensors of the module stay as they are.

    Args:
        module: its `forward` takes that one tensor.
        weights: the module's own parameters whose flow is asked for, by any name.
        batch: nested tensors; only a shape is taken from them.
        statistics: "neutral", or "running", as the published code has it; see `scores.synflow`.

    Raises:
        ValueError: the batch has no floats, `forward` cannot run on one float64 example, or the flow is not positive,
            as behind layer norm, group norm or softmax, or where running means close all ReLUs.
    """
    example = next((part for part in _tensors(batch) if part.is_floating_point()), None)
    if example is None:
        raise ValueError("synflow needs an input of floats, and the batch has none: choose another score")
    own = {name: parameter.detach().abs().double() for name, parameter in module.named_parameters()}
    for name, buffer in module.named_buffers():
        value = NEUTRAL.get(name.rpartition(".")[2])
        if value is None:
            own[name] = buffer
        else:
            running = statistics == "running"
            own[name] = buffer.abs().double() if running else torch.full_like(buffer, value, dtype=torch.float64)
    actual = {id(parameter): name for name, parameter in module.named_parameters()}
    inputs = {name: own[actual[id(weight)]].requires_grad_() for name, weight in weights.items()}
    try:
        with evaluating(module), torch.enable_grad(), torch.autocast(example.device.type, enabled=False):
            ones = torch.ones_like(example[:1], dtype=torch.float64)
            outputs = torch.func.functional_call(module, own, (ones,))
            total = torch.stack([part.sum() for part in _tensors(outputs)]).sum()
            found = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True)
            found = [flow.to_dense() for flow in found]  # of an embedding it may be sparse
    except (TypeError, RuntimeError) as error:  # NotImplementedError, where there is no forward, is a RuntimeError
        forward, reason = f"{type(module).__name__}.forward", " ".join(str(error).split())[:120]
        raise ValueError(
            f"synflow cannot run {forward} on one float64 example ({reason}): choose another score"
        ) from error
    through = max(float((flow * weight.detach()).sum()) for flow, weight in zip(found, inputs.values(), strict=True))
    if through <= 1e-9 * abs(total.item()) or any(bool((flow < 0).any()) for flow in found):  # softmax: rounding
        closing = ", or running means" if statistics == "running" else ""
        raise ValueError(
            f"synflow needs a positive flow, and layer norms, group norms and softmax outputs{closing} give none: "
            "choose another score" + (", or statistics='neutral'" if closing else "")
        )
    return dict(zip(inputs, found, strict=True))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
