"""Subset sum: of all subsets of n numbers, the one whose sum is nearest to a target; exact, many targets at once.

Meet in the middle (Horowitz & Sahni, 1974): with the samples split in two, every subset's sum is one of the 2^h sums a
of the first part plus one of the 2^(n-h) sums b of the second, so that a target t asks, for each b, for the a nearest
to t - b. The a are ordered once a set; many targets on one set therefore want a larger first part, and T targets take
about 2 sqrt(T 2^n) additions. Of a fixed size k, parts list only their subsets of k elements or fewer.

Exact: sums are integers, in units of 2^-54 of the least power of two above the sum of the set's |samples| (2^-969 or
more). No addition rounds, so the answer is the best of all subsets where samples and targets lie on that grid, as
products of weights on a 2^-24 grid do; else its error exceeds the least by n + 1 units at most, about what float64
loses in such sums. Equally near subsets: the lowest b (as a binary number, its sample i worth 2^i), then the smaller
sum, then the lowest a; on every device, with and without the kernel. The split depends on n, the size and the number of
targets a set.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lottery_callbacks.functional import subset_sum_search as meet

Progress = Callable[[int, int], None]
Report = Callable[[float], None]
BYTES = 64  # of work space for an addition, in torch
SMALL = 1 << 15  # numbers; torch does an operation on fewer in the thread that asks, so the kernel's threads keep apart


@dataclass(frozen=True)
class Subsets:
    """The chosen subset of each target, in the targets' shape and on their device.

    Attributes:
        chosen: boolean, with one more dimension of n: which samples.
        sums: their sum in float64, added from the first to the last.
        errors: |target - sum|, inf where no subset is admissible.
        feasible: whether the question has an answer. It has none where a set has fewer valid samples than the size
            asks (then nothing is chosen), or no admissible subset within the tolerance (then the nearest is chosen).
    """

    chosen: Tensor
    sums: Tensor
    errors: Tensor
    feasible: Tensor

    @property
    def indices(self) -> Tensor:
        """The chosen samples' places, ascending, with one more dimension of the greatest size; filled up with -1."""
        order = self.chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        order = order[..., : int(self.sizes.max()) if self.sizes.numel() else 0]
        return order.masked_fill(~self.chosen.gather(-1, order), -1)

    @property
    def sizes(self) -> Tensor:
        """Number of chosen samples."""
        return self.chosen.sum(-1)

    @property
    def empty(self) -> Tensor:
        """Where the answer is the empty subset, an approximation that keeps nothing."""
        return self.feasible & ~self.chosen.any(-1)


@dataclass(frozen=True)
class Cost:
    """What a question takes: additions, each with a search among ordered sums, and bytes of answer and work space."""

    additions: int
    bytes: int


