"""Scopes: how many weights each group of tensors keeps. All return a budget for `masks.keep_highest`.

A budget maps groups of names to integers. `rounds` compounds several levels in one, so that one-shot pruning
keeps exactly as many weights as the levels that it is compared with.

`counts` says how many weights a fraction f of n is, in floating point:

- "rounded": round(f n), halves to even, the default: the nearest count, as in `torch.nn.utils.prune`.
- "truncated": int(f n), as in the code of SynFlow (arXiv 2006.05467), at each of its rounds, and of edge-popup
  (1911.13299), so that up to one weight more is kept.
- "ceiling": ceil(f n), as in open_lth, the code of 1912.05671 (ceil(0.2 n) a level), so that up to one less is kept.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from lottery_callbacks.functional.masks import kept, survivors

Budget = dict[tuple[str, ...], int]
Scope = Callable[..., Budget]  # of masks, rates, rounds, counts
Counts = Literal["rounded", "truncated", "ceiling"]
COUNTS: dict[str, Callable[[float], int]] = {"rounded": round, "truncated": math.floor, "ceiling": math.ceil}


def layerwise(
    masks: Mapping[str, Tensor], rates: Mapping[str, float], rounds: int = 1, counts: str = "rounded"
) -> Budget:
    """Each tensor loses its own rate of its own survivors (arXiv 1803.03635 for LeNet and Conv-2/4/6)."""
    return {(name,): survivors(alive, rates[name], rounds, COUNTS[counts]) for name, alive in kept(masks).items()}


def whole(masks: Mapping[str, Tensor], rates: Mapping[str, float], rounds: int = 1, counts: str = "rounded") -> Budget:
    """All tensors are ranked together and lose one rate ("global": 1803.03635 for ResNet and VGG; 1912.05671).

    Raises:
        ValueError: the rates differ between tensors, which has no meaning here.
    """
    return {tuple(masks): survivors(sum(kept(masks).values()), _one_rate("global", rates), rounds, COUNTS[counts])}


def erk(masks: Mapping[str, Tensor], rates: Mapping[str, float], rounds: int = 1, counts: str = "rounded") -> Budget:
    """Erdos-Renyi-Kernel densities (Evci et al., arXiv 1911.11134) at the global count.

    Tensor l keeps min(1, c (sum of its dimensions) / (product of its dimensions)) of its size, c chosen so that
    the total is exact. Dimensions are those of the tensor: (out, in) or (out, in, height, width). Fractions
    are rounded by largest remainder, and no tensor keeps more than it has or less than one. Deviation: the published
    code rounds each layer by itself, so that its total is some weights above the global count.

    Raises:
        ValueError: the rates differ between tensors, which has no meaning here.
    """
    alive = kept(masks)
    left = survivors(sum(alive.values()), _one_rate("erk", rates), rounds, COUNTS[counts])
    total = max(left, sum(map(bool, alive.values())))
    raw = {name: float(sum(mask.shape)) for name, mask in masks.items()}  # density c * sum/prod, times size prod
    fixed: dict[str, float] = {}
    while True:  # tensors that are full stay full; the rest share what is left
        free = {name: raw[name] for name in masks if name not in fixed}
        c = (total - sum(fixed.values())) / sum(free.values()) if free else 0.0
        full = {name: float(alive[name]) for name in free if c * raw[name] >= alive[name]}
        if not full:
            break
        fixed |= full
    ideal = fixed | {name: max(1.0, c * raw[name]) for name in masks if name not in fixed}
    keep = {name: math.floor(ideal[name]) for name in masks}
    spare = total - sum(keep.values())
    while spare:
        step = 1 if spare > 0 else -1
        room = [n for n in masks if (keep[n] < alive[n] if step > 0 else keep[n] > 1)]
        name = max(room, key=lambda n: step * (ideal[n] - keep[n]))
        keep[name] += step
        spare -= step
    return {(name,): keep[name] for name in masks}


def _one_rate(scope: str, rates: Mapping[str, float]) -> float:
    if len(set(rates.values())) > 1:
        raise ValueError(f"rates per layer need scope='layerwise'; scope={scope!r} has one rate (or `exclude` layers)")
    return next(iter(rates.values()))


SCOPES: dict[str, Scope] = {"layerwise": layerwise, "global": whole, "erk": erk}
