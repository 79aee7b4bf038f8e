"""Bounds of the strong lottery ticket: how wide must the random network be, and how sparse is its ticket?

From Pensia et al. (arXiv 2006.07990, "Pensia") and Natale et al. (arXiv 2410.14754, "Natale"), in their symbols. Their
open constants C, c_hyp, c_amp are arguments, 1 by default: sizes are true up to them. Sizes are the smallest integers
that satisfy the inequality. Logarithms are to base 2 (another base is part of the constant), the entropy H2 in bits.

A target has `widths` d_0 .. d_l and spectral norms ||W_i|| <= 1. The random network has 2l layers: after the d_{i-1}
inputs of target layer i come 2 n_i hidden units for each input, n_i for either sign of it, and then the d_i outputs. A
weight becomes the sum of k_i of n_i products. `sizes` are the n_i, `ks` the k_i. `eps` is the error that is allowed: of
a sum (RSS, RFSS), else of the network's output on inputs ||x|| <= 1.

Raises (every function): ValueError, where an argument lies outside of the theorem.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise


def entropy(p: float) -> float:
    """Binary entropy H2(p) = -p log2 p - (1 - p) log2(1 - p), 0 < p < 1."""
    return -p * math.log2(p) - (1 - p) * math.log1p(-p) / math.log(2)


def rss_size(eps: float, C: float = 1.0) -> int:
    """Random subset sum (Lueker 1998): with n >= C log2(1/eps) samples all z in [-1, 1] are subset sums up to eps.

    With high probability. Pensia, corollary 2, writes C ln(2/eps). n samples have 2^n subsets, so C < 1 cannot do;
    the experiment of Pensia takes C = 3, but rounds the logarithm before: n = 21.

    >>> rss_size(0.01), rss_size(0.01, C=3)
    (7, 20)
    """
    _check_eps(eps)
    return math.ceil(C * math.log2(1 / eps))


def rfss_size(k: int, eps: float, c_hyp: float = 1.0) -> int:
    """Random fixed-size subset sum (Natale, theorem 2): the smallest n >= 2k with n H2(k/n) >= c_hyp log2(k/eps).

    Each fixed z in [-sqrt k, sqrt k] is then the sum of exactly k samples, up to eps, with probability >= c_thm, a
    constant that is open as well. The samples are uniform on [-1, 1] or otherwise "sum-bounded"; c_hyp >= 1.

    >>> [rfss_size(k, 0.01) for k in (1, 2, 3, 4, 5)]
    [38, 12, 9, 9, 10]
    """
    _check_eps(eps)
    _check_at_least_one(k=k, c_hyp=c_hyp)
    return _enough_entropy(k, c_hyp * math.log2(k / eps), 2 * k)


def rfss_size_all_targets(k: int, eps: float, c_amp: float = 1.0, simplified: bool = False) -> int:
    """RFSS for all targets at once (Natale, corollary 1): the smallest n >= 2k with n H2(k/n) >= c_amp log2(k/eps)^2.

    With probability >= 1 - eps, eps < 1/2. `simplified` is corollary 2: 2 c_amp log2(1/eps)^2 on the right, never a
    smaller n, for k >= 2 c_amp (log2(k)^2 + 2 log2(k) log2(1/eps)).

    Open: c_amp, in the proof 8 c_hyp / c_thm >= 8, more where the samples are uniform only in part. The square is an
    artefact: the proof repeats theorem 2 on r = (4 / c_thm) ln(k/eps) parts of n/r samples. As we read it, each part
    must hold 2k samples, and so what is proved is k <= n/(2r), not k <= n/2.

    >>> [rfss_size_all_targets(k, 0.01) for k in (5, 10, 20, 50, 100)]
    [127163, 3598, 485, 175, 200]
    """
    _check_eps(eps, 0.5)
    _check_at_least_one(k=k)
    if not simplified:
        return _enough_entropy(k, c_amp * math.log2(k / eps) ** 2, 2 * k)
    least = 2 * c_amp * math.log2(k) * (math.log2(k) + 2 * math.log2(1 / eps))
    if k < least:
        raise ValueError(f"corollary 2 asks for k >= {least:.1f}, not k={k}: choose simplified=False")
    return _enough_entropy(k, 2 * c_amp * math.log2(1 / eps) ** 2, 2 * k)


def counting_size(k: int, eps: float) -> int:
    """n_c, the smallest n >= 2k with C(n, k) >= sqrt(k) / eps: as many subsets as targets to tell apart.

    No theorem, and nothing open: about here the success for a fixed target passes one half. Never below `rfss_size`.

    >>> [counting_size(k, 0.01) for k in (1, 2, 3, 4, 5)]
    [100, 18, 12, 10, 10]
    """
    _check_eps(eps)
    _check_at_least_one(k=k)
    return _first(lambda n: math.comb(n, k) >= math.sqrt(k) / eps, 2 * k)


def pensia_sizes(widths: Sequence[int], eps: float, delta: float | None = None, C: float = 1.0) -> list[int]:
    """Tickets of any density (Pensia, theorem 1): n_i = ceil(C log2(d_{i-1} d_i l / min(eps, delta))).

    With probability >= 1 - delta (default eps) one random network has tickets for all targets of these widths.

    >>> pensia_sizes([784, 300, 100, 10], eps=0.01)
    [27, 24, 19]
    """
    depth = _check_widths(widths)
    smaller = min(eps, eps if delta is None else delta)
    _check_eps(eps)
    _check_eps(smaller)
    return [math.ceil(C * math.log2(d * e * depth / smaller)) for d, e in pairwise(widths)]


def sparse_slth_sizes(widths: Sequence[int], eps: float, gamma_prime: float, c_amp: float = 1.0) -> list[int]:
    """Sparse tickets (Natale, theorem 3): n_i* = c_amp log2(2 l d_{i-1} d_i gamma' n_i* / eps)^2 / H2(gamma').

    n* stands on both sides: here it is the smallest integer >= 1/gamma' that is not below the right side, and k_i =
    gamma' n_i*, to be rounded up. With probability >= 1 - eps all targets have tickets of density <= `slth_density`.

    Open: c_amp, and what its corollary 1 leaves (`rfss_size_all_targets`). Products of two weights contain the uniform
    density on [-1/2, 1/2] only, and the corollary asks for [-1, 1]: weights up to 1 need sqrt(k) >= 2 then.

    >>> sparse_slth_sizes([784, 300, 100, 10], eps=0.01, gamma_prime=0.1)
    [2629, 2165, 1488]
    """
    depth = _check_widths(widths)
    _check_eps(eps)
    _check_gamma(gamma_prime)
    return [_fixed_point(2 * depth * d * e / eps, gamma_prime, c_amp) for d, e in pairwise(widths)]


def equivariant_slth_size(
    n: int, basis: int, depth: int, eps: float, gamma: float, norm: float = 1.0, c_amp: float = 1.0
) -> int:
    """Equivariant networks (Natale, theorem 4): n~ = c_amp log2(2 l n^2 max(|B|, ||B||) gamma n~ / eps)^2 / H2(gamma).

    Each layer of the target stacks n feature spaces (channels); what is pruned, to density <= gamma, are coefficients
    in the basis B of equivariant maps, never raw weights. |B| = `basis` is D^2 for a D x D convolution, 4 D^2 for one
    on the group C4. `norm` is ||B|| = max of ||sum_j beta_j b_j|| over |beta_j| <= 1, at most |B| if all ||b_j|| <= 1.
    Our reading: n~ samples for each coefficient, so 2 n n~ hidden feature spaces (the theorem writes n~).

    >>> equivariant_slth_size(n=16, basis=9, depth=3, eps=0.01, gamma=0.1)
    1643
    """
    _check_eps(eps)
    _check_gamma(gamma)
    _check_at_least_one(n=n, basis=basis, depth=depth)
    return _fixed_point(2 * depth * n**2 * max(basis, norm) / eps, gamma, c_amp)


def slth_density(widths: Sequence[int], gamma_prime: float) -> float:
    """Density of the tickets of theorem 3, gamma = rho gamma' with rho = max_i max(d_i / d_{i-1}, d_{i-1} / d_i).

    From 1 on it says nothing, as for LeNet, whose rho is 10 (1 is that of equal widths): see `density_from_counts`.

    >>> slth_density([784, 300, 100, 10], 0.1)
    1.0
    """
    _check_widths(widths)
    _check_gamma(gamma_prime)
    return gamma_prime * max(max(d / e, e / d) for d, e in pairwise(widths))


def hidden_widths(widths: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The widths 2 d_{i-1} n_i that the random network has between those of the target.

    >>> hidden_widths([784, 300, 100, 10], [21, 21, 21])
    [32928, 12600, 4200]
    """
    _check_widths(widths, sizes)
    return [2 * d * n for d, n in zip(widths[:-1], sizes, strict=True)]


