import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.scopes import SCOPES, erk, layerwise, whole

LENET = {"hidden.0": (300, 784), "hidden.1": (100, 300), "output": (10, 100)}
LENET_RATES = {"hidden.0": 0.2, "hidden.1": 0.2, "output": 0.1}
# Percent of weights left, as the legends of arXiv 1803.03635 print them.
PAPER = [100, 80.0, 64.1, 51.3, 41.1, 32.9, 26.3, 21.1, 16.9, 13.5, 10.8, 8.7, 7.0, 5.6, 4.5, 3.6]
CONV = {
    "conv1": (16, 3, 3, 3),
    "conv2": (32, 16, 3, 3),
    "conv3": (64, 32, 3, 3),
    "wide": (256, 1024),
    "output": (10, 256),
}
SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6)


def dense(shapes):
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}


def flat(budget):
    """The budget of a scope that treats each tensor by itself, by name."""
    assert all(len(names) == 1 for names in budget)
    return {name: keep for (name,), keep in budget.items()}


def prune(scope, masks, rates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(mask.shape, generator=generator) for name, mask in masks.items()}
    return M.keep_highest(scores, masks, scope(masks, rates, 1))


def every(masks, rate):
    return dict.fromkeys(masks, rate)


def test_lenet_300_100_has_the_densities_of_the_paper():
    masks = dense(LENET)
    exact = {name: math.prod(shape) for name, shape in LENET.items()}
    for level, percent in enumerate(PAPER):
        assert M.kept(masks) == exact, f"level {level}"
        assert 100 * M.density(masks) == pytest.approx(percent, abs=0.051), f"level {level}"
        masks = prune(layerwise, masks, LENET_RATES, level)
        for name, alive in exact.items():
            rate = Fraction(1, 10) if name == "output" else Fraction(1, 5)
            exact[name] = alive - math.floor(rate * alive + Fraction(1, 2))


def test_rounds_of_a_layerwise_budget_are_so_many_levels():
    masks = dense(LENET)
    for rounds in range(16):
        assert flat(layerwise(dense(LENET), LENET_RATES, rounds)) == M.kept(masks)
        masks = prune(layerwise, masks, LENET_RATES)


def test_layerwise_removes_each_layers_own_rate_of_its_survivors():
    masks = dense({"a": (10, 10), "b": (10, 5)})
    masks["a"][0] = False
    assert layerwise(masks, {"a": 0.5, "b": 0.0}) == {("a",): 45, ("b",): 50}


def test_global_keeps_one_exact_total_and_ranks_all_layers_together():
    masks = dense(LENET)
    assert whole(masks, every(masks, 0.2)) == {("hidden.0", "hidden.1", "output"): 212_960}
    scores = {"hidden.0": torch.full((300, 784), 0.1), "hidden.1": torch.ones(100, 300), "output": torch.ones(10, 100)}
    new = M.keep_highest(scores, masks, whole(masks, every(masks, 0.2)))
    assert M.kept(new) == {"hidden.0": 235_200 - 53_240, "hidden.1": 30_000, "output": 1_000}


def test_rounds_of_a_global_budget_are_so_many_levels():
    masks = dense(CONV)
    for rounds in range(8):
        assert whole(dense(CONV), every(masks, 0.3), rounds) == {tuple(CONV): sum(M.kept(masks).values())}
        masks = prune(whole, masks, every(masks, 0.3))


@pytest.mark.parametrize(("scope", "name"), [(whole, "global"), (erk, "erk")])
def test_rates_that_differ_are_refused_where_they_have_no_meaning(scope, name):
    message = rf"^rates per layer need scope='layerwise'; scope='{name}' has one rate \(or `exclude` layers\)$"
    with pytest.raises(ValueError, match=message):
        scope(dense(LENET), LENET_RATES)


