"""Tail indices of samples whose index is known, and intervals that hold it as often as they say."""

import math

import numpy as np
import pytest
import torch
from drawn_networks import generator
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import levy_stable

from lottery_callbacks.functional.tail_index import centred, gradient_noise, hill, log_moment


def stable(alpha, *shape, seed=0):
    """Symmetric draws with characteristic function exp(-|t|^alpha), by Chambers, Mallows and Stuck."""
    draws = generator(seed)
    angle = (torch.rand(shape, generator=draws, dtype=torch.float64) - 0.5) * math.pi
    waiting = -torch.rand(shape, generator=draws, dtype=torch.float64).log()
    tail = (torch.cos((1 - alpha) * angle) / waiting) ** ((1 - alpha) / alpha)
    return torch.sin(alpha * angle) / torch.cos(angle) ** (1 / alpha) * tail


def pareto(alpha, *shape, seed=0):
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64) ** (-1 / alpha)


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.5, 1.75, 1.9, 2.0])
def test_the_log_moment_interval_holds_the_index_of_stable_laws_as_often_as_it_says(alpha):
    found = [log_moment(row) for row in stable(alpha, 300, 2500)]
    held = sum(one.low <= alpha <= one.high for one in found) / 300
    assert 0.90 <= held <= 0.98  # 0.95 but for the skew of 50 sums
    assert np.mean([one.alpha for one in found]) == pytest.approx(alpha, rel=0.02)
    assert {one.used for one in found} == {50}
    narrow = [log_moment(row, confidence=0.5) for row in stable(alpha, 300, 2500)]
    assert 0.40 <= sum(one.low <= alpha <= one.high for one in narrow) / 300 <= 0.60


@pytest.mark.parametrize("alpha", [1.2, 1.8])
def test_it_is_right_on_scipys_draws_in_float32_at_any_scale_too(alpha):
    sample = levy_stable.rvs(alpha, 0, size=40_000, random_state=1)
    one = log_moment(torch.tensor(sample))
    assert abs(one.alpha - alpha) < 0.1
    for scale in (1e-30, 1e30):
        other = log_moment(torch.tensor(sample * scale, dtype=torch.float32))
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.5, 3.0])
def test_hills_interval_holds_the_index_of_pareto_tails_as_often_as_it_says(alpha):
    found = [hill(row) for row in pareto(alpha, 300, 10_000)]
    assert 0.90 <= sum(one.low <= alpha <= one.high for one in found) / 300 <= 0.98
    assert np.mean([one.alpha for one in found]) == pytest.approx(alpha, rel=0.03)
    assert {one.used for one in found} == {100}
    half = [hill(row, confidence=0.5) for row in pareto(alpha, 300, 10_000)]
    assert 0.42 <= sum(one.low <= alpha <= one.high for one in half) / 300 <= 0.58


def test_hill_finds_the_tails_of_a_stable_law_and_is_too_high_near_2():
    assert hill(stable(1.0, 100_000)).alpha == pytest.approx(1, rel=0.15)
    assert hill(stable(1.9, 100_000)).alpha > 2.05


def test_both_are_their_formulas():
    values = stable(1.3, 103, seed=4)
    sizes = np.sort(np.abs(values.numpy()))[::-1]
    one = hill(values, k=20)
    assert one.alpha == pytest.approx(1 / np.mean(np.log(sizes[:20] / sizes[20])), rel=1e-12)
    assert one[1:] == (
        pytest.approx(one.alpha * (1 - 1.959964 / math.sqrt(20)), rel=1e-6),
        pytest.approx(one.alpha * (1 + 1.959964 / math.sqrt(20)), rel=1e-6),
        20,
    )
    sums = values[:100].view(5, 20).sum(0)
    pieces = (sums.abs().log() - values[:100].view(5, 20).abs().log().mean(0)) / math.log(5)
    other = log_moment(values, block=5)
    assert 1 / other.alpha == pytest.approx(float(pieces.mean()), rel=1e-12)
    whole = (float(sums.abs().log().mean()) - float(values[:100].abs().log().mean())) / math.log(5)
    assert 1 / other.alpha == pytest.approx(whole, rel=1e-12)
    jackknife = [float(torch.cat([pieces[:i], pieces[i + 1 :]]).mean()) for i in range(20)]
    error = math.sqrt(19 / 20 * sum((one - np.mean(jackknife)) ** 2 for one in jackknife))
    ends = [1 / (float(pieces.mean()) + sign * 1.959964 * error) for sign in (1, -1)]
    assert other[1:] == (pytest.approx(ends[0], rel=1e-6), pytest.approx(ends[1], rel=1e-6), 20)