def parameters(widths: Sequence[int], sizes: Sequence[int]) -> int:
    """Weights of the random network: m = sum_i 2 d_{i-1}^2 n_i + 2 d_{i-1} d_i n_i (Natale, proof of theorem 3).

    >>> parameters([784, 300, 100, 10], [21, 21, 21])
    41195952
    """
    return sum(hidden * (d + e) for hidden, (d, e) in zip(hidden_widths(widths, sizes), pairwise(widths), strict=True))


def survivors_bound(widths: Sequence[int], sizes: Sequence[int], ks: Sequence[float], shared: bool = False) -> float:
    """Weights of the ticket, at most: sum_i 4 d_{i-1} d_i k_i (Natale, proof of theorem 3).

    Half of them lead into hidden units, counted as if no two outputs used the same unit. With `shared` they are no more
    than the units, min(2 d_{i-1} d_i k_i, 2 d_{i-1} n_i): a unit keeps one input. That is ours, and sharper.

    >>> [survivors_bound([784, 300, 100, 10], [21] * 3, [3] * 3, shared) for shared in (False, True)]
    [3194400, 1646928]
    """
    _check_widths(widths, sizes, ks)
    layers = zip(hidden_widths(widths, sizes), pairwise(widths), ks, strict=True)
    counts = [(hidden, 2 * d * e * k) for hidden, (d, e), k in layers]
    return sum(second + (min(second, hidden) if shared else second) for hidden, second in counts)


