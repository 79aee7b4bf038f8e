import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.nm import indivisible, keep_n_of_m

PATTERNS = st.integers(1, 8).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m)))


def by_hand(scores, mask, n, m):
    """Loops over outputs, places and groups; removes the lowest survivors one after another."""
    new = mask.clone()
    for out in range(mask.shape[0]):
        for place in torch.cartesian_prod(*[torch.arange(size) for size in (1, *mask.shape[2:])]).view(
            -1, mask.ndim - 1
        ):
            tail = tuple(place[1:].tolist())
            for first in range(0, mask.shape[1], m):
                alive = [i for i in range(first, first + m) if new[(out, i, *tail)]]
                alive.sort(key=lambda i: (float(scores[(out, i, *tail)]), i))
                for i in alive[: max(0, len(alive) - n)]:
                    new[(out, i, *tail)] = False
    return new


@given(
    pattern=PATTERNS,
    out=st.integers(1, 3),
    groups=st.integers(1, 3),
    kernel=st.lists(st.integers(1, 3), max_size=2),
    distinct=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_is_the_loop_by_hand_also_with_ties_and_under_a_mask(pattern, out, groups, kernel, distinct, seed):
    (n, m), generator = pattern, torch.Generator().manual_seed(seed)
    shape = (out, groups * m, *kernel)
    scores = torch.rand(shape, generator=generator) if distinct else torch.randint(0, 3, shape, generator=generator)
    for mask in (torch.ones(shape, dtype=torch.bool), torch.rand(shape, generator=generator) < 0.6):
        new = keep_n_of_m({"w": scores}, {"w": mask}, n, m)["w"]
        assert new.dtype == torch.bool
        assert torch.equal(new, by_hand(scores, mask, n, m))


@given(pattern=PATTERNS, out=st.integers(1, 4), groups=st.integers(1, 4), seed=st.integers(0, 999))
def test_every_group_of_a_dense_linear_weight_keeps_exactly_n(pattern, out, groups, seed):
    (n, m), generator = pattern, torch.Generator().manual_seed(seed)
    scores = {"w": torch.randn(out, groups * m, generator=generator)}
    new = keep_n_of_m(scores, M.ones(scores), n, m)["w"]
    assert (new.view(out, groups, m).sum(2) == n).all()
    kept, removed = scores["w"].view(-1, m)[new.view(-1, m)], scores["w"].view(-1, m)[~new.view(-1, m)]
    assert (kept.view(-1, n).min(1).values >= removed.view(-1, m - n).max(1).values).all() if n < m else new.all()


def test_two_of_four_of_a_row_by_hand():
    scores = {"w": torch.tensor([[4.0, 1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])}
    new = keep_n_of_m(scores, M.ones(scores), 2, 4)["w"]
    assert new.int().tolist() == [[1, 0, 1, 0, 0, 0, 1, 1]]  # equal scores go from the lowest index up


def test_a_convolution_is_grouped_along_its_input_channels_at_each_place_of_the_kernel():
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([9.0, 8.0, 1.0, 0.0])
    scores[0, :, 0, 1] = torch.tensor([0.0, 1.0, 8.0, 9.0])
    new = keep_n_of_m({"w": scores}, M.ones({"w": scores}), 2, 4)["w"]
    assert new[0, :, 0, 0].tolist() == [True, True, False, False]
    assert new[0, :, 0, 1].tolist() == [False, False, True, True]
    assert new.is_contiguous()


def test_a_tensor_without_whole_groups_keeps_its_mask_and_is_named():
    scores = {
        "whole": torch.randn(2, 8),
        "odd": torch.randn(2, 6),
        "flat": torch.randn(8),
        "stem": torch.randn(8, 3, 3, 3),
    }
    masks = M.ones(scores) | {"odd": torch.rand(2, 6) < 0.5}
    assert indivisible(masks, 4) == ["odd", "flat", "stem"]
    new = keep_n_of_m(scores, masks, 2, 4)
    assert list(new) == list(masks)
    assert all(torch.equal(new[name], masks[name]) for name in ("odd", "flat", "stem"))
    assert int(new["whole"].sum()) == 8


def test_scores_that_are_not_finite_are_refused_unless_they_are_pruned_already():
    scores, masks = {"w": torch.tensor([[1.0, float("nan"), 2.0, 3.0]])}, {"w": torch.ones(1, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="scores of w are not finite: did the training diverge"):
        keep_n_of_m(scores, masks, 2, 4)
    masks["w"][0, 1] = False
    assert keep_n_of_m(scores, masks, 2, 4)["w"].tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 2)])
def test_no_pattern_is_refused(n, m):
    with pytest.raises(ValueError, match=f"{n}:{m} is no pattern"):
        keep_n_of_m({}, {}, n, m)
