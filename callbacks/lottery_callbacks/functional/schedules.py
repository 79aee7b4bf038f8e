"""Schedules of sparsity over the steps of one fit, and the exact counts that they ask for."""

from collections.abc import Mapping

from torch import Tensor

from lottery_callbacks.functional.masks import kept
from lottery_callbacks.functional.scopes import COUNTS, SCOPES, Budget


def updates(begin: int, end: int, every: int) -> list[int]:
    """The steps at which masks are updated: `begin`, then every `every` steps, and `end` in any case.

    >>> updates(0, 10, 4), updates(3, 3, 100)
    ([0, 4, 8, 10], [3])

    Raises:
        ValueError: `end` lies before `begin`, or `every` is below one.
    """
    if end < begin:
        raise ValueError(f"pruning ends at step {end}, before it begins at step {begin}")
    if every < 1:
        raise ValueError(f"an update every {every} steps: one step lies between two updates at least")
    return [*range(begin, end, every), end]


def cubic(step: int, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """Sparsity at `step` (Zhu & Gupta, arXiv 1710.01878): s_f + (s_i - s_f)(1 - (t - t_0) / (t_end - t_0))^3.

    It is s_i until `begin` and exactly s_f from `end` on; `begin == end` is one step from the one to the other.
    """
    if step >= end:
        return final
    passed = max(0.0, (step - begin) / (end - begin)) if end > begin else 0.0
    return final + (initial - final) * (1 - passed) ** 3


def geometric(present: float, target: float, rounds: int) -> list[float]:
    """Sparsities 1 - p (d / p)^(i / rounds), i = 1 .. rounds, from the present density p to d = 1 - target.

    Each round removes the same fraction of the survivors; from dense, p = 1, these are the densities d^(i / rounds)
    of SynFlow (Tanaka et al., arXiv 2006.05467). The last one is exactly the target.
    """
    ratio = min(1.0, (1 - target) / present)
    return [1 - present * ratio ** (i / rounds) for i in range(1, rounds)] + [target]


def budget_at(sparsity: float, masks: Mapping[str, Tensor], scope: str, counts: str = "rounded") -> Budget:
    """How many weights each group of `scope` keeps at a sparsity that counts from the dense network.

    kept = total - round(sparsity x total) per tensor ("layerwise") or over all; never more than survive, so that
    a pruned weight never returns, and one at least. `counts` is "rounded", "truncated" or "ceiling"; see `scopes`.
    """
    alive = kept(masks)
    if scope == "layerwise":
        rates = {
            name: _rate(COUNTS[counts](sparsity * mask.numel()), alive[name], mask.numel())
            for name, mask in masks.items()
        }
    else:
        total = sum(mask.numel() for mask in masks.values())
        rates = dict.fromkeys(masks, _rate(COUNTS[counts](sparsity * total), sum(alive.values()), total))
    return SCOPES[scope](masks, rates, 1)


def _rate(removed: int, alive: int, total: int) -> float:
    """The rate of survivors whose rounded count leaves exactly total - removed."""
    return max(0, alive - (total - removed)) / alive