def density_from_counts(
    widths: Sequence[int], sizes: Sequence[int], ks: Sequence[float], shared: bool = False
) -> float:
    """`survivors_bound` / `parameters`: for k_i = gamma' n_i never above `slth_density`.

    >>> sizes = sparse_slth_sizes([784, 300, 100, 10], eps=0.01, gamma_prime=0.1)
    >>> round(density_from_counts([784, 300, 100, 10], sizes, [0.1 * n for n in sizes]), 4)
    0.0546
    """
    return survivors_bound(widths, sizes, ks, shared) / parameters(widths, sizes)


def lower_bound_parameters(d: int, eps: float, k: int | None = None) -> int:
    """Weights that a random network needs for linear targets x -> W x in R^d (Natale, theorem 5; Pensia, theorem 2).

    If each target with ||W|| <= sqrt k has, with probability 1/2, a ticket of k <= .84 n weights (.84 = 1 - 1/(2 pi))
    within eps < 1/16, then n H2(k/n) >= (d^2 / 2) log2(k/eps). Without k, for tickets of any size, ||W|| <= 1 and
    eps < 1/2: 2^n >= (1/2) (1 / (2 eps))^(d^2). Nothing is open.

    >>> lower_bound_parameters(d=10, eps=0.01, k=100), lower_bound_parameters(d=10, eps=0.01)
    (3729, 564)
    """
    _check_eps(eps, 1 / 2 if k is None else 1 / 16)
    _check_at_least_one(d=d)
    if k is None:
        return math.ceil(_bits(d, eps))
    _check_at_least_one(k=k)
    return _enough_entropy(k, d**2 / 2 * math.log2(k / eps), math.ceil(k / (1 - 1 / (2 * math.pi))))


