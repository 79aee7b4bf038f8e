import pytest

from lottery_callbacks.functional.early_stop import early_stop_iteration, first_iteration_reaching


def test_the_early_stop_is_the_minimum_of_the_curve():
    assert early_stop_iteration([100, 200, 300, 400], [0.9, 0.3, 0.2, 0.25]) == 300


def test_the_first_of_equal_minima_counts():
    assert early_stop_iteration([10, 20, 30], [0.5, 0.1, 0.1]) == 20


def test_one_validation_is_enough_and_none_is_not():
    assert early_stop_iteration([7], [2.0]) == 7
    with pytest.raises(ValueError, match="no validation was recorded: validate at least once a run"):
        early_stop_iteration([], [])


def test_a_minimum_at_either_end_is_found():
    assert early_stop_iteration([1, 2, 3], [0.1, 0.2, 0.3]) == 1
    assert early_stop_iteration([1, 2, 3], [0.3, 0.2, 0.1]) == 3


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_loss_that_is_nan_is_never_the_minimum(place):
    losses = [0.9, 0.3, 0.2, 0.25]
    losses[place] = float("nan")
    assert early_stop_iteration([100, 200, 300, 400], losses) == 300


def test_the_first_iteration_at_or_below_the_target():
    steps, losses = [10, 20, 30, 40], [0.9, 0.5, 0.4, 0.5]
    assert first_iteration_reaching(steps, losses, 0.5) == 20
    assert first_iteration_reaching(steps, losses, 0.45) == 30
    assert first_iteration_reaching(steps, losses, 2.0) == 10


def test_a_target_that_is_never_reached_gives_none():
    assert first_iteration_reaching([10, 20], [0.9, 0.5], 0.4) is None
    assert first_iteration_reaching([], [], 0.4) is None
    assert first_iteration_reaching([10, 20], [float("nan"), float("nan")], 0.4) is None


def test_a_curve_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        first_iteration_reaching([10, 20], [0.9], 0.4)
