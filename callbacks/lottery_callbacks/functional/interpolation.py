"""Networks between two networks: loss and error along the line, barrier and instability.

States are dicts of tensors as `state_dict` gives them. What is measured is a function of the network, as `evaluate_on`
makes one. Surfaces through three or four networks are in `plane`, loss and error on them in `landscape`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lottery_callbacks.functional.evaluation import Evaluate, Metrics
from lottery_callbacks.functional.in_place import State, apart, load, preserved, same_draws, tensors_of
from lottery_callbacks.functional.running_statistics import Norms, estimate_anew, treatment


def interpolate(first: State, second: State, t: float) -> dict[str, Tensor]:
    """(1 - t) * first + t * second, tensor by tensor, on the devices of `first`.

    At t = 0 and 1 the values are exactly those of one network; where the two agree, at any t theirs. So a network is
    the whole line to itself, and a weight that is pruned (0) in both is +0.0 on the way. The two may be exchanged:
    (second, first, 1 - t) gives the same bits inside (0, 1). Sums are made in float32 at least and rounded once; of two
    precisions the result has the wider one. Integers and booleans (counts of batches, indices) are those of `first`,
    at t = 1 of `second`: they should not matter.

    Raises:
        ValueError: names or shapes differ.
    """
    require_same_tensors(first, second)
    keep = 1 - t
    t = 1 - keep  # exact, so that both coefficients are the same seen from the other side
    return {name: _between(one, second[name].to(one.device), keep, t) for name, one in first.items()}


def _between(one: Tensor, other: Tensor, keep: float, t: float) -> Tensor:
    if t in (0, 1) or not is_floating(one):
        end = other if t == 1 else one
        return end.to(torch.promote_types(one.dtype, other.dtype) if is_floating(one) else one.dtype, copy=True)
    kind = torch.promote_types(one.dtype, other.dtype)
    one, other = (tensor.to(torch.promote_types(kind, torch.float32)) for tensor in (one, other))
    return torch.where(one == other, one + 0.0, one * keep + other * t).to(kind)  # -0.0 + 0.0 is 0.0


def is_floating(tensor: Tensor) -> bool:
    """Whether it holds numbers that can be mixed: floating point or complex ones."""
    return tensor.is_floating_point() or tensor.is_complex()


def require_same_tensors(first: State, second: State) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: one line that names the first difference.
    """
    for name in [*first, *second]:
        shapes = [tuple(state[name].shape) if name in state else "absent" for state in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} is {shapes[0]} in the first network and {shapes[1]} in the second: "
                "give two networks of one architecture"
            )


@dataclass(frozen=True)
class Line:
    """Loss and error at each t of a line between two networks, from t = 0 to t = 1.

    Attributes:
        t: the grid.
        losses: L(t).
        errors: E(t) = 1 - accuracy, in [0, 1]; NaN where there is no accuracy.
        norms: running statistics inside (0, 1): "average" (interpolated as weights are), "reestimate" (those of batch
            norm), or "none" for a network without them.
    """

    t: tuple[float, ...]
    losses: tuple[float, ...]
    errors: tuple[float, ...]
    norms: str

    @property
    def barrier(self) -> float:
        """The loss barrier: max over t of L(t) - ((1 - t) L(0) + t L(1)); >= 0, NaN where a loss is none.

        As in Entezari et al., arXiv 2110.06296, and Ainsworth et al., 2209.04836. It is exactly 0 for a network and
        itself where `norms` is "average" or "none": then every L(t) is the same number.
        """
        low, high = self.losses[0], self.losses[-1]
        inner = list(zip(self.t, self.losses, strict=True))[1:-1]
        return _highest([loss - (low + t * (high - low)) for t, loss in inner] + [low - low, high - high])

    @property
    def instability(self) -> float:
        """The error barrier: max over t of E(t) - (E(0) + E(1)) / 2, the ends included (arXiv 1912.05671)."""
        return _highest([error - (self.errors[0] + self.errors[-1]) / 2 for error in self.errors])

    @property
    def stable(self) -> bool:
        """Whether the instability is below 2 % (arXiv 1912.05671)."""
        return self.instability < 0.02


