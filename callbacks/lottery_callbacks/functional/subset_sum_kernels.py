"""The search of `subset_sum` compiled for a CPU by numba: the same subsets, many times faster than torch's.

The sums a are not ordered but filed in cells of 2^c units, beside a bitmap that tells, for a place t - b, whether some
a may be within half a cell: most b are done with one look into it, and only hits are compared with the a of the cell.
The nearest pair is certain if its error is half a cell or less; c is chosen, from mean and variance of a random
subset's sum, so that this seldom fails. Where it does the cells grow, and the last resort is to order the a after all.
"""

from collections.abc import Callable
from functools import lru_cache
from math import comb
from typing import Any

import numpy as np
import torch
from numpy import uint64
from torch import Tensor

from lottery_callbacks.functional.subset_sum_search import ELEMENT, subsets_of

try:
    from numba import njit  # pyright: ignore[reportMissingImports]
except ImportError:  # not there, or not made for this NumPy; the module imports without it
    njit = None

COMPILES = njit is not None
MOST = np.iinfo(np.int64).max
DONE, LAST_RESORT = -1, 57  # instead of a cell's width; a cell of 2^57 units would hold all sums
NEAR = 20.0  # = 8 sqrt(2 pi): so that 8 to 16 sums are expected in a cell around the target
SCATTER = uint64(0x9E3779B97F4A7C15)  # a cell's number times this, its high bits: sums on a coarse grid spread as well


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile it when it is first called, and keep the machine code for the next process where a folder may."""
    if njit is None:
        return function
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # a read-only installation of a user without a home
        return njit(nogil=True)(function)


def search(targets: Tensor, samples: Tensor, first: int, size: int | None) -> Tensor:
    """The nearest subsets' bits (S, T), with the first `first` of the samples (S, n) in the filed part."""
    n, bits, reached = samples.shape[1], torch.empty_like(targets), targets.clone()
    subsets = 2.0**n if size is None else float(comb(n, size))
    plans = *_plan(first, size), *_plan(n - first, size)
    _search(reached.numpy(), samples.numpy(), first, -1 if size is None else size, subsets, *plans, bits.numpy())
    return bits


