"""What holds of masks for any shapes, scores and masks, under each rule of counting."""

import math
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional import popup
from lottery_callbacks.functional.nm import indivisible, keep_n_of_m
from lottery_callbacks.functional.schedules import budget_at, geometric
from lottery_callbacks.functional.scopes import COUNTS, SCOPES

WHOLE = {"rounded": round, "truncated": lambda x: int(x), "ceiling": lambda x: -int(-x // 1)}
COUNTING = st.sampled_from(sorted(WHOLE))
FRACTIONS = st.one_of(st.floats(0, 0.999), st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9]))


@st.composite
def networks(draw):
    """Masks that are partly pruned already, with one weight left at least, and scores with many ties."""
    shapes = draw(st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density, distinct = draw(st.sampled_from([0.1, 0.5, 1.0])), draw(st.sampled_from([1, 2, 5, 10**6]))
    masks = {f"t{i}": torch.rand(shape, generator=generator) < density for i, shape in enumerate(shapes)}
    for mask in masks.values():
        mask.view(-1)[-1] = True
    scores = {n: torch.randint(distinct, mask.shape, generator=generator) / 7 for n, mask in masks.items()}
    return masks, scores


def in_order(scores, masks, names, keep):
    """The kept places of a group by a plain sort: highest first, and of equal ones the later index first."""
    places = [(name, i) for name in names for i in masks[name].flatten().nonzero().flatten().tolist()]
    ranked = sorted(range(len(places)), key=lambda at: (float(scores[places[at][0]].flatten()[places[at][1]]), at))
    return {places[at] for at in ranked[len(places) - keep :]}


def kept_places(masks):
    return {(name, i) for name, mask in masks.items() for i in mask.flatten().nonzero().flatten().tolist()}


@given(networks(), st.data())
def test_any_budget_is_kept_exactly_by_the_highest_and_of_equals_by_the_last(network, data):
    masks, scores = network
    names = tuple(masks)
    cut = data.draw(st.integers(0, len(names)))
    groups = [group for group in (names[:cut], names[cut:]) if group]
    alive = {group: sum(int(masks[name].sum()) for name in group) for group in groups}
    budget = {group: data.draw(st.integers(1, alive[group])) for group in groups}
    new = M.keep_highest(scores, masks, budget)
    expected = set().union(*(in_order(scores, masks, group, keep) for group, keep in budget.items()))
    assert kept_places(new) == expected
    assert list(new) == list(masks)


@given(networks(), FRACTIONS, st.integers(1, 4), COUNTING, st.sampled_from(sorted(SCOPES)))
def test_each_scope_removes_its_count_of_the_survivors_at_each_level(network, rate, rounds, counts, scope):
    masks, scores = network
    new = M.keep_highest(scores, masks, SCOPES[scope](masks, dict.fromkeys(masks, rate), rounds, counts))
    assert kept_places(new) <= kept_places(masks)

    def left(alive):
        for _ in range(rounds):
            alive = max(1, alive - WHOLE[counts](rate * alive))
        return alive

    before, after = M.kept(masks), M.kept(new)
    if scope == "layerwise":
        assert after == {name: left(alive) for name, alive in before.items()}
    else:
        total = left(sum(before.values()))
        assert sum(after.values()) == (max(total, len(masks)) if scope == "erk" else total)


@given(networks(), st.lists(FRACTIONS, min_size=1, max_size=4), COUNTING, st.sampled_from(sorted(SCOPES)))
def test_a_schedule_keeps_its_count_of_the_dense_network_and_returns_no_weight(network, path, counts, scope):
    masks, scores = network
    for sparsity in path:
        before = M.kept(masks)
        new = M.keep_highest(scores, masks, budget_at(sparsity, masks, scope, counts))
        assert kept_places(new) <= kept_places(masks)
        sizes = {name: mask.numel() for name, mask in masks.items()}
        if scope == "layerwise":
            wanted = {name: max(1, size - WHOLE[counts](sparsity * size)) for name, size in sizes.items()}
            assert M.kept(new) == {name: min(before[name], keep) for name, keep in wanted.items()}
        else:
            total = sum(sizes.values())
            least = len(masks) if scope == "erk" else 1
            wanted = min(sum(before.values()), max(least, total - WHOLE[counts](sparsity * total)))
            assert sum(M.kept(new).values()) == wanted
        masks = new


@given(st.integers(1, 10**7), FRACTIONS, st.integers(1, 100))
def test_rounds_under_each_count_fall_to_the_target_and_differ_by_one_at_most(total, target, rounds):
    for sparsity in geometric(1.0, target, rounds):
        removed = {counts: whole(sparsity * total) for counts, whole in COUNTS.items()}
        exact = Fraction(sparsity * total)  # of the float product, as the published programs truncate it
        assert removed["truncated"] == math.floor(exact) <= removed["rounded"] <= removed["ceiling"] == math.ceil(exact)
        assert removed["ceiling"] - removed["truncated"] <= 1
        assert abs(removed["rounded"] - exact) <= Fraction(1, 2)


@given(networks(), FRACTIONS, st.sampled_from(["layerwise", "layerwise_truncated", "global"]))
def test_edge_popup_keeps_its_count_of_the_highest_sizes_and_of_equals_the_first(network, sparsity, scope):
    _, scores = network
    sizes = {name: score.numel() for name, score in scores.items()}
    budget = popup.budget(sizes, sparsity, scope)
    whole = int if scope == "layerwise_truncated" else round
    groups = [tuple(sizes)] if scope == "global" else [(name,) for name in sizes]
    assert list(budget) == groups
    masks = popup.highest(scores, budget)
    for group in groups:
        total = sum(sizes[name] for name in group)
        flat = torch.cat([scores[name].flatten() for name in group])
        order = sorted(range(total), key=lambda at: (-float(flat[at]), at))
        expected = set(order[: max(1, total - whole(sparsity * total))])
        assert set(torch.cat([masks[name].flatten() for name in group]).nonzero().flatten().tolist()) == expected


@given(networks(), st.integers(1, 4), st.data())
def test_a_pattern_keeps_n_of_each_group_or_all_that_survive_in_it(network, m, data):
    masks, scores = network
    n = data.draw(st.integers(1, m))
    new = keep_n_of_m(scores, masks, n, m)
    dense = indivisible(masks, m)
    for name, mask in masks.items():
        assert not (new[name] & ~mask).any()
        if name in dense:
            assert torch.equal(new[name], mask)
            continue
        for first in range(0, mask.shape[1], m):
            group = slice(first, first + m)
            assert torch.equal(new[name][:, group].sum(1), mask[:, group].sum(1).clamp(max=n))
            lost = mask[:, group] & ~new[name][:, group]
            highest_lost = scores[name][:, group].masked_fill(~lost, -1).amax(1)
            lowest_kept = scores[name][:, group].masked_fill(~new[name][:, group], torch.inf).amin(1)
            assert (highest_lost <= lowest_kept).all()
