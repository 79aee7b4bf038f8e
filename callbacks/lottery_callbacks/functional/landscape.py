"""Loss landscapes: loss and error of the networks on a plane, at the points of a grid.

The plane goes through three or four networks (`plane.plane`), or around one (`random_plane.random_plane`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from lottery_callbacks.functional.evaluation import Evaluate
from lottery_callbacks.functional.in_place import apart, preserved, tensors_of
from lottery_callbacks.functional.interpolation import evaluate_at, even, require_norms, require_same_tensors
from lottery_callbacks.functional.plane import Plane
from lottery_callbacks.functional.random_plane import RandomPlane
from lottery_callbacks.functional.running_statistics import Norms, treatment

Grid = tuple[Sequence[float], Sequence[float]]


class Point(NamedTuple):
    """What the network at (x, y) scores: its mean loss, and its error (1 - accuracy), NaN where there is none."""

    x: float
    y: float
    loss: float
    error: float


@dataclass(frozen=True)
class Surface:
    """Loss and error on a grid over a plane; numbers and strings alone, and so JSON.

    Attributes:
        xs: of the grid's columns.
        ys: of its rows.
        losses: L(x, y), a row for each y.
        errors: E(x, y) = 1 - accuracy, in [0, 1], likewise; NaN where there is no accuracy.
        norms: running statistics on the grid: "average" (the plane's, around one network its own), "reestimate" (those
            of batch norm), or "none" for a network without them.
        points: the networks that the plane is made of, with their own statistics.
        unit: of x and y.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float, ...], ...]
    norms: str
    points: tuple[Point, ...]
    unit: str


def grid_around(
    coordinates: Sequence[tuple[float, float]], points: int = 25, margin: float = 0.5
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Even points on both axes, that go beyond the networks on each side by `margin` of the larger extent.

    Around a single network that extent counts as 2, so that margin=0.5 gives [-1, 1], as in arXiv 1712.09913.

    >>> grid_around([(0.0, 0.0), (4.0, 0.0), (1.0, 2.0)], points=3)
    ((-2.0, 2.0, 6.0), (-2.0, 1.0, 4.0))

    Raises:
        ValueError: fewer than two points; a margin that is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin={margin} leaves networks at the rim: choose a part of their extent above 0, as 0.5")
    ends = [(min(values), max(values)) for values in zip(*coordinates, strict=True)]
    beyond = margin * (max(high - low for low, high in ends) or 2.0)
    xs, ys = (tuple((low - beyond) * (1 - t) + (high + beyond) * t for t in even(points)) for low, high in ends)
    return xs, ys


def surface(
    network: nn.Module,
    plane: Plane | RandomPlane,
    evaluate: Evaluate,
    grid: Grid | None = None,
    norms: Norms = "average",
    reestimate: Callable[[nn.Module], object] | None = None,
    done: Iterable[Sequence[float]] = (),
    tell: Callable[[Point, int], object] | None = None,
) -> Surface:
    """Evaluates the plane's networks as they are, then the networks at the grid's points, row by row, in `network`.

    `network` is left as it was: weights, buffers, modes and gradients, and torch's random states of the CPU and of its
    devices. Each point begins from the same of these states and owes nothing to the points before it. So a surface that
    was interrupted, given its finished points, has the bits of an unbroken one, if `evaluate` and `reestimate` see the
    same data again and, where they draw, torch is seeded as it was.

    With norms="reestimate" batch norm's running statistics are computed anew at every point of the grid
    (`running_statistics.estimate_anew`); the plane's own networks keep theirs in `points`.

    Memory: a copy of the network, another where the plane is made of its own state dict, one state, and what `evaluate`
    takes. Cost: an evaluation a point, 625 on 25 x 25, and one for each of the plane's networks.

    Args:
        network: of the plane's architecture.
        plane: of `plane` or `random_plane`.
        evaluate: gives the `Metrics` of the network, as `evaluate_on` does.
        grid: xs and ys, both rising; by default `grid_around` the plane's networks.
        norms: what becomes of the statistics of batch norm: "average" takes the plane's as it does weights.
        reestimate: runs the network over training inputs.
        done: points that are finished, in the order in which `tell` got them.
        tell: called with each point as soon as it is finished, and the number of those that are left: to write it down
            and show the time left. The network then holds that point.

    Raises:
        ValueError: names or shapes differ; the grid does not rise; `done` is of another one; `reestimate` is missing or
            idle; the network cannot be put back (`in_place.preserved`).
    """
    xs, ys = (tuple(axis) for axis in grid or grid_around(plane.coordinates))
    for axis in (xs, ys):
        if len(axis) < 2 or sorted(set(axis)) != list(axis):
            raise ValueError(f"the grid's {axis} do not rise: give two points or more of each axis, rising")
    require_norms(norms, reestimate)
    plane = replace(plane, states=tuple(apart(state, network) for state in plane.states))
    require_same_tensors(tensors_of(network), plane.states[0])
    recorded = treatment(network, norms)
    places, own = [*plane.coordinates, *((x, y) for y in ys for x in xs)], len(plane.states)
    found = [Point(*point) for point in done]
    if [point[:2] for point in found] != places[: len(found)]:
        raise ValueError("the finished points are not those of this plane and grid: give them in their order, or none")
    with preserved(network):
        for place, (x, y) in list(enumerate(places))[len(found) :]:
            state = plane.states[place] if place < own else plane.at(x, y)
            anew = reestimate if recorded == "reestimate" and place >= own else None
            found.append(Point(x, y, *evaluate_at(network, state, evaluate, anew)))
            if tell is not None:
                tell(found[-1], len(places) - len(found))
    rows = [found[start : start + len(xs)] for start in range(own, len(found), len(xs))]
    losses, errors = (tuple(tuple(getattr(p, what) for p in row) for row in rows) for what in ("loss", "error"))
    return Surface(xs, ys, losses, errors, recorded, tuple(found[:own]), plane.unit)