def _highest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def even(points: int) -> tuple[float, ...]:
    """So many even points from 0 to 1, of which the second half is 1 - the first, to the bit.

    >>> even(5)
    (0.0, 0.25, 0.5, 0.75, 1.0)

    Raises:
        ValueError: fewer than two.
    """
    last = points - 1
    if last < 1:
        raise ValueError(f"{points} points make no line: choose 2 or more, 30 as in arXiv 1912.05671")
    return tuple(i / last if 2 * i <= last else 1 - (last - i) / last for i in range(points))


def along(
    network: nn.Module,
    first: State,
    second: State,
    evaluate: Evaluate,
    ts: int | Sequence[float] = 30,
    norms: Norms = "average",
    reestimate: Callable[[nn.Module], object] | None = None,
) -> Line:
    """Evaluates the networks on the line from `first` (t = 0) to `second` (t = 1), one after the other in `network`.

    At the ends `evaluate` sees the two networks bit for bit. With norms="reestimate" the running statistics of batch
    norm become, inside (0, 1), the means over the batches that `reestimate(network)` runs through the network
    (`running_statistics.estimate_anew`); those of instance norm are interpolated all the same. The ends keep their own
    statistics, so that a network and itself may have a barrier then.

    `network` is left as it was: weights, buffers, modes and gradients, and torch's random states of the CPU and of its
    devices. Each t begins from the same random states. Memory: one copy of the network, another where an end is its own
    state dict, one state, and what `evaluate` takes. Cost: an evaluation a point.

    Args:
        network: of the architecture of both.
        first: its state at t = 0, by the names of its `state_dict`; what is no tensor (extra state) is not read.
        second: its state at t = 1.
        evaluate: gives the `Metrics` of the network, as `evaluate_on` does.
        ts: so many even points, 30 in arXiv 1912.05671; or the points themselves, rising from 0 to 1.
        norms: what becomes of the statistics of batch norm: "average" interpolates them as weights, "reestimate" not.
        reestimate: runs the network over training inputs.

    Raises:
        ValueError: names or shapes differ; the points do not rise from 0 to 1; `reestimate` is missing or idle; the
            network cannot be put back (`in_place.preserved`).
    """
    grid = even(ts) if isinstance(ts, int) else tuple(ts)
    if (*grid[:1], *grid[-1:]) != (0, 1) or sorted(set(grid)) != list(grid):
        raise ValueError(f"the points {grid} do not rise from 0 to 1: give 0, points between, and 1")
    require_norms(norms, reestimate)
    first, second = apart(first, network), apart(second, network)
    require_same_tensors(tensors_of(network), first)
    recorded = treatment(network, norms)
    found = []
    with preserved(network):
        for t in grid:
            anew = reestimate if recorded == "reestimate" and 0 < t < 1 else None
            found.append(evaluate_at(network, interpolate(first, second, t), evaluate, anew))
    return Line(grid, tuple(one.loss for one in found), tuple(one.error for one in found), recorded)


def require_norms(norms: str, reestimate: Callable[[nn.Module], object] | None) -> None:
    """Refuse what `along` cannot do with norms.

    Raises:
        ValueError: `norms` is not known, or "reestimate" without a function that runs the network.
    """
    if norms not in ("average", "reestimate") or (norms == "reestimate" and reestimate is None):
        raise ValueError(f"norms={norms!r}: choose 'average', or 'reestimate' with a function that runs the network")


def evaluate_at(
    network: nn.Module, state: State, evaluate: Evaluate, reestimate: Callable[[nn.Module], object] | None = None
) -> Metrics:
    """The `Metrics` of `state`, which stays in the network; with `reestimate` batch norm's statistics are made anew.

    Torch's random states are left as they were, and what is drawn is the same at every call.
    """
    load(network, state)
    if reestimate is not None:
        with same_draws(network):
            estimate_anew(network, reestimate)
    with same_draws(network):
        return evaluate(network)
