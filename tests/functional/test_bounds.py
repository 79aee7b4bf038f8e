import itertools
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import bounds as B

LENET = [784, 300, 100, 10]
K = st.integers(1, 60)
EPS = st.floats(1e-8, 0.49)
DENSITY = st.floats(1e-4, 0.5)
WIDTHS = st.lists(st.integers(1, 900), min_size=2, max_size=5)
C_AMP = st.floats(0.01, 20)


def smallest(holds, start):
    return next(n for n in itertools.count(start) if holds(n))


def test_the_entropy_is_in_bits_symmetric_and_exact_where_k_is_far_below_n():
    assert B.entropy(0.5) == 1.0
    assert B.entropy(0.1) == pytest.approx(B.entropy(0.9)) == pytest.approx(0.4689956)
    assert B.entropy(1e-12) == pytest.approx(1e-12 * (math.log2(1e12) + 1 / math.log(2)))


@pytest.mark.parametrize(
    ("eps", "fixed", "counting"),
    [
        (1e-1, [5, 5, 6, 8], [10, 6, 6, 8]),
        (1e-2, [38, 12, 9, 9, 10], [100, 18, 12, 10, 10]),
        (1e-3, [369, 34, 18, 14, 13, 13], [1000, 54, 23, 17, 15, 14]),
        (1e-4, [3680, 106, 36, 23, 19, 17], [10_000, 169, 49, 28, 22, 19]),
    ],
)
def test_the_sizes_for_k_from_one_on_are_those_of_the_reference_table(eps, fixed, counting):
    ks = range(1, len(fixed) + 1)
    assert [B.rfss_size(k, eps) for k in ks] == fixed
    assert [B.counting_size(k, eps) for k in ks] == counting


@given(K, st.floats(1e-3, 0.49))
def test_sizes_are_the_smallest_by_brute_force(k, eps):
    bits = math.log2(k / eps)
    if k > 1:  # k = 1 asks for more than 1/eps samples
        assert B.rfss_size(k, eps) == smallest(lambda n: n * B.entropy(k / n) >= bits, 2 * k)
        assert B.counting_size(k, eps) == smallest(lambda n: math.comb(n, k) * eps >= math.sqrt(k), 2 * k)
    if k > 8:
        assert B.rfss_size_all_targets(k, eps) == smallest(lambda n: n * B.entropy(k / n) >= bits**2, 2 * k)


@given(K, EPS, st.floats(0, 1))
def test_sizes_fall_as_the_error_grows_and_rise_with_the_demand(k, eps, share):
    larger = eps + share * (0.49 - eps)
    for size in (B.rfss_size, B.rfss_size_all_targets, B.counting_size):
        assert size(k, eps) >= size(k, larger) >= 2 * k
    assert B.rss_size(eps) >= B.rss_size(larger)
    assert B.counting_size(k, eps) >= B.rfss_size(k, eps)  # C(n, k) against 2^(n H2)
    assert B.rfss_size(k, eps, c_hyp=2) >= B.rfss_size(k, eps)
    assert B.rfss_size_all_targets(k, eps) >= B.rfss_size(k, eps)


def test_a_subset_of_any_size_needs_as_many_samples_as_the_logarithm():
    assert B.rss_size(2**-7) == 7
    assert [B.rss_size(0.01, C=C) for C in (1, 3)] == [7, 20]


@given(st.integers(1, 2_000), EPS, st.floats(0.01, 3))
def test_the_simplified_corollary_says_when_it_applies_and_is_never_below_the_full_one(k, eps, c_amp):
    if k >= 2 * c_amp * math.log2(k) * (math.log2(k) + 2 * math.log2(1 / eps)):
        assert B.rfss_size_all_targets(k, eps, c_amp, simplified=True) >= B.rfss_size_all_targets(k, eps, c_amp)
    else:
        with pytest.raises(ValueError, match="choose simplified=False"):
            B.rfss_size_all_targets(k, eps, c_amp, simplified=True)