def subset_sum(
    targets: Tensor,
    samples: Tensor,
    *,
    size: int | None = None,
    tolerance: float | None = None,
    min_size: int = 0,
    valid: Tensor | None = None,
    kernel: bool | None = None,
    memory: int = 1 << 28,
    progress: Progress | None = None,
) -> Subsets:
    """The subset with the sum nearest to each target: of any size, of exactly `size`, or the smallest in `tolerance`.

    Random subset sum (Lueker 1998; Pensia et al., arXiv 2006.07990) asks for any size; random fixed-size subset sum
    (Natale et al., arXiv 2410.14754) for exactly k, and for k samples also where the target is 0.

    Args:
        targets: (T,), or (S, T): T targets on each of S sets.
        samples: (n,), shared by all targets; (T, n), a set a target; or (S, n). 1 <= n <= 40.
        size: exactly that many samples.
        tolerance: the smallest size whose nearest sum has an error of `tolerance` or less.
        min_size: without `size`, at least that many samples: 1 excludes the empty subset.
        valid: boolean, in the shape of `samples`: which may be chosen; the others may hold anything.
        kernel: the compiled kernel, in `torch.get_num_threads()` threads; None: on a CPU where numba is installed.
        memory: bytes of work space; a single set takes up to 200 MB at n = 40, whatever it says, and 64 MB stay.
        progress: called as progress(done, total) with targets, times sizes where several may be asked.

    >>> answer = subset_sum(torch.tensor([0.6, 0.0]), torch.tensor([0.5, 0.25, 0.125]), size=2)
    >>> answer.chosen.tolist(), answer.errors.tolist()
    ([[True, False, True], [False, True, True]], [0.02499997615814209, 0.375])

    Raises:
        ValueError: shapes, devices or types do not fit, n is not in 1..40, a number is not finite, or the question
            contradicts itself.
        ModuleNotFoundError: `kernel=True` without numba.
    """
    if size is not None and (tolerance is not None or min_size):
        raise ValueError("a fixed size leaves no choice of sizes: give `size` without `tolerance` and `min_size`")
    if min(size or 0, min_size) < 0 or not (tolerance or 0) >= 0:
        raise ValueError("size, min_size and tolerance are 0 or more")
    batch = _Batch.of(targets, samples, valid, kernel, memory)
    sizes = range(min_size, samples.shape[-1] + 1)
    if tolerance is not None:
        report = _reporting(progress, targets.numel() * len(sizes))
        everywhere = torch.ones_like(batch.targets, dtype=torch.bool)
        return _shaped(_smallest(batch, everywhere, sizes, tolerance, report), targets)
    if not min_size:
        return _shaped(_nearest(batch, size, _reporting(progress, targets.numel())), targets)
    parts = 1 + len(sizes)
    report = _reporting(progress, targets.numel() * parts)
    answer = _nearest(batch, None, lambda fraction: report(fraction / parts))
    if (too_small := answer.sizes < min_size).any():  # the nearest of each admissible size, and the best of these
        again = _smallest(batch, too_small, sizes, None, lambda fraction: report((1 + fraction * len(sizes)) / parts))
        for old, new in zip(_tensors(answer), _tensors(again), strict=True):
            old[too_small] = new[too_small]
    report(1.0)
    return _shaped(answer, targets)


def frontier(
    targets: Tensor,
    samples: Tensor,
    *,
    valid: Tensor | None = None,
    kernel: bool | None = None,
    memory: int = 1 << 28,
    progress: Progress | None = None,
) -> Subsets:
    """The nearest subset of each size 0..n, as `subset_sum(size=k)`; the sizes are one more dimension, the first."""
    batch = _Batch.of(targets, samples, valid, kernel, memory)
    sizes = samples.shape[-1] + 1
    report = _reporting(progress, targets.numel() * sizes)
    answers = [_nearest(batch, k, lambda fraction, k=k: report((k + fraction) / sizes)) for k in range(sizes)]
    stacked = (torch.stack(same) for same in zip(*map(_tensors, answers), strict=True))
    return Subsets(*(t.view(sizes, *targets.shape, *t.shape[3:]) for t in stacked))


def cost(
    targets: Tensor,
    samples: Tensor,
    sizes: Iterable[int | None] = (None,),
    *,
    valid: Tensor | None = None,
    memory: int = 1 << 28,
) -> Cost:
    """What the nearest subsets of each of `sizes` take: (None,) any size, (k,) exactly k, range(n + 1) the frontier.

    For the smallest size within a tolerance the frontier's is the most that it can take, for `min_size` samples or more
    that of (None, *range(min_size, n + 1)).

    >>> cost(torch.zeros(397_000), torch.zeros(397_000, 21)).additions  # 2^10 + 2^11 a target
    1219584000
    """
    batch = _Batch.of(targets, samples, valid, False, memory)
    additions, bytes, each = 0, memory, batch.targets.shape[1]
    for size in sizes:
        bytes += targets.numel() * (samples.shape[-1] + 17)
        for n, sets in zip(*(t.tolist() for t in batch.valid.sum(1).unique(return_counts=True)), strict=True):
            first = meet.split(n, each, size)
            if n >= (size or 0):
                additions += sets * (meet.listed(first, size) + each * meet.listed(n - first, size))
    return Cost(additions, bytes)


