"""N:M masks: of every M consecutive weights along the input, N are kept (2:4: Mishra et al., arXiv 2104.08378)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lottery_callbacks.functional.masks import Masks


def keep_n_of_m(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], n: int, m: int, dims: Mapping[str, int] | None = None
) -> Masks:
    """New masks that keep the n highest scores of every m consecutive weights along the input.

    A Linear's weight (out, in) is grouped along `in`; a convolution's (out, in, height, width) along its input
    channels, for each output and place in the kernel: dimension 1 of both. Groups begin at multiples of m. A weight
    that is pruned in `masks` never returns: a group with fewer than n survivors keeps them all. Equal scores go
    from the lowest index up. Tensors that `indivisible` names keep their present mask.

    Args:
        scores: a score per weight, same names and shapes as `masks`; finite where the mask is True.
        masks: the present masks, on the scores' devices.
        n: weights kept in a group, 1 <= n <= m.
        m: weights in a group.
        dims: name -> the input dimension, where it is another than 1.

    Cost: one stable sort of groups of m.

    Raises:
        ValueError: a score is not finite, or n and m are no pattern.
    """
    if not 1 <= n <= m:
        raise ValueError(f"{n}:{m} is no pattern: keep n of m weights, with 1 <= n <= m")
    dims = dims or {}
    dense = set(indivisible(masks, m, dims))
    return {
        name: mask if name in dense else _keep(name, scores[name], mask, n, m, dims.get(name, 1))
        for name, mask in masks.items()
    }


def indivisible(masks: Mapping[str, Tensor], m: int, dims: Mapping[str, int] | None = None) -> list[str]:
    """Names of the tensors without whole groups: their input dimension is absent, or no multiple of m."""
    dims = dict.fromkeys(masks, 1) | dict(dims or {})
    return [name for name, mask in masks.items() if mask.ndim <= dims[name] or mask.shape[dims[name]] % m]


def _keep(name: str, scores: Tensor, mask: Tensor, n: int, m: int, dim: int) -> Tensor:
    if not torch.isfinite(scores[mask]).all():
        raise ValueError(f"scores of {name} are not finite: did the training diverge?")
    floats = scores.detach() if scores.is_floating_point() else scores.double()
    groups = floats.masked_fill(~mask, -torch.inf).movedim(dim, -1).unflatten(-1, (-1, m))
    lowest = torch.sort(groups, dim=-1, stable=True).indices[..., : m - n]
    kept = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, lowest, False)
    return kept.flatten(-2).movedim(-1, dim).contiguous() & mask
