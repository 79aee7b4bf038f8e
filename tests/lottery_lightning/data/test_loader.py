import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_lightning.data import EpochOrder, ShuffledTensorLoader, TensorLoader


def loader(size=20, batch_size=6, seed=0, level=0, rank=0, world_size=1):
    """Examples whose image and label are their index."""
    index = torch.arange(size)
    return ShuffledTensorLoader(index.float().view(-1, 1), index, batch_size, EpochOrder(seed, level), rank, world_size)


def labels(batches):
    return [y.tolist() for _, y in batches]


def flat(batches):
    return [int(label) for _, y in batches for label in y]


def test_the_permutation_is_the_same_on_every_machine_and_in_every_release():
    order = EpochOrder(0, 0)
    assert order.permutation(1197)[:6].tolist() == [79, 323, 573, 358, 1024, 312]
    order.set_epoch(3)
    assert order.permutation(10).tolist() == [2, 6, 5, 3, 1, 4, 7, 9, 8, 0]
    assert EpochOrder(5, 2).permutation(10).tolist() == [5, 1, 4, 9, 8, 3, 7, 6, 0, 2]


@pytest.mark.usefixtures("global_rng_untouched")
def test_the_permutation_depends_on_seed_level_and_epoch_alone():
    def drawn(seed, level, epoch):
        order = EpochOrder(seed, level)
        order.set_epoch(epoch)
        return tuple(order.permutation(50).tolist())

    places = [(seed, level, epoch) for seed in range(3) for level in range(3) for epoch in range(3)]
    orders = {place: drawn(*place) for place in places}
    assert len(set(orders.values())) == len(places)
    for place in reversed(places):
        assert drawn(*place) == orders[place]
    assert drawn(1, 11, 0) != drawn(11, 1, 0)
    assert drawn(1, 1, 10) != drawn(1, 11, 0)


def test_the_permutation_ignores_the_global_random_state():
    torch.manual_seed(1)
    random.seed(1)
    first = EpochOrder(3, 1).permutation(30)
    torch.manual_seed(2)
    random.seed(2)
    assert torch.equal(EpochOrder(3, 1).permutation(30), first)


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("batch_size", [1, 6, 7, 20, 50])
def test_an_epoch_holds_every_example_once_in_batches_of_which_the_last_may_be_smaller(batch_size):
    batches = list(loader(20, batch_size))
    sizes = [len(y) for _, y in batches]
    full, rest = divmod(20, batch_size)
    assert sizes == [batch_size] * full + [rest] * bool(rest)
    assert sorted(flat(batches)) == list(range(20))
    assert all(torch.equal(x[:, 0], y.float()) for x, y in batches)


def test_each_epoch_has_an_order_of_its_own_that_comes_again_in_another_run():
    one, two = loader(), loader()
    epochs = [flat(one) for _ in range(4)]
    assert len(set(map(tuple, epochs))) == 4
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 4
    for epoch in range(4):
        two.sampler.set_epoch(epoch)
        assert flat(two) == epochs[epoch]


def test_going_back_to_an_epoch_gives_its_order_again():
    one = loader()
    epochs = [flat(one) for _ in range(3)]
    one.sampler.set_epoch(1)
    assert flat(one) == epochs[1]


def test_levels_and_seeds_have_orders_of_their_own():
    assert flat(loader(level=1)) != flat(loader(level=0)) != flat(loader(seed=1))
    assert flat(loader(level=1)) == flat(loader(level=1))


def test_the_length_is_constant():
    one = loader(20, 6)
    lengths = [len(one)]
    for _ in one:
        lengths.append(len(one))
    one.load_state_dict({"epoch": 2, "batch": 3})
    assert set(lengths) | {len(one)} == {4}


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 6), st.data())
def test_a_fit_that_stops_anywhere_goes_on_exactly(size, batch_size, before, data):
    unbroken, broken = loader(size, batch_size), loader(size, batch_size)
    whole = [batch for _ in range(before // 2 + 3) for batch in labels(unbroken)]
    stop = data.draw(st.integers(0, 2 * len(broken)))
    seen, state = [], broken.state_dict()
    while len(seen) < stop:
        for _, y in broken:
            seen.append(y.tolist())
            state = broken.state_dict()  # what a checkpoint made during the step holds
            if len(seen) == stop:
                break
    resumed = loader(size, batch_size)
    resumed.load_state_dict(state)
    while len(seen) < len(whole):
        seen += labels(resumed)
    assert seen == whole


def test_set_epoch_stays_in_the_midst_of_the_epoch_that_a_checkpoint_was_made_in():
    whole = labels(loader())
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "batch": 3})
    resumed.sampler.set_epoch(0)
    assert labels(resumed) == whole[3:]
    resumed.load_state_dict({"epoch": 0, "batch": 3})
    resumed.sampler.set_epoch(1)
    assert len(labels(resumed)) == 4


def test_the_position_is_two_integers():
    one = loader()
    one.sampler.set_epoch(2)
    iterator = iter(one)
    next(iterator)
    next(iterator)
    assert one.state_dict() == {"epoch": 2, "batch": 2}


@given(st.integers(5, 60), st.integers(1, 9), st.integers(1, 5))
def test_ranks_share_an_epoch_without_overlap_in_equally_many_steps(size, batch_size, world_size):
    shares = [list(loader(size, batch_size, rank=rank, world_size=world_size)) for rank in range(world_size)]
    seen = [index for share in shares for index in flat(share)]
    assert len(seen) == len(set(seen)) == size // world_size * world_size
    assert set(seen) <= set(range(size))
    assert len({tuple(len(y) for _, y in share) for share in shares}) == 1
    for rank, share in enumerate(shares):
        assert len(loader(size, batch_size, rank=rank, world_size=world_size)) == len(share)


def test_what_the_cut_leaves_out_changes_from_epoch_to_epoch():
    one = [loader(11, 4, rank=rank, world_size=3) for rank in range(3)]
    left_out = {frozenset(range(11)) - {i for rank in one for i in flat(rank)} for _ in range(12)}
    assert all(len(left) == 2 for left in left_out)
    assert len(left_out) > 6


def test_all_ranks_together_follow_the_order_of_one_process():
    ranks = [flat(loader(21, 4, rank=rank, world_size=3)) for rank in range(3)]
    assert [index for row in zip(*ranks, strict=True) for index in row] == flat(loader(21, 4))


def test_evaluation_keeps_the_stored_order_and_every_example():
    index = torch.arange(11)
    plain = TensorLoader(index.float(), index, 4)
    assert labels(plain) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert labels(plain) == labels(plain)
    assert len(plain) == 3
    ranks = [TensorLoader(index.float(), index, 2, rank, 3) for rank in range(3)]
    assert [flat(rank) for rank in ranks] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    assert [len(rank) for rank in ranks] == [2, 2, 2]


def test_images_and_labels_stay_on_their_device_and_of_their_type():
    images, index = torch.zeros(5, 1, 2, 2, dtype=torch.float64), torch.arange(5)
    for made in (TensorLoader(images, index, 2), ShuffledTensorLoader(images, index, 2, EpochOrder(0))):
        for x, y in made:
            assert (x.dtype, x.shape[1:], y.dtype) == (torch.float64, (1, 2, 2), torch.int64)