@dataclass(frozen=True)
class _Batch:
    """S sets of n samples with T targets each, in float64."""

    targets: Tensor
    samples: Tensor
    valid: Tensor
    kernel: bool
    memory: int

    @classmethod
    def of(cls, targets: Tensor, samples: Tensor, valid: Tensor | None, kernel: bool | None, memory: int) -> "_Batch":
        valid = torch.ones_like(samples, dtype=torch.bool) if valid is None else valid
        own = targets.ndim == 1 and samples.ndim == 2
        as_sets = targets.unsqueeze(1) if own else targets.unsqueeze(0) if samples.ndim == 1 else targets
        numbers, valid_sets = torch.atleast_2d(samples), torch.atleast_2d(valid)
        if as_sets.ndim != 2 or numbers.ndim != 2 or len(as_sets) != len(numbers) or valid.shape != samples.shape:
            raise ValueError(
                f"targets {[*targets.shape]}, samples {[*samples.shape]} and valid {[*valid.shape]} do not fit:"
                " give (T,) with (n,) or (T, n), or (S, T) with (S, n), and valid in the shape of samples"
            )
        if not 1 <= samples.shape[-1] <= meet.LARGEST:
            raise ValueError(f"a set has 1 to {meet.LARGEST} samples, not {samples.shape[-1]}")
        if len({t.device for t in (targets, samples, valid)}) > 1 or valid.dtype != torch.bool:
            raise ValueError("targets, samples and valid must be on one device, and valid boolean")
        as_sets, numbers = as_sets.detach().double(), numbers.detach().double().masked_fill(~valid_sets, 0.0)
        if not (as_sets.abs() + numbers.abs().sum(1, keepdim=True)).isfinite().all():
            raise ValueError("targets and samples must be finite: did the training diverge?")
        on_cpu = targets.device.type == "cpu"
        if kernel and not on_cpu:
            raise ValueError(f"the kernel runs on a CPU, not on {targets.device}: leave `kernel` out")
        if kernel and not _compiles():
            raise ModuleNotFoundError("the kernel needs numba: pip install 'lottery-lightning[subset-sum]'")
        kernel = on_cpu and _compiles() if kernel is None else kernel
        return cls(as_sets, numbers, valid_sets, kernel, memory)


@lru_cache(maxsize=1)
def _compiles() -> bool:
    """Whether numba is there and works with this NumPy; it is imported when the first question is asked."""
    from lottery_callbacks.functional.subset_sum_kernels import COMPILES

    return COMPILES