@pytest.mark.parametrize(("rounds", "full"), [(1, 3), (3, 3), (8, 2), (12, 1), (20, 0)])
def test_erk_densities_are_proportional_to_sum_over_product_of_the_dimensions(rounds, full):
    """The proportionality of arXiv 1911.11134 with a common factor, found here by bisection, that caps at one."""
    sizes = {name: math.prod(shape) for name, shape in CONV.items()}
    total = M.survivors(sum(sizes.values()), 0.2, rounds)

    def ideal(factor):
        return {n: min(1.0, factor * sum(CONV[n]) / sizes[n]) * sizes[n] for n in CONV}

    low, high = 0.0, float(max(sizes.values()))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(ideal(middle).values()) < total else (low, middle)
    budget = flat(erk(dense(CONV), every(CONV, 0.2), rounds))
    assert sum(budget.values()) == total
    for name, value in ideal(high).items():
        assert abs(budget[name] - value) < 1, name
    assert sum(budget[name] == sizes[name] for name in CONV) == full


def test_erk_densities_of_two_equal_fans_by_hand():
    masks = dense({"square": (20, 20), "long": (10, 40)})  # 400 weights each; sums of dimensions 40 and 50
    assert flat(erk(masks, every(masks, 0.55))) == {"square": 160, "long": 200}


def test_erk_fills_a_small_layer_and_gives_the_rest_to_the_other():
    masks = dense({"small": (2, 2), "wide": (40, 40)})
    assert flat(erk(masks, every(masks, 0.5))) == {"small": 4, "wide": 798}


@given(SHAPES, st.integers(0, 10**6), st.floats(0, 0.95), st.integers(1, 12))
def test_erk_is_exact_within_survivors_and_keeps_one_a_tensor(shapes, seed, rate, rounds):
    generator = torch.Generator().manual_seed(seed)
    masks = {f"t{i}": torch.rand(shape, generator=generator) < 0.6 for i, shape in enumerate(shapes)}
    for mask in masks.values():
        mask.view(-1)[0] = True
    alive = M.kept(masks)
    budget = flat(erk(masks, every(masks, rate), rounds))
    assert list(budget) == list(masks)
    assert sum(budget.values()) == max(M.survivors(sum(alive.values()), rate, rounds), len(masks))
    for name, keep in budget.items():
        assert 1 <= keep <= alive[name]


@given(SHAPES, st.integers(0, 10**6), st.sampled_from(sorted(SCOPES)), st.floats(0.05, 0.9))
def test_masks_shrink_from_level_to_level_in_every_scope(shapes, seed, scope, rate):
    masks = dense({f"t{i}": shape for i, shape in enumerate(shapes)})
    for level in range(8):
        new = prune(SCOPES[scope], masks, every(masks, rate), seed + level)
        assert all(not (new[name] & ~masks[name]).any() for name in masks)
        if scope != "global":
            assert all(mask.any() for mask in new.values())
        masks = new


def test_erk_budgets_fall_for_every_layer_over_levels():
    masks = dense(CONV)
    budgets = []
    for level in range(25):
        masks = prune(erk, masks, every(masks, 0.2), level)
        budgets.append(M.kept(masks))
        assert sum(budgets[-1].values()) == M.survivors(sum(map(math.prod, CONV.values())), 0.2, level + 1)
    for before, after in itertools.pairwise(budgets):
        assert all(after[name] <= before[name] for name in CONV)
    assert budgets[-1]["conv1"] < 16 * 3 * 3 * 3


def test_rounds_of_an_erk_budget_are_so_many_levels_up_to_rounding():
    masks = dense(CONV)
    for rounds in range(1, 12):
        masks = prune(erk, masks, every(masks, 0.2), rounds)
        one_shot = flat(erk(dense(CONV), every(CONV, 0.2), rounds))
        assert sum(one_shot.values()) == sum(M.kept(masks).values())
        assert all(abs(one_shot[name] - count) <= 1 for name, count in M.kept(masks).items())


def test_the_registry_names_the_scopes():
    assert list(SCOPES.items()) == [("layerwise", layerwise), ("global", whole), ("erk", erk)]
