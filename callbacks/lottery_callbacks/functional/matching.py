"""Weight matching: the order of hidden units that brings two networks nearest.

Git Re-Basin (Ainsworth et al., arXiv 2209.04836) asks how far apart two networks are once it is undone that hidden
units may be exchanged. `match_weights` finds permutations, and `align` finds and applies them.
"""

from collections.abc import Callable, Iterable
from math import fsum
from typing import Any

import torch
from torch import Tensor, nn

from lottery_callbacks.functional.hidden_units import check_groups, permutation_groups
from lottery_callbacks.functional.permutations import (
    Axis,
    Groups,
    Permutations,
    State,
    permuted,
    places,
    reordered,
    widths,
)
from lottery_callbacks.functional.unit_flow import STATISTICS


def align(
    network: nn.Module, first: State, second: State, groups: Groups | None = None, example: Any = None, **options: Any
) -> State:
    """`second` with its hidden units in the order that is nearest to `first`; it computes what `second` does.

    Args:
        network: of the architecture of both; its own weights are not read, but for an example.
        first: state dict that stays, with the names of `network` (those within, if it is of torch.compile).
        second: state dict that is permuted; a new dict, in which tensors without hidden units are the same objects.
        groups: by hand; see `permutation_groups`, which finds them else.
        example: an input; the groups are then proven on it by `check_groups`.
        options: of `match_weights`.

    Raises:
        ValueError: of `permutation_groups`, `check_groups` and `match_weights`.
    """
    groups = permutation_groups(network) if groups is None else groups
    if example is not None:
        check_groups(network, groups, example)
    return permuted(second, groups, match_weights(groups, first, second, **options))


def match_weights(
    groups: Groups, first: State, second: State, restarts: int = 0, generator: torch.Generator | None = None
) -> Permutations:
    """Permutations P of the units of `second` that make sum_t ||first_t - P(second_t)||^2 small, over parameters t.

    Weight matching (arXiv 2209.04836, section 3.2, algorithm 1): group by group, others held, the P_g that makes
    sum_t <first_t, P(second_t)> largest, a linear assignment problem; until no group gains. What is found is a local
    optimum, never farther than `second` is as given. Deviations:

    - Two starts, of which the nearer result counts (the paper: one, in random order): from the identity, and from a
      sweep in the order of `groups` that sees only tensors whose other axes are matched already or fixed. As inputs are
      fixed, that sweep undoes any permutation of a network whose units differ, at any depth; and of two networks with
      other initialisations it led nearer than the identity in all 11 architectures tried, a pair of each.
    - A step is taken only where it gains: for a group on two axes of one tensor the assignment is but a linearisation.
    - Running statistics move with their units and are not compared: their size says nothing of that of weights.

    Args:
        groups: of `permutation_groups`, in the order of execution, or by hand.
        first: state dict that stays.
        second: state dict of the same names and shapes.
        restarts: further starts from the identity, each sweep in a random order, as in the paper.
        generator: that these orders are drawn from; without restarts nothing is drawn.

    Returns:
        For each group the unit of `second` at each place, (units,), on the device of `second`.

    Raises:
        ValueError: names a tensor that one state lacks, that has another shape or is not finite; restarts without
            generator.
        ModuleNotFoundError: scipy is missing.

    Cost: a sweep takes, for each group and tensor, units x entries multiplications in float64, and an assignment of up
    to units^3; some sweeps a start. Memory: both states in float64.
    """
    if restarts and generator is None:
        raise ValueError(f"restarts={restarts} draw their orders: give a generator")
    problem = _Matching(groups, first, second)
    inorder = list(problem.axes)

    def shuffled() -> list[str]:
        return [inorder[place] for place in torch.randperm(len(inorder), generator=generator)]

    found = [problem.descended(start, lambda: inorder) for start in (problem.identity, problem.forward())]
    found += [problem.descended(problem.identity, shuffled) for _ in range(restarts)]
    return max(found, key=lambda permutations: problem.similarity(problem.on, permutations))


class _Matching:
    """One problem of `match_weights`: tensors in float64, and which groups lie on which axes of them."""

    def __init__(self, groups: Groups, first: State, second: State) -> None:
        try:
            from scipy.optimize import linear_sum_assignment
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("weight matching needs scipy: pip install scipy") from error
        self.solve: Callable[..., Any] = linear_sum_assignment
        self.axes: dict[str, list[Axis]] = {}
        self.on: dict[str, list[tuple[str, Axis]]] = {}
        self.identity = {
            group: torch.arange(units, device=second[groups[group][0][0]].device)
            for group, units in widths(groups, second).items()
        }
        for group, entries in groups.items():
            axes = [Axis(*entry) for entry in entries if entry[0].rpartition(".")[2] not in STATISTICS]
            self.axes[group] = axes
            for axis in axes:
                self.on.setdefault(axis.name, []).append((group, axis))
        for name in self.on:
            if name not in first or first[name].shape != second[name].shape:
                raise ValueError(f"{name} is not in both states with the same shape: give two of one architecture")
            if not (first[name].isfinite().all() and second[name].isfinite().all()):
                raise ValueError(f"{name} is not finite: did the training diverge?")
        self.first = {name: first[name].detach().double().to(second[name].device) for name in self.on}
        self.second = {name: second[name].detach().double() for name in self.on}

    def similarity(self, names: Iterable[str], permutations: Permutations) -> float:
        """sum_t <first_t, P(second_t)>, rounded once: a step that gains here gains in truth, so that descent ends."""
        return fsum(float((self.first[name] * self._moved(name, permutations)).sum()) for name in names)

    def descended(self, permutations: Permutations, order: Callable[[], list[str]]) -> Permutations:
        """Coordinate descent from `permutations` until a whole sweep gains nothing."""
        gained = True
        while gained:
            gained = False
            for group in order():
                trial = permutations | {group: self._assigned(group, permutations, self.axes[group])}
                names = {axis.name for axis in self.axes[group]}
                if self.similarity(names, trial) > self.similarity(names, permutations):
                    permutations, gained = trial, True
        return permutations

    def forward(self) -> Permutations:
        """One sweep in which a group sees the tensors whose other axes are fixed, or matched before it."""
        permutations, matched = self.identity, set()
        for group, axes in self.axes.items():
            known = [
                axis
                for axis in axes
                if all(other in matched for other, at in self.on[axis.name] if at.axis != axis.axis)
            ]
            permutations = permutations | {group: self._assigned(group, permutations, known)}
            matched.add(group)
        return permutations

    def _assigned(self, group: str, permutations: Permutations, axes: list[Axis]) -> Tensor:
        """The permutation of the group that gains most on these axes, all else held."""
        now = permutations[group]
        gains = torch.zeros(len(now), len(now), dtype=torch.float64, device=now.device)
        for axis in axes:
            second = self._moved(axis.name, permutations, besides=axis)
            gains += _rows(self.first[axis.name], axis, len(now)) @ _rows(second, axis, len(now)).T
        return torch.as_tensor(self.solve(gains.cpu().numpy(), maximize=True)[1], device=now.device)

    def _moved(self, name: str, permutations: Permutations, besides: Axis | None = None) -> Tensor:
        tensor = self.second[name]
        for group, axis in self.on[name]:
            if axis is not besides:
                tensor = reordered(tensor, axis, permutations[group])
        return tensor


def _rows(tensor: Tensor, axis: Axis, units: int) -> Tensor:
    """All weights of each unit on the axis, (units, weights)."""
    at = places(axis, tensor, units)
    return tensor.index_select(axis.axis, at.flatten()).movedim(axis.axis, 0).reshape(units, -1)