def _smallest(batch: _Batch, asked: Tensor, sizes: Sequence[int], tolerance: float | None, report: Report) -> Subsets:
    """For the targets that are asked: the nearest of the first of `sizes` that is within the tolerance, else of all."""
    best = _nothing(batch)
    everything, limit = asked.sum().item() * len(sizes), -1.0 if tolerance is None else tolerance
    for left, size in zip(range(len(sizes), 0, -1), sizes, strict=True):
        if not (now := asked.sum().item()):
            break
        rows = asked.any(1).nonzero().flatten()
        width = int(asked[rows].sum(1).max())  # a set with fewer asked targets is filled up with others
        columns = asked[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        targets, samples, valid = batch.targets[rows].gather(1, columns), batch.samples[rows], batch.valid[rows]
        part = replace(batch, targets=targets, samples=samples, valid=valid)
        done = everything - now * left
        found = _nearest(part, size, lambda fraction, d=done, n=now: report((d + fraction * n) / everything))
        at = (rows[:, None], columns)
        better = asked[at] & (found.errors < best.errors[at])
        for old, new in zip(_tensors(best), _tensors(found), strict=True):
            old[at] = torch.where(better.view(*better.shape, *[1] * (new.ndim - 2)), new, old[at])
        asked = asked & ~(best.errors <= limit)
    if tolerance is not None:
        best.feasible.copy_(best.errors <= tolerance)
    report(1.0)
    return best


def _nearest(batch: _Batch, size: int | None, report: Report) -> Subsets:
    """The nearest subset of exactly `size` samples, of any size for None; in chunks, by the sets' number of samples."""
    answer, jobs, done = _nothing(batch), list(_jobs(batch, size)), 0
    with ThreadPoolExecutor(torch.get_num_threads() if batch.kernel else 1) as pool:
        results = pool.map(lambda job: _choose(batch, size, *job), jobs)
        for (rows, columns, _), chosen in zip(jobs, results, strict=True):
            answer.chosen[rows, columns] = chosen
            answer.feasible[rows, columns] = True
            done += len(rows) * (columns.stop - columns.start)
            report(done / batch.targets.numel())
    report(1.0)
    for i in range(batch.samples.shape[1]):  # in this order everywhere, so that equal subsets have equal sums
        answer.sums.add_(answer.chosen[..., i] * batch.samples[:, i : i + 1])
    answer.errors.copy_((batch.targets - answer.sums).abs().masked_fill_(~answer.feasible, torch.inf))
    return answer


def _jobs(batch: _Batch, size: int | None) -> Iterator[tuple[Tensor, slice, int]]:
    """Rows of sets with equally many samples, a slice of their targets, and that number; each within the memory."""
    counts, each = batch.valid.sum(1), batch.targets.shape[1]
    for n in counts.unique().tolist():
        if each and n >= (size or 0):
            first = meet.split(n, each, size)
            a, b, most = meet.listed(first, size), max(n, meet.listed(n - first, size)), batch.memory // BYTES
            width = min(each, max(1, (most - a) // b))
            if batch.kernel:  # few sets: their targets are shared among the threads, each of which files the a
                width = min(width, max(1, -(-each * int((counts == n).sum()) // torch.get_num_threads())))
            height = min(most // (a + width * b), SMALL // max(n, width) if batch.kernel else most)
            for rows in (counts == n).nonzero().flatten().split(max(1, height)):
                for begin in range(0, each, width):
                    yield rows, slice(begin, min(begin + width, each)), n


def _choose(batch: _Batch, size: int | None, rows: Tensor, columns: slice, n: int) -> Tensor:
    """Which samples of these sets are chosen for these targets, boolean (sets, targets, samples)."""
    places = batch.valid[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]  # the valid ones
    targets, samples = meet.on_grid(batch.targets[rows, columns], batch.samples[rows].gather(1, places), size)
    if batch.kernel:
        from lottery_callbacks.functional.subset_sum_kernels import search
    else:
        search = meet.search
    bits = search(targets, samples, meet.split(n, batch.targets.shape[1], size), size)
    picked = (bits.unsqueeze(-1) >> torch.arange(n, device=bits.device)) & 1 > 0
    chosen = picked.new_zeros(*bits.shape, batch.samples.shape[1])
    return chosen.scatter_(2, places.unsqueeze(1).expand_as(picked), picked)


def _nothing(batch: _Batch) -> Subsets:
    chosen = torch.zeros(*batch.targets.shape, batch.samples.shape[1], dtype=torch.bool, device=batch.targets.device)
    sums = torch.zeros_like(batch.targets)
    return Subsets(chosen, sums, torch.full_like(sums, torch.inf), torch.zeros_like(sums, dtype=torch.bool))


def _tensors(subsets: Subsets) -> tuple[Tensor, ...]:
    return subsets.chosen, subsets.sums, subsets.errors, subsets.feasible


def _shaped(subsets: Subsets, like: Tensor) -> Subsets:
    return Subsets(*(t.view(*like.shape, *t.shape[2:]) for t in _tensors(subsets)))


def _reporting(progress: Progress | None, total: int) -> Report:
    return lambda fraction: progress(round(fraction * total), total) if progress and total else None
