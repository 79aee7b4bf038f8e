import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_lightning.data import EpochOrder, ShuffledTensorLoader
from lottery_lightning.data.visits import Visit, Visits

fits = st.tuples(
    st.integers(1, 60), st.lists(st.integers(1, 400), max_size=30), st.integers(1, 120), st.integers(1, 400)
)


@given(fits, st.integers(0, 400))
def test_visits_cover_an_epoch_in_order_and_end_at_every_step_that_is_due(fit, first):
    most, ends, batches, last = fit
    visits = Visits(*fit)
    reached = visits.of_epoch(first)
    assert len(reached) == visits.per_epoch <= batches
    assert reached == sorted(set(reached))
    assert reached[-1] == batches
    due = {end - first for end in ends if first < end <= first + batches}
    due |= {step - first for step in range(most, last + 1, most) if first < step <= first + batches}
    assert due <= set(reached)
    if first + batches <= last:
        assert max(after - before for before, after in zip([0, *reached], reached, strict=False)) <= most


@given(fits)
def test_the_number_of_visits_is_what_some_epoch_needs(fit):
    """No more: at some place of the fit every visit ends at a step that is due."""
    _, _, batches, _ = fit
    visits = Visits(*fit)
    needs = [len({cut - first for cut in visits.cuts if first < cut < first + batches}) + 1 for first in range(401)]
    assert visits.per_epoch == max(needs)


def test_steps_between_visits_are_few_where_nothing_is_due():
    visits = Visits(most=50, ends=range(100, 5001, 100), batches=917, last=5000)
    assert visits.per_epoch == 20  # 55,000 / 60 images: 18 or 19 multiples of 50, and the end
    assert visits.before(0, 0) == 0
    assert visits.before(917, 0) == 20
    assert visits.before(49, 917) == 2  # 917 + 1, which is spare, and 917 + 33 = 950


def loader(visits=None, done=lambda: 0, augment=None):
    images = torch.arange(23.0).view(23, 1)
    return ShuffledTensorLoader(
        images, torch.arange(23), 4, EpochOrder(7, 1), augment=augment, visits=visits, steps_done=done
    )


def noise(images, generator):
    return images + torch.rand(images.shape, generator=generator)


@pytest.mark.parametrize("begin", [0, 2, 3, 5, 6])
def test_the_batches_of_visits_are_those_of_single_steps(begin):
    """From any place in an epoch, also one where none of these visits ends, into the next epoch."""
    single, steps = loader(augment=noise), 6
    single.load_state_dict({"epoch": 2, "batch": begin})
    visiting = loader(Visits(4, [15], steps, 40), lambda: 2 * steps + begin, noise)
    visiting.load_state_dict({"epoch": 2, "batch": begin})
    assert visiting.steps_per_epoch == steps == len(single)
    behind = visiting.visits_done
    whole = [batch for batch in single]
    seen, items = [], 0
    for visit in visiting:
        assert isinstance(visit, Visit)
        place = visiting.state_dict()["batch"] if begin < steps else 0
        batches = list(visit)
        assert visiting.state_dict()["batch"] - place == len(batches) or begin == steps
        seen += batches
        items += 1
    assert behind + items == len(visiting) or begin == steps
    assert len(seen) == len(whole)
    for (x, y), (u, v) in zip(seen, whole, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert visiting.state_dict() == single.state_dict()
