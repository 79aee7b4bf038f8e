"""When a run learned: two readings of one validation curve. Neither ever ends a training."""

import math
from collections.abc import Sequence


def early_stop_iteration(iterations: Sequence[int], losses: Sequence[float]) -> int:
    """The iteration of minimum validation loss, the first of equals (Frankle & Carbin, arXiv 1803.03635).

    A loss that is not a number counts as infinite: a run that diverged stopped best before it did.

    Raises:
        ValueError: the curve is empty.
    """
    if not losses:
        raise ValueError("no validation was recorded: validate at least once a run")
    return iterations[min(range(len(losses)), key=lambda i: _or_infinite(losses[i]))]


def lowest(losses: Sequence[float]) -> float:
    """The minimum, where a loss that is not a number counts as infinite; infinite where there is none."""
    return min(map(_or_infinite, losses), default=math.inf)


def first_iteration_reaching(iterations: Sequence[int], losses: Sequence[float], target: float) -> int | None:
    """The first iteration whose validation loss is at most `target`; None where the curve never gets there.

    With `target` = the dense run's minimum, this says how fast a ticket learns what the dense network learned
    at all, free of the accident where its own minimum falls.
    """
    return next((step for step, loss in zip(iterations, losses, strict=True) if loss <= target), None)


def _or_infinite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
