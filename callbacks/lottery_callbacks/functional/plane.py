"""Networks on the plane through three networks, or on the surface through four."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from lottery_callbacks.functional.in_place import State
from lottery_callbacks.functional.interpolation import is_floating, require_same_tensors

THREE = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
FOUR = ((-1.0, 1.0), (1.0, 1.0), (1.0, -1.0), (-1.0, -1.0))
# Rows A, B (and R) as weights of the networks; see `Plane`.
STEPS = {
    3: torch.tensor([[-1, 1, 0], [-1, 0, 1]], dtype=torch.float64),
    4: torch.tensor([[-1, 1, 1, -1], [1, 1, -1, -1], [-1, 1, -1, 1]], dtype=torch.float64) / 4,
}


@dataclass(frozen=True)
class Plane:
    """The surface through three or four networks, in coordinates (x, y) of which one unit is an L2 distance of 1.

    Three: the plane theta_0 + x u + y v, where u and v are A = theta_1 - theta_0 and B = theta_2 - theta_0
    orthonormalised by Gram-Schmidt (Garipov et al., arXiv 1802.10026).

    Four stand at the corners (-1, 1), (1, 1), (1, -1), (-1, -1) of (a, b), as in the code of 2310.18769: theta =
    M + a A + b B + a b R with their mean M, A and B half the mean differences of opposite edges, and R = (theta_1 +
    theta_3 - theta_0 - theta_2) / 4; (x, y) are (a, b) in terms of A and B orthonormalised. Four networks seldom lie in
    a plane: the term a b R, which that code has not, takes the surface through all of them, and its edges are the
    straight lines between neighbours.

    Built by `plane`; the networks are referred to, not copied.

    Attributes:
        states: the networks.
        basis: lower triangular 2 x 2, float64: (x, y) = (a, b) @ basis.
        height: |R|, how far each of four lies from the plane of M, A and B, an L2 distance; 0 for three.
        unit: of x and y.
    """

    unit: ClassVar[str] = "L2 distance"
    states: tuple[State, ...]
    basis: Tensor
    height: float = 0.0

    @cached_property
    def coordinates(self) -> list[tuple[float, float]]:
        """(x, y) of each network."""
        corners = torch.tensor(THREE if len(self.states) == 3 else FOUR, dtype=torch.float64)
        return [(float(x), float(y)) for x, y in (corners @ self.basis).tolist()]

    @property
    def origin(self) -> dict[str, Tensor]:
        """The network at (0, 0), computed anew: the first of three, the mean of four."""
        return self.at(0.0, 0.0)

    @property
    def directions(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The steps of x and of y on the plane, computed anew: orthogonal, of length 1; numbers of the state alone."""
        numbers = [{name: tensor for name, tensor in state.items() if is_floating(tensor)} for state in self.states]
        one, other = (torch.linalg.inv(self.basis) @ STEPS[len(self.states)][:2]).tolist()
        return _combined(numbers, one), _combined(numbers, other)

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """The state at (x, y): at a network's own coordinates its values; what all have pruned is 0 everywhere."""
        a, b = torch.linalg.solve(self.basis.T, torch.tensor([x, y], dtype=torch.float64)).tolist()
        three, four = [1 - a - b, a, b], [(1 + a * i) * (1 + b * j) / 4 for i, j in FOUR]
        weights = three if len(self.states) == 3 else four
        return _combined(self.states, [round(weight, 12) for weight in weights])  # at a corner all but one are 0


def plane(first: State, second: State, third: State, fourth: State | None = None) -> Plane:
    """The `Plane` through three or four networks; cost: some passes over their weights, in float64 on the CPU.

    Raises:
        ValueError: names or shapes differ; the networks lie on one line; a weight is not finite.
    """
    given = (first, second, third) if fourth is None else (first, second, third, fourth)
    states = tuple({name: value for name, value in state.items() if isinstance(value, Tensor)} for state in given)
    for other in states[1:]:
        require_same_tensors(first, other)
    steps = STEPS[len(states)][:, 1:]
    products = steps @ _products(states) @ steps.T
    if not products.isfinite().all():
        raise ValueError("a network's weights are not finite: did the training diverge?")
    basis, failed = torch.linalg.cholesky_ex(products[:2, :2])
    if failed or not basis[1, 1] > 1e-6 * basis[0, 0]:
        raise ValueError("the networks lie on one line, or two are the same: give three or four that span a plane")
    return Plane(states, basis, math.sqrt(max(0.0, float(products[2, 2]))) if len(states) == 4 else 0.0)


def _products(states: Sequence[State]) -> Tensor:
    """The inner products of the differences from the first state, float64."""
    count = len(states) - 1
    products = torch.zeros(count, count, dtype=torch.float64)
    for name, origin in states[0].items():
        if is_floating(origin):
            kind = torch.promote_types(origin.dtype, torch.float64)
            first, *others = (state[name].to("cpu", kind).reshape(-1) for state in states)
            rows = [other - first for other in others]
            products += torch.stack([torch.stack([torch.vdot(a, b).real for b in rows]) for a in rows])
    return products


def _combined(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Sum of weight * state; integers and booleans are those of the state with the largest weight."""
    used = [(state, weight) for state, weight in zip(states, weights, strict=True) if weight]
    nearest = max(used, key=lambda pair: pair[1])[0]
    combined = {}
    for name, like in states[0].items():
        if is_floating(like):
            wide = torch.promote_types(like.dtype, torch.float32)
            total = sum((state[name].to(like.device, wide) * weight for state, weight in used), like.new_zeros(()))
            combined[name] = total.to(like.dtype)
        else:
            combined[name] = nearest[name].to(like.device, copy=True)
    return combined
