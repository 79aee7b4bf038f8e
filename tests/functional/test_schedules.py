from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.schedules import budget_at, cubic, geometric, updates

SHAPES = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)


def dense(shapes):
    return {f"t{i}": torch.ones(shape, dtype=torch.bool) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize(
    ("begin", "end", "every", "steps"),
    [(0, 10, 5, [0, 5, 10]), (2, 10, 5, [2, 7, 10]), (0, 10, 99, [0, 10]), (4, 4, 3, [4]), (7, 8, 1, [7, 8])],
)
def test_updates_begin_and_end_where_they_are_told(begin, end, every, steps):
    assert updates(begin, end, every) == steps


def test_an_end_before_the_beginning_and_no_distance_between_updates_are_refused():
    with pytest.raises(ValueError, match="ends at step 3, before it begins at step 4"):
        updates(4, 3, 1)
    with pytest.raises(ValueError, match="an update every 0 steps"):
        updates(0, 3, 0)


def test_the_cubic_schedule_is_the_papers_formula():
    """s_t = s_f + (s_i - s_f)(1 - (t - t_0) / (n dt))^3 with s_i = 0.5, s_f = 0.9, t_0 = 100, n = 4, dt = 50."""
    by_hand = {100: 0.5, 150: 0.9 - 0.4 * 0.421875, 200: 0.85, 250: 0.9 - 0.4 * 0.015625, 300: 0.9}
    found = {step: cubic(step, 100, 300, 0.9, 0.5) for step in by_hand}
    assert found == pytest.approx(by_hand, abs=1e-12)


def test_outside_its_steps_the_schedule_is_exactly_initial_and_final():
    assert [cubic(step, 10, 20, 0.7, 0.1) for step in (0, 10)] == pytest.approx([0.1, 0.1])
    assert [cubic(step, 10, 20, 0.7, 0.1) for step in (20, 21, 900)] == [0.7] * 3
    assert (cubic(9, 10, 10, 0.7, 0.1), cubic(10, 10, 10, 0.7, 0.1)) == (pytest.approx(0.1), 0.7)


@given(st.integers(0, 50), st.integers(1, 200), st.floats(0, 0.99), st.floats(0, 1))
def test_sparsity_never_falls_and_stays_between_initial_and_final(begin, length, final, share):
    initial = share * final
    path = [cubic(step, begin, begin + length, final, initial) for step in range(begin + length + 2)]
    assert all(now <= later + 1e-15 for now, later in pairwise(path))
    assert min(path) >= initial - 1e-15
    assert max(path) <= final + 1e-15


def test_the_rounds_of_synflow_are_the_densities_d_to_the_i_over_n():
    assert geometric(1.0, 0.9, 4) == pytest.approx([1 - 0.1 ** (i / 4) for i in (1, 2, 3, 4)])
    assert geometric(0.5, 0.9, 2) == pytest.approx([1 - (0.5 * 0.1) ** 0.5, 0.9])
    assert geometric(1.0, 0.9, 1) == [0.9]


def test_rounds_from_below_the_target_stay_where_they_are():
    assert geometric(0.05, 0.9, 3) == pytest.approx([0.95, 0.95, 0.9])
    masks = {"w": torch.arange(100) < 5}
    assert [budget_at(sparsity, masks, "layerwise") for sparsity in geometric(0.05, 0.9, 3)] == [{("w",): 5}] * 3


@given(SHAPES, st.floats(0, 0.999))
def test_each_scope_keeps_exactly_the_total_less_the_rounded_share(shapes, sparsity):
    masks = dense(shapes)
    sizes = M.kept(masks)
    total = sum(sizes.values())
    wanted = {(name,): max(1, size - round(sparsity * size)) for name, size in sizes.items()}
    assert budget_at(sparsity, masks, "layerwise") == wanted
    assert budget_at(sparsity, masks, "global") == {tuple(masks): max(1, total - round(sparsity * total))}
    erk = budget_at(sparsity, masks, "erk")
    assert sum(erk.values()) == max(len(masks), total - round(sparsity * total))
    assert all(1 <= keep <= sizes[name] for (name,), keep in erk.items())


def test_it_is_the_removed_weights_that_are_rounded_halves_to_even():
    for size, left in ((5, 3), (7, 3), (1, 1), (2, 1)):  # removed: round(2.5), round(3.5), round(0.5), 1
        assert budget_at(0.5, dense([(size,)]), "layerwise") == {("t0",): left}
    assert budget_at(0.999, dense([(3,)]), "layerwise") == {("t0",): 1}


@pytest.mark.parametrize("scope", ["layerwise", "global", "erk"])
@given(shapes=SHAPES, path=st.lists(st.floats(0, 0.999), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_along_any_path_of_sparsities_no_weight_returns(scope, shapes, path, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = dense(shapes)
    sizes, highest = {name: mask.numel() for name, mask in masks.items()}, 0.0
    for sparsity in path:
        scores = {name: torch.rand(mask.shape, generator=generator) for name, mask in masks.items()}
        new = M.keep_highest(scores, masks, budget_at(sparsity, masks, scope))
        assert all(not (new[name] & ~masks[name]).any() for name in masks)
        masks, highest = new, max(highest, sparsity)
    if scope == "layerwise":
        assert M.kept(masks) == {name: max(1, size - round(highest * size)) for name, size in sizes.items()}
    else:
        total, least = sum(sizes.values()), len(masks) if scope == "erk" else 1
        assert sum(M.kept(masks).values()) == max(least, total - round(highest * total))


@pytest.mark.parametrize("total", [266_200, 25_502_912, 9_408 * 4_001])
def test_the_counts_of_large_networks_are_exact_at_every_step(total):
    """The rate that a scope rounds is made from the count: no step of a schedule may be off by one weight."""
    alive = total
    for step in range(0, 1_001, 7):
        sparsity = cubic(step, 0, 1_000, 0.98)
        kept_before, alive = alive, total - round(sparsity * total)
        rate = (kept_before - alive) / kept_before
        assert M.survivors(kept_before, rate) == alive
