"""Scopes: how many weights each group of tensors keeps. All return a budget for `masks.keep_highest`.

A budget maps groups of names to integers. `rounds` compounds several levels in one, so that one-shot pruning
keeps exactly as many weights as the levels that it is compared with.
"""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from lottery_callbacks.functional.masks import kept, survivors

Budget = dict[tuple[str, ...], int]
Scope = Callable[[Mapping[str, Tensor], Mapping[str, float], int], Budget]


def layerwise(masks: Mapping[str, Tensor], rates: Mapping[str, float], rounds: int = 1) -> Budget:
    """Each tensor loses its own rate of its own survivors (arXiv 1803.03635 for LeNet and Conv-2/4/6)."""
    return {(name,): survivors(alive, rates[name], rounds) for name, alive in kept(masks).items()}


def whole(masks: Mapping[str, Tensor], rates: Mapping[str, float], rounds: int = 1) -> Budget:
    """All tensors are ranked together and lose one rate ("global": 1803.03635 for ResNet and VGG; 1912.05671).

    Raises:
        ValueError: the rates differ between tensors, which has no meaning here.
    """
    return {tuple(masks): survivors(sum(kept(masks).values()), _one_rate("global", rates), rounds)}


def erk(masks: Mapping[str, Tensor], rates: Mapping[str, float], rounds: int = 1) -> Budget:
    """Erdos-Renyi-Kernel densities (Evci et al., arXiv 1911.11134) at the global count.

    Tensor l keeps min(1, c (sum of its dimensions) / (product of its dimensions)) of its size, c chosen so that
    the total is exact. Dimensions are those of the tensor: (out, in) or (out, in, height, width). Fractions
    are rounded by largest remainder, and no tensor keeps more than it has or less than one.

    Raises:
        ValueError: the rates differ between tensors, which has no meaning here.
    """
    alive = kept(masks)
    total = max(survivors(sum(alive.values()), _one_rate("erk", rates), rounds), sum(map(bool, alive.values())))
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