@given(seed=st.integers(0, 1000), scale=st.sampled_from([2.0**-90, 3.0, -7.0, 2.0**100]), zeros=st.integers(0, 30))
def test_scale_sign_and_pruned_zeros_change_nothing(seed, scale, zeros):
    values = stable(1.5, 200, seed=seed)
    places = torch.randperm(200 + zeros, generator=generator(seed))[:200].sort().values
    pruned = torch.zeros(200 + zeros, dtype=torch.float64)
    pruned[places] = values * scale
    assert log_moment(pruned) == pytest.approx(log_moment(values), rel=1e-9)
    assert hill(pruned) == pytest.approx(hill(values), rel=1e-9)
    order = torch.randperm(200, generator=generator(seed))
    assert hill(-values[order].view(10, 20)) == pytest.approx(hill(values), rel=1e-12)


def test_neighbours_that_hang_together_do_not_come_into_one_sum():
    neurons = stable(1.7, 1000).repeat_interleave(100)  # one draw a neuron, on all its weights
    assert log_moment(neurons).alpha == pytest.approx(1.7, rel=0.1)
    chained = neurons.view(-1, 100).T.flatten()  # the same in another order: neighbours are independent
    assert log_moment(chained, block=100).alpha == pytest.approx(1, rel=0.05)


def test_rows_are_samples_whose_values_are_never_added_up():
    rows = stable(1.6, 4, 2500)
    found = log_moment(rows)
    assert found.used == 200
    apart = [1 / log_moment(row).alpha for row in rows]
    assert 1 / found.alpha == pytest.approx(float(np.mean(apart)), rel=1e-12)
    cancelling = torch.cat([rows, -rows])
    assert log_moment(cancelling).alpha == pytest.approx(found.alpha, rel=1e-12)
    rows[0, ::2] = 0  # the shortest row gives K
    assert log_moment(rows).used == 1250 // 35 + 3 * (2500 // 35)


def test_noise_of_gradients_is_what_they_differ_by_from_their_mean():
    gradients = [torch.tensor([[1.0, 4], [0, 0]]), torch.tensor([[3.0, 4], [2, 0]])]
    noise = gradient_noise(gradients)
    assert noise.tolist() == [[-1, 0, -1, 0], [1, 0, 1, 0]]
    assert noise.dtype == torch.float64
    drift = torch.linspace(-50, 50, 10_000)
    found = log_moment(gradient_noise([drift + row for row in stable(1.5, 8, 10_000)]))
    assert found.alpha == pytest.approx(1.5, rel=0.05)
    with pytest.raises(ValueError, match="1 gradients have no noise about their mean"):
        gradient_noise(gradients[:1])


def test_a_mean_looks_like_index_1_until_it_is_taken_off():
    values = stable(1.8, 10_000) + 30
    assert log_moment(values).alpha == pytest.approx(1, abs=0.02)
    assert log_moment(centred(values)).alpha == pytest.approx(1.8, rel=0.1)
    assert centred(torch.tensor([0.0, 5, 0, 7, 1])).tolist() == [0, 2, -4]
    assert centred(torch.zeros(3)).tolist() == []


def test_ends_that_lie_at_infinity():
    assert hill(torch.ones(10), k=3)[:3] == (math.inf, math.inf, math.inf)
    light = torch.cat([torch.ones(50), torch.linspace(-1.1, -1.05, 50)])  # sums shrink, as of no stable law
    assert log_moment(light, block=2)[:3] == (math.inf, math.inf, math.inf)
    wide = log_moment(torch.tensor([1.0, 1, 10, -0.5]), block=2)  # of 11 and 0.5
    assert (wide.used, wide.high) == (2, math.inf)
    assert 0 < wide.low < wide.alpha
    assert hill(pareto(1, 6), k=2).low == 0


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda: hill(torch.zeros(9)), "k=0 of 0 values that are not 0"),
        (lambda: hill(torch.tensor([3.0, 0])), "k=1 of 1 values"),
        (lambda: hill(torch.arange(9), k=8), "k=8 of 8 values"),
        (lambda: hill(torch.arange(9), k=0), "k=0 of 8 values"),
        (lambda: hill(torch.tensor([1.0, torch.inf])), "a value is not finite"),
        (lambda: hill(torch.arange(9), confidence=1), "confidence=1 is outside"),
        (lambda: log_moment(torch.tensor([1.0, torch.nan])), "a value is not finite"),
        (lambda: log_moment(torch.arange(4)), "3 values that are not 0 give no two sums of block=1"),
        (lambda: log_moment(torch.arange(9.0), block=5), "8 values that are not 0 give no two sums of block=5"),
        (lambda: log_moment(torch.arange(9.0), block=1), "give no two sums of block=1"),
        (lambda: log_moment(torch.tensor([1.0] * 8 + [-1] * 8), block=2), "sums of these values cancel"),
        (lambda: log_moment(torch.zeros(0, 5)), "0 values that are not 0"),
    ],
)
def test_what_has_no_tail_is_refused_in_one_line(of, message):
    with pytest.raises(ValueError, match=message) as caught:
        of()
    assert "\n" not in str(caught.value)