def lower_bound_survivors(m: int, d: int, eps: float) -> int:
    """Weights gamma m that such a ticket of any size keeps, at least (Natale, appendix on the tickets of Pensia).

    The smallest integer with gamma m log2(e / gamma) >= d^2 log2(1/(2 eps)) - 1. At the m = O(d^2 log(1/eps)) of Pensia
    it is Theta(m), since gamma log2(e / gamma) vanishes with gamma: those tickets are dense. Nothing is open.

    >>> [lower_bound_survivors(m, d=10, eps=0.01) for m in (600, 6_000, 600_000)]
    [175, 73, 37]
    """
    if m < (least := lower_bound_parameters(d, eps)):
        raise ValueError(f"m={m} weights have too few subnetworks for d={d}, eps={eps}: at least {least} are needed")
    return _first(lambda size: size * math.log2(math.e * m / size) >= _bits(d, eps), 1)


def malach_corner(m_t: int, eps: float, c: float = 1.0) -> tuple[float, float]:
    """(Density, m / m_t) of Malach et al. (arXiv 2002.00585): m / m_t = c (m_t / eps)^2 log2(m_t / eps).

    As Natale restates it, m_t = l d^2 for l layers of one width. The ticket is as large as the target: density m_t / m.

    >>> malach_corner(m_t=4, eps=0.5)
    (0.005208333333333333, 192.0)
    """
    _check_eps(eps)
    _check_at_least_one(m_t=m_t)
    ratio = c * (m_t / eps) ** 2 * math.log2(m_t / eps)
    return 1 / ratio, ratio


def pensia_corner(m_t: int, eps: float, C: float = 1.0) -> tuple[float, float]:
    """(Density, m / m_t) of Pensia: m / m_t = C log2((m_t / eps)^2), at a constant density, which is 1/2 here.

    >>> pensia_corner(m_t=4, eps=0.5)
    (0.5, 6.0)
    """
    _check_eps(eps)
    _check_at_least_one(m_t=m_t)
    return 0.5, C * 2 * math.log2(m_t / eps)


def trade_off(d: int, depth: int, eps: float, gamma: float, c_amp: float = 1.0) -> float:
    """Natale's curve between the corners: m / m_t = 4 n* of theorem 3 at density gamma, for `depth` layers of width d.

    >>> [trade_off(32, 3, 0.01, gamma) for gamma in (0.5, 0.1, 0.01, 0.001)]
    [3100.0, 5968.0, 32364.0, 219244.0]
    """
    widths = [d] * (depth + 1)
    return parameters(widths, sparse_slth_sizes(widths, eps, gamma, c_amp)) / (depth * d**2)


def _bits(d: int, eps: float) -> float:
    return d**2 * math.log2(1 / (2 * eps)) - 1


def _enough_entropy(k: int, bits: float, start: int) -> int:
    """The smallest n >= start with n H2(k/n) >= bits; the left side grows with n."""
    return _first(lambda n: n * entropy(k / n) >= bits, start)


def _fixed_point(scale: float, gamma: float, c_amp: float) -> int:
    """The smallest n >= 1/gamma with n H2(gamma) >= c_amp log2(scale gamma n)^2.

    x / log2(x)^2 falls up to e^2 and grows from there: what does not hold at the start holds from some n on.
    """
    return _first(lambda n: n * entropy(gamma) >= c_amp * math.log2(scale * gamma * n) ** 2, math.ceil(1 / gamma))


def _first(holds: Callable[[int], bool], start: int) -> int:
    """`start` if it holds, else where it begins to hold: doubling, then bisection."""
    low, high = start - 1, start
    while not holds(high):
        low, high = high, 2 * high
        if high > 2**1000:  # floats end soon
            raise ValueError("no n below 2^1000 will do: choose a larger k, gamma or eps")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _check_eps(eps: float, below: float = 1.0) -> None:
    if not 0 < eps < below:
        raise ValueError(f"eps={eps} is out of range: choose 0 < eps < {below:g}")


def _check_gamma(gamma: float) -> None:
    if not 0 < gamma <= 0.5:
        raise ValueError(f"density gamma={gamma} is out of range: choose 0 < gamma <= 1/2, since k <= n/2")


def _check_at_least_one(**values: float) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} is out of range: choose 1 or more")


def _check_widths(widths: Sequence[int], *per_layer: Sequence[float]) -> int:
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths={list(widths)} are no network: give d_0 .. d_l, two or more, each 1 or more")
    depth = len(widths) - 1
    for values in per_layer:
        if len(values) != depth:
            raise ValueError(f"{len(values)} sizes for {depth} layers: give one for each layer")
    return depth