@given(WIDTHS, EPS, DENSITY, C_AMP)
def test_n_star_satisfies_its_equation_and_no_smaller_one_does(widths, eps, gamma, c_amp):
    depth = len(widths) - 1
    for (d, e), n in zip(pairwise(widths), B.sparse_slth_sizes(widths, eps, gamma, c_amp), strict=True):

        def holds(n, scale=2 * depth * d * e / eps):
            return n * B.entropy(gamma) >= c_amp * math.log2(scale * gamma * n) ** 2

        start = math.ceil(1 / gamma)
        assert holds(n)
        assert n >= start
        assert not any(holds(m) for m in range(max(start, n - 300), n))
        assert not any(holds(m) for m in range(start, min(n, start + 300)))


@pytest.mark.parametrize("scale", [2.1, 4, 7, 8, 1e3])
@pytest.mark.parametrize("gamma", [0.5, 0.37, 0.01])
@pytest.mark.parametrize("c_amp", [0.01, 0.9, 1.0, 1.2, 3])
def test_n_star_is_the_smallest_also_where_its_equation_is_not_monotone(scale, gamma, c_amp):
    expected = smallest(
        lambda n: n * B.entropy(gamma) >= c_amp * math.log2(scale * gamma * n) ** 2, math.ceil(1 / gamma)
    )
    assert B._fixed_point(scale, gamma, c_amp) == expected


@given(WIDTHS, EPS, st.floats(0, 1), DENSITY)
def test_n_star_falls_as_the_error_grows(widths, eps, share, gamma):
    larger = eps + share * (0.49 - eps)
    sizes = B.sparse_slth_sizes(widths, eps, gamma)
    assert all(a >= b for a, b in zip(sizes, B.sparse_slth_sizes(widths, larger, gamma), strict=True))


def test_lenet_as_the_prototype_had_it():
    """The prototype rounded the real fixed points 2628.47, 2164.22, 1487.33 to the nearest: one short of the bound."""
    sizes = B.sparse_slth_sizes(LENET, 0.01, 0.1)
    assert sizes == [2629, 2165, 1488]
    assert B.parameters(LENET, sizes) == pytest.approx(5.0e9, rel=0.01)
    assert B.slth_density(LENET, 0.1) == 1.0
    assert B.density_from_counts(LENET, sizes, [0.1 * n for n in sizes]) == pytest.approx(0.055, abs=5e-4)


def test_tickets_that_were_made_lie_below_the_count_bounds():
    """Of `strong-tickets.md`: LeNet, 266,200 weights, n = 21 and 30, k = 3: 5.80 and 5.87 times as many kept."""
    for n, kept, density in ((21, 5.80, 0.0375), (30, 5.87, 0.0265)):
        for shared, slack in ((True, 1.08), (False, 2.1)):
            bound = B.survivors_bound(LENET, [n] * 3, [3] * 3, shared) / 266_200
            assert kept < bound < slack * kept
            assert density < B.density_from_counts(LENET, [n] * 3, [3] * 3, shared) < slack * density


def test_one_link_is_pensias_first_lemma():
    """Hidden width 2n, 4n edges, 4k of them at most in the ticket."""
    assert (B.hidden_widths([1, 1], [7]), B.parameters([1, 1], [7]), B.survivors_bound([1, 1], [7], [3])) == (
        [14],
        28,
        12,
    )


@given(WIDTHS, EPS, DENSITY)
def test_counts_are_those_of_the_matrices_and_never_above_the_promised_density(widths, eps, gamma):
    sizes = B.sparse_slth_sizes(widths, eps, gamma)
    hidden = B.hidden_widths(widths, sizes)
    shapes = [s for (d, e), h in zip(pairwise(widths), hidden, strict=True) for s in ((h, d), (e, h))]
    assert B.parameters(widths, sizes) == sum(math.prod(shape) for shape in shapes)
    ks = [gamma * n for n in sizes]
    counts = [B.density_from_counts(widths, sizes, ks, shared) for shared in (True, False)]
    assert counts[0] <= counts[1] <= B.slth_density(widths, gamma) * (1 + 1e-12)


