"""The table's quantiles are those of the law, within what its docstring says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional.alpha_stable import symmetric
from lottery_callbacks.functional.stable_table import StableTable, quantiles

ALPHAS = [0.5, 0.95, 1.0, 1.05, 1.3, 1.75, 1.99]
TABLES = {alpha: StableTable(alpha) for alpha in ALPHAS}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_quantiles_of_the_gaussian_law():
    tails = torch.tensor([2.0**-33, 1e-8, 1e-4, 0.01, 0.2, 0.4, 0.4999], dtype=torch.float64)
    exact = -math.sqrt(2) * torch.special.ndtri(tails)
    torch.testing.assert_close(quantiles(2.0, tails), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.5, 1.75, 1.9])
def test_quantiles_beside_scipy(alpha):
    stable = pytest.importorskip("scipy.stats").levy_stable
    tails = torch.tensor([0.001, 0.05, 0.25, 0.45], dtype=torch.float64)
    found = torch.from_numpy(stable.sf(quantiles(alpha, tails).numpy(), alpha, 0))
    torch.testing.assert_close(found, tails, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.5, 1.9])
def test_the_far_tail_is_the_power_of_its_series(alpha):
    tails = torch.tensor([2.0**-32, 2.0**-30], dtype=torch.float64)
    x = quantiles(alpha, tails)
    terms = [  # Bergstroem's, of P(X > x)
        (-1) ** (k + 1)
        * math.gamma(k * alpha)
        * math.sin(k * math.pi * alpha / 2)
        / math.factorial(k)
        * x ** (-k * alpha)
        for k in (1, 2, 3)
    ]
    torch.testing.assert_close(sum(terms) / math.pi, tails, rtol=2e-6, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_lines_are_as_near_as_they_say(alpha):
    ends = [1, 2, 3, 4, 5, 127, 128, 129, 2**20, 2**23 + 1, 2**24 + 1, 2**30, 2**31 - 64]
    k = torch.randint(1, 2**31 - 1, (2000,), generator=seeded())
    k = torch.cat([torch.tensor(ends), k, (k.double().pow(0.5)).long(), k >> 24]).clamp_min(1)
    exact = quantiles(alpha, k.double() / 2**32)
    values = TABLES[alpha].quantile(k.int()).double()
    error, bound = (values - exact).abs(), 1 / alpha * (1 + 1 / alpha) * 2**-17
    assert (error <= 1.06 * bound * (1 + exact) + 1e-6 * exact + 3e-7).all()
    near = k[k < 2**30].double() / 2**32
    density = 2e-6 * near / (quantiles(alpha, near * (1 - 1e-6)) - quantiles(alpha, near * (1 + 1e-6)))
    assert (error[k < 2**30] * density).max() < 5e-6
    assert torch.equal(TABLES[alpha].quantile(-k.int()).double(), -values)


@given(st.sampled_from(ALPHAS), st.integers(-(2**31), 2**31 - 1))
def test_every_integer_is_a_finite_quantile_on_its_side(alpha, integer):
    (value,) = TABLES[alpha].quantile(torch.tensor([integer], dtype=torch.int32)).tolist()
    assert math.isfinite(value)
    if abs(integer) >= 2**31 - 64 or integer == 0:
        assert abs(value) < 1e-6
    else:
        assert math.copysign(1, value) == math.copysign(1, integer)


def test_the_median_and_the_integer_without_a_sign_are_0():
    for table in TABLES.values():
        assert table.quantile(torch.tensor([0, -(2**31)], dtype=torch.int32)).tolist() == [0, 0]


@pytest.mark.parametrize("alpha", [0.49, 0.96, 1.04, 2.0])
def test_without_a_table_the_formula_draws(alpha):
    table = StableTable(alpha)
    assert torch.equal(table.draw((5, 7), seeded()), symmetric(alpha, (5, 7), seeded()))
    with pytest.raises(ValueError, match=f"no table at alpha={alpha}"):
        table.quantile(torch.tensor([1], dtype=torch.int32))


@pytest.mark.parametrize("alpha", [1.0, 1.75])
def test_an_odd_number_of_draws_is_the_beginning_of_an_even_one(alpha):
    table = TABLES[alpha]
    assert torch.equal(table.draw((3, 3), seeded()).flatten(), table.draw((10,), seeded())[:9])
    assert table.draw((0,), seeded()).shape == (0,)
