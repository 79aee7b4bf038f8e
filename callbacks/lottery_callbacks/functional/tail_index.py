"""The tail index of a sample: how heavy the tails are that it comes from, P(|X| > x) ~ x^-alpha.

`hill` estimates it from the largest values of any heavy-tailed sample, `log_moment` from sums, for samples whose law is
symmetric and alpha-stable, as the noise of SGD is modelled. Both know no scale, and leave zeros (pruned weights) out.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A tail index with the ends of its confidence interval; `used` is k of `hill`, the number of sums of `log_moment`.

    A stable law has 0 < alpha <= 2; an estimate above 2 is no error, and is not cut off. The interval holds for
    independent values: dependent ones, as the weights of one layer mostly are, give one that is too narrow.
    """

    alpha: float
    low: float
    high: float
    used: int


def hill(values: Tensor, k: int | None = None, confidence: float = 0.95) -> Estimate:
    """Hill's estimator: 1 / alpha = 1/k sum_{i <= k} log(|X|_(i) / |X|_(k + 1)), from the k + 1 largest of |X|.

    Hill (Annals of Statistics 1975). Its standard error is asymptotically alpha / sqrt(k), hence the interval alpha (1
    -+ z / sqrt(k)). For Pareto tails any k is right; else a large one adds bias and a small one noise: of stable
    laws with alpha near 2 the tail begins so late that estimates are too high for any k that leaves little noise.

    Args:
        values: any shape and sign; centred where that means something.
        k: by default the square root of the number of values that are not 0, rounded down.
        confidence: of the interval.

    Returns:
        In float64; alpha is inf where the k + 1 largest are equal.

    Raises:
        ValueError: a value that is not finite, fewer than two that are not 0, or a k not from 1 to one less than these.
    """
    sizes = _nonzero(values).abs()
    k = math.isqrt(len(sizes)) if k is None else k
    if len(sizes) < 2 or not 1 <= k < len(sizes):
        raise ValueError(f"k={k} of {len(sizes)} values that are not 0: Hill's estimator needs 1 <= k < their number")
    largest = sizes.topk(k + 1).values.log()
    inverse = float((largest[:k] - largest[k]).mean())
    width = _quantile(confidence) / math.sqrt(k)
    if not inverse:
        return Estimate(math.inf, math.inf, math.inf, k)
    return Estimate(1 / inverse, max(0.0, 1 - width) / inverse, (1 + width) / inverse, k)


def log_moment(values: Tensor, block: int | None = None, confidence: float = 0.95) -> Estimate:
    """The block estimator 1 / alpha = (E log|X_1 + ... + X_K| - E log|X|) / log K of a symmetric stable law.

    Mohammadi, Mohammadpour & Ogata (Metrika 2015), theorem 2.3, as in the papers on the noise of SGD (Simsekli et al.,
    arXiv 1901.06053): a sum of K such values is K^(1 / alpha) of them. Of data that only have the tails of a stable law
    the sums come nearer to one with K, at the price of fewer sums. Data must be symmetric about 0 or `centred`: a mean
    grows in sums as alpha = 1.

    The estimate is a mean of one number a sum, whose standard error gives the interval (equal to the jackknife over
    sums), taken for 1 / alpha and turned over. The values of a sum lie as far apart in memory as there are sums, so
    that neighbours, which often hang together, come into different ones.

    Args:
        values: a sample; of two dimensions, several samples (rows) of one law, whose values are never added up.
        block: K, at least 2; by default the square root of the number of values that are not 0, of the shortest row.
            Values of a row beyond a multiple of K are left out.
        confidence: of the interval.

    Returns:
        In float64; an end, or alpha, is inf where its 1 / alpha is not above 0.

    Raises:
        ValueError: a value that is not finite, a block below 2, or fewer than two sums.
    """
    rows = [_nonzero(row) for row in (values if values.ndim == 2 else [values])]
    block = math.isqrt(min(map(len, rows), default=0)) if block is None else block
    if block < 2 or sum(len(row) // block for row in rows) < 2:
        raise ValueError(f"{sum(map(len, rows))} values that are not 0 give no two sums of block={block}: give more")
    blocks = [row[: len(row) // block * block].view(block, -1) for row in rows]
    parts = torch.cat([part.sum(0).abs().log() - part.abs().log().mean(0) for part in blocks])
    parts = parts[parts.isfinite()] / math.log(block)  # a sum may cancel exactly
    if len(parts) < 2:
        raise ValueError("the sums of these values cancel: they are no draws of a continuous law")
    inverse, error = float(parts.mean()), float(parts.std()) / math.sqrt(len(parts))
    width = _quantile(confidence) * error
    alpha, low, high = (1 / one if one > 0 else math.inf for one in (inverse, inverse + width, inverse - width))
    return Estimate(alpha, low, high, len(parts))


def centred(values: Tensor) -> Tensor:
    """The values that are not 0 less their median, flat, in float64: what `log_moment` wants of weights.

    A stable law with alpha <= 1 has no mean, and for any heavy tail the median is the steadier centre.
    """
    found = _nonzero(values)
    return found - found.median() if len(found) else found


def gradient_noise(gradients: Sequence[Tensor]) -> Tensor:
    """U_i = g_i - (g_1 + ... + g_b) / b of one layer's gradients on b minibatches: a row each, float64.

    For the rows of `log_moment`: the b values of one weight cancel, and must not come into one sum. Weights differ in
    the scale of their noise, and a mixture of scales looks heavier than each of them; the papers mix as well.

    Raises:
        ValueError: fewer than two gradients.
    """
    if len(gradients) < 2:
        raise ValueError(f"{len(gradients)} gradients have no noise about their mean: give two or more")
    rows = torch.stack([gradient.detach().flatten() for gradient in gradients]).double()
    return rows - rows.mean(0)


def _nonzero(values: Tensor) -> Tensor:
    flat = values.detach().flatten().double()
    if not flat.isfinite().all():
        raise ValueError("a value is not finite: did the training diverge?")
    return flat[flat != 0]


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is outside (0, 1)")
    return NormalDist().inv_cdf((1 + confidence) / 2)