@lru_cache(maxsize=4)
def _plan(n: int, size: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The listed subsets' bits; for a size, too, the place of each without its last sample, and that sample."""
    bits, extended = subsets_of(n, size)
    if size is None:
        return bits.numpy(), np.empty(0, np.int64), np.empty(0, np.int64)
    without = np.concatenate([np.zeros(1, np.int64), *(places.numpy() for places in extended)])
    return bits.numpy(), without, np.repeat(np.arange(n + 1) - 1, [1, *map(len, extended)])


@compiled
def _search(targets, samples, first, size, subsets, a_bits, a_without, a_last, b_bits, b_without, b_last, bits):
    each = targets.shape[1]
    a, b = np.empty(len(a_bits), np.int64), np.empty(len(b_bits), np.int64)
    log = 1 + int(np.ceil(np.log2(len(a))))
    bitmap, heads = np.empty(1 << min(log, 17), uint64), np.empty(1 << log, np.int32)
    chain, hits = np.empty(len(a), np.int32), np.empty(len(b) + 1, np.int32)
    widths = np.empty(each, np.int64)  # the width of a cell as each target wants it, a power of two
    for row in range(len(targets)):
        _sums(samples[row, :first], a_without, a_last, a)
        _sums(samples[row, first:], b_without, b_last, b)
        _choose_widths(targets[row], samples[row], size, subsets, widths)
        while True:
            width = LAST_RESORT
            for t in range(each):
                if widths[t] != DONE:
                    width = min(width, widths[t] + 1)
            if width == LAST_RESORT:
                break
            _file(a, width, bitmap, heads, chain)
            for t in range(each):
                if widths[t] != DONE and widths[t] <= width:
                    sure, i, j = _nearest_filed(targets[row, t], a, b, width, bitmap, heads, chain, hits)
                    bits[row, t] = a_bits[i] | b_bits[j] << first
                    widths[t] = DONE if sure > 0 else width + 3 if sure == 0 else LAST_RESORT
        if (widths != DONE).any():
            order = np.argsort(a, kind="mergesort")
            ordered = a[order]
            for t in range(each):
                if widths[t] != DONE:
                    i, j = _nearest_ordered(targets[row, t], ordered, b)
                    bits[row, t] = a_bits[order[i]] | b_bits[j] << first


@compiled
def _sums(samples, without, last, sums):
    """The sums of the listed subsets."""
    sums[0] = 0
    if len(without):
        for i in range(1, len(without)):
            sums[i] = sums[without[i]] + samples[last[i]]
    else:
        for j in range(len(samples)):
            old, new = sums[: 1 << j], sums[1 << j : 2 << j]
            for i in range(len(old)):
                new[i] = old[i] + samples[j]


@compiled
def _choose_widths(targets, samples, size, subsets, widths):
    """As if the sums were normal: the width of a cell is what would hold the same few sums around each target.

    Targets far out are moved to the nearest of the greatest and the least sum, if they are beyond: found at any width.
    """
    n, total, squares = len(samples), 0.0, 0.0
    for x in samples:
        value = float(x if size < 0 else x - ELEMENT)
        total, squares = total + value, squares + value * value
    mean, variance, elements = total / 2, squares / 4, 0
    if size >= 0:
        mean, elements = total * size / max(n, 1), size * ELEMENT
        variance = (squares - total * total / max(n, 1)) / max(n, 1) * size * (n - size) / max(n - 1, 1)
    if variance < 1:
        widths[:] = LAST_RESORT
        return
    finest, coarsest = np.log2(NEAR / subsets) + np.log2(variance) / 2, np.log2(variance) / 2 - 6
    grid = 0
    for x in samples:
        grid |= x
    finest = max(finest, np.log2(grid & -grid))  # sums are its multiples
    for t in range(len(targets)):
        away = (targets[t] - elements - mean) ** 2 / variance
        if away > 9:
            least, most = _reach(samples, size)
            targets[t] = min(max(targets[t], least), most)
        widths[t] = int(max(min(finest + away / 1.386, coarsest), 0.0))  # 2 ln 2


@compiled
def _reach(samples, size):
    """The least and the greatest sum."""
    if size < 0:
        return np.minimum(samples, 0).sum(), np.maximum(samples, 0).sum()
    ascending = np.sort(samples)
    return ascending[:size].sum(), ascending[len(samples) - size :].sum()


@compiled
def _file(a, width, bitmap, heads, chain):
    """File each a, of equals the first, in the cell that begins half a cell below it; mark that cell and the next."""
    places, heads_shift, half = _shift(64 * len(bitmap)), _shift(len(heads)), 1 << (width - 1)
    bitmap[:] = uint64(0)
    heads[:] = -1
    for i in range(len(a)):
        cell = (a[i] - half) >> width
        scattered = uint64(cell) * SCATTER
        head, place = scattered >> heads_shift, scattered >> places
        if bitmap[place >> uint64(6)] >> (place & uint64(63)) & uint64(1):
            j, steps = heads[head], 0  # not far: in a long chain an equal may stay, which costs time alone
            while j >= 0 and a[j] != a[i] and steps < 16:
                j, steps = chain[j], steps + 1
            if j >= 0 and a[j] == a[i]:
                continue
        chain[i] = heads[head]
        heads[head] = i
        bitmap[place >> uint64(6)] |= uint64(1) << (place & uint64(63))
        place = (scattered + SCATTER) >> places
        bitmap[place >> uint64(6)] |= uint64(1) << (place & uint64(63))


@compiled
def _nearest_filed(target, a, b, width, bitmap, heads, chain, hits):
    """The places of the nearest a and b, with 1 if that is certain, 0 if not, -1 if there was too much to compare."""
    places, heads_shift, count = _shift(64 * len(bitmap)), _shift(len(heads)), uint64(0)
    for j in range(len(b)):
        place = uint64((target - b[j]) >> width) * SCATTER >> places
        hits[count] = j
        count += bitmap[place >> uint64(6)] >> (place & uint64(63)) & uint64(1)
    least, best_i, best_j, left = MOST, 0, 0, 8 * len(b) + 4096
    for hit in range(count):
        j = hits[hit]
        wanted = target - b[j]
        for cell in range((wanted >> width) - 1, (wanted >> width) + 1):
            i = heads[uint64(cell) * SCATTER >> heads_shift]
            while i >= 0:
                error = abs(wanted - a[i])
                if error < least or (error == least and j == best_j and (a[i], i) < (a[best_i], best_i)):
                    least, best_i, best_j = error, i, j
                i = chain[i]
                left -= 1
        if left < 0:
            return -1, 0, 0
    return 1 if least <= 1 << (width - 1) else 0, best_i, best_j


@compiled
def _shift(places):
    """What leaves of 64 bits the highest, as many as number the places."""
    return uint64(64 - int(np.log2(places)))


@compiled
def _nearest_ordered(target, ordered, b):
    """The same places, of the first of equal a, by binary search."""
    least, nearest, best_j = MOST, 0, 0
    for j in range(len(b)):
        wanted = target - b[j]
        above = np.searchsorted(ordered, wanted)
        if above > 0 and wanted - ordered[above - 1] < least:
            least, nearest, best_j = wanted - ordered[above - 1], ordered[above - 1], j
        if above < len(ordered) and ordered[above] - wanted < least:
            least, nearest, best_j = ordered[above] - wanted, ordered[above], j
    return np.searchsorted(ordered, nearest), best_j
