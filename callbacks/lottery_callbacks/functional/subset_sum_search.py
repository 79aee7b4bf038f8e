"""Meet in the middle, for `subset_sum`: sums as integers, which samples to order, and the search in torch."""

from functools import lru_cache
from math import comb

import torch
from torch import Tensor

LARGEST = 40  # samples in a set: 2^20 sums in each part
GRID = 54  # bits of a sum
ELEMENT = 1 << 57  # added to each sample to count elements above the sums: 40 fit, and sums never differ by half of it


def on_grid(targets: Tensor, samples: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
    """Targets (S, T) and samples (S, n) as int64 in the set's unit; for a size, with ELEMENT added for each element.

    A target beyond all sums is moved to the nearest of +-2^54, beyond them as well.
    """
    exponent = torch.frexp(samples.abs().sum(1, keepdim=True)).exponent.long()
    per_unit = ((1023 + GRID - exponent).clamp(max=2046) << 52).view(torch.float64)  # 2^(54 - exponent), by its bits
    targets = (targets * per_unit).clamp(-(2.0**GRID), 2.0**GRID).round().long()
    samples = (samples * per_unit).round().long()
    return (targets, samples) if size is None else (targets + size * ELEMENT, samples + ELEMENT)


def search(targets: Tensor, samples: Tensor, first: int, size: int | None) -> Tensor:
    """The nearest subsets' bits (S, T), with the first `first` of the samples (S, n) in the ordered part."""
    (a, a_bits), (b, b_bits) = sums(samples[:, :first], size), sums(samples[:, first:], size)
    a, order = a.sort(dim=1, stable=True)
    wanted = (targets.unsqueeze(2) - b.unsqueeze(1)).flatten(1)
    above = torch.searchsorted(a, wanted)
    below = a.gather(1, (above - 1).clamp_(min=0))
    above = a.gather(1, above.clamp_(max=a.shape[1] - 1))
    errors = torch.minimum((wanted - below).abs_(), (above - wanted).abs_()).view(*targets.shape, -1)
    best = errors.argmin(2, keepdim=True)  # the first of equals
    least, wanted, below, above = (t.view_as(errors).gather(2, best).squeeze(2) for t in (errors, wanted, below, above))
    nearest = torch.where((wanted - below).abs_() == least, below, above)
    chosen = order.gather(1, torch.searchsorted(a, nearest))
    return a_bits[chosen] | (b_bits[best.squeeze(2)] << first)


def sums(samples: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
    """The sums (S, m) of the listed subsets of the samples (S, h), and their bits."""
    bits, extended = subsets_of(samples.shape[1], size)
    sums = samples.new_zeros(len(samples), 1)
    for i, places in enumerate(extended):
        old = sums if len(places) == sums.shape[1] else sums[:, places.to(sums.device)]
        sums = torch.cat([sums, old + samples[:, i : i + 1]], dim=1)
    return sums, bits.to(samples.device)


@lru_cache(maxsize=4)  # 64 MB for 20 samples; two halves of this size, two of the last
def subsets_of(n: int, size: int | None) -> tuple[Tensor, list[Tensor]]:
    """The bits, ascending, of n samples' subsets, of `size` or fewer if given; and the places each sample extends."""
    bits = counts = torch.zeros(1, dtype=torch.int64)
    extended = []
    for i in range(n):
        places = (counts < (n if size is None else size)).nonzero().flatten()
        extended.append(places)
        bits = torch.cat([bits, bits[places] | 1 << i])
        counts = torch.cat([counts, counts[places] + 1])
    return bits, extended


@lru_cache(maxsize=1024)
def split(n: int, targets: int, size: int | None) -> int:
    """The number of samples in the ordered part that makes the fewest additions; 2^20 sums in it at most."""
    allowed = range(min(n, LARGEST // 2) + 1)
    return min(allowed, key=lambda first: listed(first, size) + targets * listed(n - first, size))


def listed(n: int, size: int | None) -> int:
    """How many subsets of n samples have `size` elements or fewer, all for None."""
    return 2**n if size is None else sum(comb(n, i) for i in range(min(n, size) + 1))
