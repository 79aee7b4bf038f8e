"""Edge-popup: masks from scores that are trained over weights that stay random (Ramanujan et al., arXiv 1911.13299).

A network computes with W * h, where h = 1 for the highest |s| and the weights W never change; the scores s are trained.
Random numbers are drawn on the CPU from (seed, name of the layer) alone: neither the order of the layers, nor the
device, nor a global random state decides them.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lottery_callbacks.functional.masks import Masks
from lottery_callbacks.functional.scopes import COUNTS, Budget

Weights = Literal["kaiming_normal", "signed_constant", "scaled_kaiming_normal", "scaled_signed_constant", "module"]
Scores = Literal["kaiming_uniform", "magnitude"]
Scope = Literal["layerwise", "layerwise_truncated", "global", "threshold"]
MANY = 1 << 13  # numbers from which on a histogram is faster than a selection among all


def random_weights(name: str, shape: torch.Size, kind: str, density: float, seed: int) -> Tensor:
    """The fixed weights W of one layer, float32 on the CPU.

    - "kaiming_normal": N(0, 2 / fan_in), section 3.2 of the paper; "signed_constant": +-sqrt(2 / fan_in), whose signs
      are those of the normal draw of the same seed, as in the published code.
    - "scaled_kaiming_normal", "scaled_signed_constant": the same with the variance 2 / (density * fan_in), so that
      the kept weights pass on as much as all would. The published code multiplies fan_in by 1 - density, which is
      the same at one half alone.

    fan_in is the size of `weight[0]`, as torch counts it: that of a group in grouped convolutions.
    """
    deviation = math.sqrt(2 / (math.prod(shape[1:]) * (density if kind.startswith("scaled") else 1)))
    normal = torch.randn(shape, generator=_generator("weights", name, seed))
    return torch.copysign(torch.tensor(deviation), normal) if kind.endswith("constant") else normal.mul_(deviation)


def initial_scores(name: str, weights: Tensor, kind: str, seed: int) -> Tensor:
    """The scores s of one layer before training, of the shape of its weights W, float32 on the CPU.

    - "kaiming_uniform": U(-b, b) with b = 1 / sqrt(fan_in), torch's `kaiming_uniform_(a=sqrt(5))`, as published.
    - "magnitude": |W|, so that the first mask is that of magnitude pruning.
    """
    if kind == "magnitude":
        return weights.detach().abs().float().cpu()
    bound = 1 / math.sqrt(weights[0].numel())
    return torch.empty(weights.shape).uniform_(-bound, bound, generator=_generator("scores", name, seed))


def _generator(what: str, name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {what} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def shifted(scores: Tensor, sparsity: float) -> Tensor:
    """`scores` less a constant, such that round(sparsity * size) of distinct ones, one less than all at most, are <= 0.

    The highest of them becomes exactly 0.
    """
    below = min(round(sparsity * scores.numel()), scores.numel() - 1)
    if not below:
        return scores - torch.nextafter(scores.min(), torch.tensor(-math.inf))
    return scores - scores.reshape(-1).kthvalue(below).values


def budget(sizes: Mapping[str, int], sparsity: float, scope: str) -> Budget:
    """How many scores are kept: size - round(sparsity * size), one at least, of each layer or ("global") of all.

    "layerwise_truncated" keeps size - int(sparsity * size), as the published code does: one more of a layer whose
    share would be rounded up. Rounding is the default because it gives the nearest density, as everywhere here.

    >>> budget({"a": 10, "b": 5}, 0.5, "layerwise"), budget({"a": 10, "b": 5}, 0.9, "global")
    ({('a',): 5, ('b',): 3}, {('a', 'b'): 1})
    >>> budget({"a": 7}, 0.4, "layerwise"), budget({"a": 7}, 0.4, "layerwise_truncated")
    ({('a',): 4}, {('a',): 5})
    """
    count = COUNTS["truncated" if scope == "layerwise_truncated" else "rounded"]
    groups = [tuple(sizes)] if scope == "global" else [(name,) for name in sizes]
    totals = {names: sum(sizes[name] for name in names) for names in groups}
    return {names: max(1, total - count(sparsity * total)) for names, total in totals.items()}


def highest(scores: Mapping[str, Tensor], keep: Budget) -> Masks:
    """The masks of the highest |s|, exactly `keep` in each group.

    Of equal scores the lowest indices are kept, in the order of names and then of the contiguous tensor, whatever the
    layout in memory. Scores without a group have no mask. Cost: `kth_highest` and four passes over each group.

    Raises:
        ValueError: names the scores that are not finite.
    """
    _require_finite(scores)
    masks: Masks = {}
    for names, kept in keep.items():
        parts = [scores[name].detach().abs().reshape(-1) for name in names]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        least = kth_highest(flat, kept)
        mask = flat >= least
        if surplus := int(mask.sum()) - kept:
            mask[(flat == least).nonzero().flatten()[-surplus:]] = False
        for name, part in zip(names, mask.split([part.numel() for part in parts]), strict=True):
            masks[name] = part.view(scores[name].shape)
    return masks


def kth_highest(values: Tensor, k: int) -> Tensor:
    """The k-th highest of a vector of finite floats >= 0, 0-dimensional.

    Such floats are ordered as their bits are: a histogram of the leading 14 says which few share those of the answer,
    and one of these it is. On one CPU thread 4 times as fast as `kthvalue` over all.
    """
    wide = values.float() if values.element_size() < 4 else values
    bits = wide.view(torch.int32 if wide.element_size() == 4 else torch.int64)
    if bits.numel() > MANY:
        leading = bits >> (8 * bits.element_size() - 14)  # of which the first, the sign, is 0
        reached = leading.bincount(minlength=1 << 13).flip(0).cumsum(0)  # values in the highest bin, in two, ...
        place = int((reached < k).sum())
        k -= int(reached[place - 1]) if place else 0
        bits = bits[leading == (1 << 13) - 1 - place]
    return bits.topk(k, sorted=False).values.min().view(wide.dtype).to(values.dtype)


def positive(scores: Mapping[str, Tensor]) -> Masks:
    """The masks of a learned threshold: s > 0. How many are kept is learned with the scores.

    Raises:
        ValueError: names the scores that are not finite.
    """
    _require_finite(scores)
    return {name: score.detach() > 0 for name, score in scores.items()}


def _require_finite(scores: Mapping[str, Tensor]) -> None:
    if bad := [name for name, score in scores.items() if not score.detach().abs().amax().isfinite()]:
        raise ValueError(f"scores of {', '.join(bad)} are not finite: lower the learning rate, or clip gradients")


def straight_through_(gradient: Tensor, weights: Tensor, scores: Tensor, signed: bool) -> Tensor:
    """Turn dL/d(W * h) into dL/ds as if h were |s|, in place: times W, and times sign(s); h = s where `signed`.

    In the paper |s| is ranked and its derivative, 0 at 0, belongs to the rule; a threshold on s itself has none.
    """
    gradient.mul_(weights)
    return gradient if signed else gradient.mul_(scores.sgn())