@given(st.integers(1, 500), st.integers(1, 5), EPS, DENSITY)
def test_for_equal_widths_rho_is_one_and_counts_give_the_promised_density(d, depth, eps, gamma):
    widths = [d] * (depth + 1)
    sizes = B.sparse_slth_sizes(widths, eps, gamma)
    assert B.slth_density(widths, gamma) == gamma
    assert B.density_from_counts(widths, sizes, [gamma * n for n in sizes]) == pytest.approx(gamma)
    assert B.trade_off(d, depth, eps, gamma) == 4 * sizes[0]


def test_pensias_sizes_are_the_logarithm_and_delta_counts_where_it_is_smaller():
    by_hand = [math.ceil(math.log2(d * e * 3 / 0.01)) for d, e in pairwise(LENET)]
    assert B.pensia_sizes(LENET, 0.01) == B.pensia_sizes(LENET, 0.01, delta=0.5) == by_hand == [27, 24, 19]
    assert B.pensia_sizes(LENET, 0.5, delta=0.01) == by_hand
    assert B.pensia_sizes([4, 4], 2**-4, C=3) == [24]


def test_at_density_one_half_the_sparse_size_is_pensias_up_to_one_logarithm():
    for eps in (1e-1, 1e-2, 1e-4, 1e-8, 1e-16):
        (pensia,), (sparse,) = B.pensia_sizes([32, 32], eps), B.sparse_slth_sizes([32, 32], eps, 0.5)
        assert 1 < sparse / pensia**2 < 4


def test_theorem_3_reaches_malachs_corner_up_to_logarithms():
    """At density eps / m_t it needs less than the m_t^2 / eps^2 of the paper, and at their inverse about as many."""
    for d, eps in ((32, 0.1), (100, 0.01), (500, 1e-4)):
        z = d * d / eps
        density, ratio = B.malach_corner(d * d, eps)
        assert density * ratio == pytest.approx(1)
        assert ratio == pytest.approx(z**2 * math.log2(z))
        assert B.trade_off(d, 1, eps, 1 / z) < z**2
        assert 1 < B.trade_off(d, 1, eps, 1 / z**2) / z**2 < 4 * math.log2(z)
        assert B.pensia_corner(d * d, eps) == (0.5, pytest.approx(math.log2(z**2)))


@given(st.integers(1, 64), st.integers(1, 36), st.integers(1, 4), EPS, DENSITY, C_AMP)
def test_the_equivariant_size_is_that_of_a_dense_layer_with_a_coefficient_for_each_weight(
    n, basis, depth, eps, gamma, c_amp
):
    dense = B.sparse_slth_sizes([n * basis] + [n] * depth, eps, gamma, c_amp)[0]
    if depth > 1:
        assert B.equivariant_slth_size(n, basis, depth, eps, gamma, c_amp=c_amp) == dense
    assert B.equivariant_slth_size(n, 1, depth, eps, gamma, norm=basis, c_amp=c_amp) == dense


@given(st.integers(1, 12), st.integers(20, 200), st.floats(1e-8, 0.0624))
def test_the_lower_bound_follows_from_counting_subnetworks(d, k, eps):
    start = math.ceil(k / (1 - 1 / (2 * math.pi)))
    least = B.lower_bound_parameters(d, eps, k)
    subnetworks = d * d * math.log2(math.sqrt(k) / (2 * eps)) - 1
    assert least >= start
    assert least == start or (least - 1) * B.entropy(k / (least - 1)) < d * d / 2 * math.log2(k / eps)
    assert least == start or least > 3_000 or math.log2(math.comb(least - 1, k)) <= subnetworks


