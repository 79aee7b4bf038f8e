"""No slice that is divided by its norm loses its last weight."""

import pytest
import torch

from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional import slices
from lottery_callbacks.functional.slices import WHOLE


def drawn(shape=(4, 3, 5), seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [0, 1, 2, WHOLE])
def test_the_highest_weight_of_each_slice_stays_and_the_count_is_exact(dim):
    scores, masks = {"v": drawn(), "w": drawn((6, 6), 1) + 9}, M.ones({"v": drawn(), "w": drawn((6, 6))})
    masks["v"] &= drawn(seed=2) < 0.9
    count = slices.alive(masks, {"v": dim})["v"]
    assert count == (1 if dim == WHOLE else masks["v"].shape[dim])
    raised = slices.protect(scores, masks, {"v": dim})
    assert raised["w"] is scores["w"]
    new = M.keep_highest(raised, masks, {("v", "w"): 10})  # every weight of w has a higher score than all of v
    assert int(new["v"].sum()) == count
    assert int(new["w"].sum()) == 10 - count
    alive = scores["v"].masked_fill(~masks["v"], -1)
    best = alive.max() if dim == WHOLE else alive.movedim(dim, 0).flatten(1).max(1).values
    assert torch.equal(scores["v"][new["v"]].sort().values, best.reshape(-1).sort().values)
    assert not slices.empty(new, {"v": dim})


def test_a_slice_that_is_empty_already_stays_empty_and_is_counted():
    masks = {"v": torch.tensor([[True, False], [False, False], [False, True]])}
    assert slices.alive(masks, {"v": 0}) == {"v": 2}
    assert slices.empty(masks, {"v": 0}) == {"v": 1}
    assert slices.empty(masks, {"v": 1}) == {}
    raised = slices.protect({"v": drawn((3, 2))}, masks, {"v": 0})
    assert torch.equal(M.keep_highest(raised, masks, {("v",): 2})["v"], masks["v"])


def test_a_budget_below_the_number_of_slices_is_raised_to_it():
    masks = M.ones({"v": drawn((4, 3)), "u": drawn((2, 3)), "w": drawn((5, 5))})
    budget = {("v",): 3, ("u", "w"): 9}
    assert slices.at_least(budget, masks, {"v": 0, "u": 0}) == {("v",): 4, ("u", "w"): 9}


def test_a_score_that_is_not_finite_is_not_hidden():
    scores, masks = {"v": drawn((2, 3))}, M.ones({"v": drawn((2, 3))})
    scores["v"][1, 2] = torch.nan
    with pytest.raises(ValueError, match="scores of v are not finite"):
        M.keep_highest(slices.protect(scores, masks, {"v": 0}), masks, {("v",): 4})
