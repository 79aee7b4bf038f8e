"""Tensors that are divided by norms of their slices, as in weight normalisation: no slice may be all zero (0 / 0)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lottery_callbacks.functional.scopes import Budget

WHOLE = -1  # the dimension whose only slice is the whole tensor


def alive(masks: Mapping[str, Tensor], dims: Mapping[str, int]) -> dict[str, int]:
    """How many slices of each tensor of `dims` keep a weight."""
    return {name: int(_slices(masks[name], dim).any(1).sum()) for name, dim in dims.items()}


def empty(masks: Mapping[str, Tensor], dims: Mapping[str, int]) -> dict[str, int]:
    """The tensors of `dims` with slices that keep no weight, and how many of them there are."""
    missing = {name: int((~_slices(masks[name], dim).any(1)).sum()) for name, dim in dims.items()}
    return {name: count for name, count in missing.items() if count}


def protect(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], dims: Mapping[str, int]) -> dict[str, Tensor]:
    """The scores, with the highest surviving one of each slice raised above all others.

    Args:
        scores: a score per weight, same names, shapes and devices as `masks`.
        masks: the present masks.
        dims: name -> the dimension over whose indices the slices run, or `WHOLE`; other tensors are left as they are.
    """
    protected = dict(scores)
    for name, dim in dims.items():
        raised = scores[name].detach().double().clone()
        slices = _slices(raised.masked_fill(~masks[name], -torch.inf), dim)
        first = torch.zeros_like(slices, dtype=torch.bool).scatter_(1, slices.argmax(1, keepdim=True), True)
        first = first.view(raised.shape if dim == WHOLE else raised.movedim(dim, 0).shape)
        first = first if dim == WHOLE else first.movedim(0, dim)
        protected[name] = raised.masked_fill_(first & masks[name] & raised.isfinite(), torch.finfo(torch.float64).max)
    return protected


def at_least(budget: Budget, masks: Mapping[str, Tensor], dims: Mapping[str, int]) -> Budget:
    """The budget, raised where it is below one weight for each slice that is alive."""
    least = alive(masks, dims)
    return {names: max(keep, sum(least.get(name, 0) for name in names)) for names, keep in budget.items()}


def _slices(tensor: Tensor, dim: int) -> Tensor:
    """(slices, weights in each)."""
    return tensor.reshape(1, -1) if dim == WHOLE else tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