@given(K, st.floats(1e-8, 0.0624))
def test_fixed_size_sums_meet_the_lower_bound_for_one_weight_up_to_a_factor(k, eps):
    """Theorem 2 is tight: half of its n H2(k/n) is necessary."""
    least, enough = B.lower_bound_parameters(1, eps, k), B.rfss_size(k, eps)
    assert least <= enough
    assert (enough - 1) * B.entropy(k / (enough - 1)) <= max(2 * least * B.entropy(k / least), 2 * k)


@given(st.integers(1, 30), st.floats(1e-8, 0.49), st.floats(1, 1e4))
def test_a_ticket_of_any_size_in_a_network_as_small_as_pensias_is_dense(d, eps, times):
    least = max(1, B.lower_bound_parameters(d, eps))
    m = math.ceil(times * least)
    survivors = B.lower_bound_survivors(m, d, eps)
    bits = d * d * math.log2(1 / (2 * eps)) - 1
    assert 1 <= survivors <= m
    assert survivors * math.log2(math.e * m / survivors) >= bits
    assert survivors == 1 or (survivors - 1) * math.log2(math.e * m / (survivors - 1)) < bits
    density = survivors / m
    assert density * math.log2(math.e / density) >= bits / m


def test_the_bound_on_any_size_is_the_logarithm_of_half_the_packing():
    assert B.lower_bound_parameters(10, 0.01) == math.ceil(100 * math.log2(50) - 1) == 564
    assert B.lower_bound_parameters(1, 1 / 16) == 2  # 2^n >= 8 / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: B.rss_size(0), r"eps=0 is out of range: choose 0 < eps < 1$"),
        (lambda: B.rss_size(float("nan")), "choose 0 < eps < 1"),
        (lambda: B.rfss_size(0, 0.1), "k=0 is out of range: choose 1 or more"),
        (lambda: B.rfss_size(1, 0.1, c_hyp=0.5), r"c_hyp=0\.5 is out of range"),
        (lambda: B.rfss_size_all_targets(9, 0.5), r"choose 0 < eps < 0\.5"),
        (lambda: B.rfss_size_all_targets(1, 1e-12), r"no n below 2\^1000 will do: choose a larger k"),
        (lambda: B.counting_size(2, 1.0), "choose 0 < eps < 1"),
        (lambda: B.pensia_sizes([784], 0.1), r"widths=\[784\] are no network"),
        (lambda: B.pensia_sizes([4, 4], 0.1, delta=0), "choose 0 < eps < 1"),
        (lambda: B.sparse_slth_sizes(LENET, 0.1, 0.6), r"density gamma=0\.6 is out of range: choose 0 < gamma <= 1/2"),
        (lambda: B.sparse_slth_sizes(LENET, 0.1, 0.0), "choose 0 < gamma"),
        (lambda: B.slth_density([3, 0], 0.1), "each 1 or more"),
        (lambda: B.equivariant_slth_size(0, 9, 2, 0.1, 0.1), "n=0 is out of range"),
        (lambda: B.parameters(LENET, [21]), "1 sizes for 3 layers: give one for each layer"),
        (lambda: B.survivors_bound(LENET, [21] * 3, [3]), "1 sizes for 3 layers"),
        (lambda: B.lower_bound_parameters(3, 0.07, k=3), r"choose 0 < eps < 0\.0625"),
        (lambda: B.lower_bound_parameters(0, 0.01), "d=0 is out of range"),
        (lambda: B.lower_bound_survivors(563, 10, 0.01), "at least 564 are needed"),
        (lambda: B.malach_corner(0, 0.1), "m_t=0 is out of range"),
        (lambda: B.pensia_corner(9, 2), "choose 0 < eps < 1"),
    ],
)
def test_what_no_theorem_covers_is_refused_by_the_mend(call, message):
    with pytest.raises(ValueError, match=message):
        call()
