"""Alpha-stable variates have the laws of their docstrings, by the textbooks' formulas, and are always finite."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import alpha_stable
from lottery_callbacks.functional.alpha_stable import factors, lengths, noise, positive, rows_of, symmetric
from lottery_callbacks.functional.stable_table import StableTable

ALPHAS = [0.5, 1.0, 1.5, 1.75, 1.9, 2.0]
DRAWS = {"formula": symmetric, "table": lambda alpha, shape, generator: StableTable(alpha).draw(shape, generator)}
MANY = 200_000
FAR = 4.5  # standard errors
EXTREMES = torch.tensor([0.5, 1.5, 1000.5, 2.0**30, 2.0**31 - 128, 2.0**31])  # of what `_words` can give, up to sign

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def samples():
    """MANY variates by (alpha, how), drawn once, in float64."""
    drawn = {}

    def get(alpha, how):
        if (alpha, how) not in drawn:
            drawn[alpha, how] = DRAWS[how](alpha, (MANY,), seeded(3)).double()
        return drawn[alpha, how]

    return get


def far(values, expected, variance):
    """By how many standard errors the mean of `values` is off."""
    return abs(values.mean().item() - expected) / math.sqrt(variance / len(values))


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_characteristic_function(samples, alpha, how):
    def phi(t):
        return math.exp(-(t**alpha))

    for t in (0.05, 0.3, 1.0, 2.0):
        assert far((t * samples(alpha, how)).cos(), phi(t), (1 + phi(2 * t)) / 2 - phi(t) ** 2) < FAR
        assert far((t * samples(alpha, how)).sin(), 0, (1 - phi(2 * t)) / 2) < FAR


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_quartiles_and_kolmogorov_smirnov_beside_scipy(samples, alpha, how):
    stable = pytest.importorskip("scipy.stats").levy_stable
    points = [-200.0, -20.0, -5.0, -2.0, -1.0, -0.4, -0.05, 0.2, 0.7, 1.5, 3.0, 9.0, 50.0]
    ordered = samples(alpha, how).sort().values
    below = torch.searchsorted(ordered, torch.tensor(points, dtype=torch.float64)) / MANY
    truth = torch.from_numpy(stable.cdf(points, alpha, 0))
    assert ((below - truth).abs() <= FAR * (truth * (1 - truth) / MANY).sqrt() + 1e-5).all()
    assert (below - truth).abs().max() < 1.63 / math.sqrt(MANY)  # Kolmogorov and Smirnov, 1 %
    if alpha in (1.0, 2.0):  # known: tan(pi / 4), and 2 erfinv(1 / 2)
        quartile = {1.0: 1.0, 2.0: 0.9538725524}[alpha]
        for probability, place in ((0.25, -quartile), (0.75, quartile)):
            assert far((ordered < place).double(), probability, 3 / 16) < FAR


@pytest.mark.parametrize("how", DRAWS)
def test_the_tail_is_heavy_by_its_law(how):
    alpha, count = 1.5, 2_000_000
    constant = math.gamma(alpha) * math.sin(math.pi * alpha / 2) / math.pi  # P(X > x) ~ constant x^-alpha
    values = DRAWS[how](alpha, (count,), seeded(5))
    for x in (100.0, 1000.0):
        for side in (values, -values):
            expected = count * constant * x**-alpha
            assert abs(int((side > x).sum()) - expected) < FAR * math.sqrt(expected) + 0.01 * expected


def textbook(alpha, words):
    """Chambers, Mallows and Stuck as they are usually written, in float64."""
    first, second = (word.double() for word in words)
    u = torch.copysign(math.pi / 2 - math.pi * first.abs() / 2**32, first)
    exponential = -torch.log1p(-second.abs() / 2**31) if alpha < 1 else -torch.log(second.abs() / 2**31)
    ratio = ((1 - alpha) * u).cos() / exponential
    return (alpha * u).sin() / u.cos() ** (1 / alpha) * ratio ** ((1 - alpha) / alpha)


def kanter(index, words):
    first, second = (word.double() for word in words)
    u = math.pi * first.abs() / 2**32
    u = torch.where(first < 0, math.pi - u, u)
    ratio = ((1 - index) * u).sin() / -torch.log1p(-second.abs() / 2**31)
    return (index * u).sin() / u.sin() ** (1 / index) * ratio ** ((1 - index) / index)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9, 0.999, 1.0, 1.001, 1.5, 1.75, 1.99, 1.9999])
def test_each_number_is_that_of_the_formula(alpha):
    words = alpha_stable._words(5000, seeded())
    ours, exact = symmetric(alpha, (5000,), seeded()).double(), textbook(alpha, words)
    torch.testing.assert_close(ours, exact, rtol=3e-5 / min(alpha, 0.5), atol=1e-5)
    assert torch.equal(ours.sign(), exact.sign())
    exact = kanter(alpha / 2, words)
    torch.testing.assert_close(
        positive(alpha / 2, (5000,), seeded()).double(), exact, rtol=1e-4 / min(alpha, 0.5), atol=0
    )


def test_words_are_symmetric_and_uniform():
    for words in alpha_stable._words(100_000, seeded(1)):
        small = words[words.abs() < 2**22]
        assert len(small) > 50
        assert (small.frac().abs() == 0.5).all()  # so none is 0, and each has its negative
        assert words.abs().max() <= 2**31
        assert far((words > 0).double(), 0.5, 0.25) < FAR
        ordered = words.abs().sort().values / 2**31
        assert (ordered - torch.linspace(0, 1, len(ordered))).abs().max() < 1.63 / math.sqrt(len(ordered))
    first, second = alpha_stable._words(100_000, seeded(1))
    assert far(first.sign() * second.sign(), 0, 1) < FAR
    assert far(first.abs().double() * second.abs() / 2**62, 0.25, 7 / 144) < FAR


@given(st.floats(1e-300, 2))
def test_the_rarest_draws_are_finite_too(alpha):
    signs = torch.tensor([1.0, -1.0])
    corners = torch.cartesian_prod(EXTREMES, signs, EXTREMES, signs)
    words = corners[:, 0] * corners[:, 1], corners[:, 2] * corners[:, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alpha_stable, "_words", lambda count, generator: tuple(word.clone() for word in words))
        values, variates = symmetric(alpha, (len(corners),), seeded()), positive(alpha / 2, (len(corners),), seeded())
        scaled = noise("rotation", alpha, (len(corners), 5), seeded())
    assert values.isfinite().all()
    assert variates.isfinite().all()
    assert (variates >= 0).all()
    assert scaled.isfinite().all()


@pytest.mark.parametrize(
    ("alpha", "bound"), [(1.75, 6e5), (1.5, 5e6), (1.0, 3e9), (0.5, 2e28), (0.2, torch.finfo(torch.float32).max)]
)
def test_the_largest_numbers_are_those_of_the_docstring(monkeypatch, alpha, bound):
    first, second = torch.cartesian_prod(EXTREMES, EXTREMES).unbind(1)
    monkeypatch.setattr(alpha_stable, "_words", lambda count, generator: (first.clone(), second.clone()))
    largest = symmetric(alpha, (len(first),), seeded()).max().item()
    assert 0.5 * bound < largest <= bound


def test_gaussian_variates_are_torchs_own_with_variance_2():
    values = symmetric(2, (MANY,), seeded())
    assert torch.equal(values, torch.randn(MANY, generator=seeded()) * math.sqrt(2))
    assert far(values.double().square(), 2, 8) < FAR


@pytest.mark.parametrize("index", [0.25, 0.5, 0.875, 0.95, 1.0])
def test_the_laplace_transform_of_positive_variates(index):
    values = positive(index, (MANY,), seeded(2)).double()
    assert (values >= 0).all()
    for s in (0.1, 0.5, 1.0, 3.0):
        variance = math.exp(-((2 * s) ** index)) - math.exp(-2 * s**index)
        if index < 1:
            assert far((-s * values).exp(), math.exp(-(s**index)), variance) < FAR
    if index == 1:
        assert torch.equal(values, torch.ones_like(values))
    if index == 0.5:  # Levy's law, of 1 / (2 G^2)
        levy = torch.erfc(1 / (2 * values.sort().values.sqrt()))
        assert (levy - torch.linspace(0, 1, MANY, dtype=torch.float64)).abs().max() < 1.63 / math.sqrt(MANY)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.75, 1.9, 2.0])
def test_rotational_noise_has_the_joint_law_of_its_row(alpha):
    values = noise("rotation", alpha, (MANY, 3), seeded(4)).double()
    for direction in ((1.0, 0.0, 0.0), (0.0, 0.4, 0.0), (0.5, -0.5, 0.2), (1.0, 1.0, 1.0)):
        t = torch.tensor(direction, dtype=torch.float64)
        size = t.norm().item()
        expected, twice = math.exp(-(size**alpha)), math.exp(-((2 * size) ** alpha))
        assert far((values @ t).cos(), expected, (1 + twice) / 2 - expected**2) < FAR
    both = (values[: MANY // 2, 0] + values[MANY // 2 :, 0]).cos()  # rows are independent
    expected, twice = math.exp(-2), math.exp(-2 * 2**alpha)
    assert far(both, expected, (1 + twice) / 2 - expected**2) < FAR


def test_numbers_of_a_row_are_large_together_unless_gaussian():
    for alpha, together in ((1.5, True), (2.0, False)):
        large = noise("rotation", alpha, (MANY, 2), seeded(6)).abs()
        large = large > large.quantile(0.99)
        assert (int(large.all(1).sum()) > 0.1 * 0.01 * MANY) == together


@pytest.mark.parametrize(
    ("shape", "kernels", "rows"),
    [((7, 5), True, (7, 1)), ((6, 4, 3, 3), False, (6, 1, 1, 1)), ((6, 4, 3, 3), True, (6, 4, 1, 1))],
)
def test_noise_of_each_kind(shape, kernels, rows):
    assert rows_of(shape, kernels) == rows
    assert torch.equal(noise("neuron", 1.5, shape, seeded(), kernels), symmetric(1.5, rows, seeded()))
    generator = seeded()
    normals = torch.randn(shape, generator=generator)
    turned = normals * positive(0.75, rows, generator).sqrt() * math.sqrt(2)
    torch.testing.assert_close(noise("rotation", 1.5, shape, seeded(), kernels), turned)
    alone = noise("weight", 1.5, shape, seeded(), kernels)
    assert torch.equal(alone, symmetric(1.5, shape, seeded()))
    assert len(alone.unique()) == alone.numel()
    table = StableTable(1.5).draw
    assert factors("weight", 1.5, shape, kernels, table) == [(shape, table)]


@pytest.mark.parametrize("alpha", [0.5, 1.5, 2.0])
def test_tensors_are_filled_with_what_would_be_drawn(alpha):
    for draw in (symmetric, lengths):
        out = torch.full((40, 3), math.nan)
        assert draw(alpha, (40, 3), seeded(), out) is out
        assert torch.equal(out, draw(alpha, (40, 3), seeded()))
    table, out = StableTable(alpha), torch.full((40, 3), math.nan)
    assert table.draw((40, 3), seeded(), out) is out
    assert torch.equal(out, table.draw((40, 3), seeded()))


@pytest.mark.parametrize("how", DRAWS)
def test_a_seed_decides_every_bit_and_pieces_nothing(monkeypatch, how):
    whole = DRAWS[how](1.75, (3, 1001), seeded(8))
    assert whole.dtype == torch.float32
    assert torch.equal(whole, DRAWS[how](1.75, (3, 1001), seeded(8)))
    assert not torch.isin(whole, DRAWS[how](1.75, (3, 1001), seeded(9))).any()
    monkeypatch.setattr(alpha_stable, "PIECE", 96)
    monkeypatch.setattr("lottery_callbacks.functional.stable_table.PIECE", 96)
    torch.testing.assert_close(
        DRAWS[how](1.75, (3, 1001), seeded(8)), whole, rtol=1e-5, atol=1e-6
    )  # vectors end earlier
    assert DRAWS[how](1.75, (0, 4), seeded()).shape == (0, 4)


def test_out_of_range_is_refused():
    for alpha in (0, -1, 2.1, math.nan):
        with pytest.raises(ValueError, match="is outside \\(0, 2\\]: 2 is Gaussian"):
            symmetric(alpha, (1,), seeded())
        with pytest.raises(ValueError, match="is outside \\(0, 1\\]: of alpha-stable noise it is alpha / 2"):
            positive(alpha / 2, (1,), seeded())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.75, 2.0])
def test_a_gpu_waits_for_nothing(alpha):
    generator, table = torch.Generator("cuda").manual_seed(0), StableTable(alpha, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [noise(kind, alpha, (3200, 64), generator) for kind in ("neuron", "weight", "rotation")]
        drawn.append(table.draw((3200, 64), generator))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for values in drawn:
        assert values.isfinite().all()
        assert far((0.7 * values[:, 0].double()).cos(), math.exp(-(0.7**alpha)), 0.5) < FAR
