"""How the optimizer steps of a fit are cut into visits: calls of `training_step` that make several of them."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any


class Visits:
    """The cuts of one fit.

    A visit ends at each multiple of `most` optimizer steps, at each step of `ends`, and with its epoch; so nothing that
    must happen at those steps comes late. Every epoch has `per_epoch` visits, the largest number that `batches` batches
    can need wherever they begin, since Lightning counts on one length; where fewer would do, single steps come first.

    Args:
        most: optimizer steps of a visit at most.
        ends: steps that end a visit, counted from the beginning of the fit.
        batches: batches of an epoch.
        last: the last step of the fit.

    >>> visits = Visits(most=50, ends=[120], batches=110, last=1000)
    >>> visits.per_epoch, visits.of_epoch(0), visits.of_epoch(110)
    (5, [1, 2, 50, 100, 110], [1, 10, 40, 90, 110])
    """

    def __init__(self, most: int, ends: Iterable[int], batches: int, last: int) -> None:
        self.batches = batches
        self.cuts = sorted({*ends, *range(most, last + 1, most)})
        inner = (bisect_right(self.cuts, cut + batches - 2) - index for index, cut in enumerate(self.cuts))
        self.per_epoch = min(max(inner, default=0), batches - 1) + 1

    def of_epoch(self, first: int) -> list[int]:
        """Where the visits of the epoch that begins after `first` optimizer steps end, in batches of the epoch."""
        inner = self.cuts[bisect_right(self.cuts, first) : bisect_right(self.cuts, first + self.batches - 1)]
        ends = {cut - first for cut in inner} | {self.batches}
        spare = (step for step in range(1, self.batches) if step not in ends)
        return sorted(ends.union(step for step, _ in zip(spare, range(self.per_epoch - len(ends)), strict=False)))

    def before(self, batch: int, first: int) -> int:
        """How many visits of that epoch end within its first `batch` batches."""
        return bisect_right(self.of_epoch(first), batch)


class Visit:
    """The batches of consecutive optimizer steps, once; `batches` makes each as it is asked for."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self._batches
