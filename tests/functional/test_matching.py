"""Weight matching: a permuted copy comes back, another network comes nearer, and neither computes anything else."""

import itertools
import sys

import pytest
import torch
from drawn_networks import drawn, generator, outputs
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import matching
from lottery_callbacks.functional.hidden_units import permutation_groups
from lottery_callbacks.functional.matching import align, match_weights
from lottery_callbacks.functional.permutations import permuted, random_permutations
from lottery_lightning.networks import VGG, ConvNet, Dense, GroupCNN, LeNet5, ResNet, ResNet10, ResNet18, ResNet20
from lottery_lightning.networks.equivariant import GroupMaxPool2d

NETWORKS = {
    "dense": (lambda: Dense([20, 16, 12, 5]), (20,)),
    "lenet5": (LeNet5, (1, 28, 28)),
    "vgg": (lambda: VGG([8, 8, "M", 16]), (3, 8, 8)),
    "resnet": (lambda: ResNet((4, 8, 16), 2), (3, 8, 8)),
    "resnet, padding": (lambda: ResNet((4, 8, 16), 2, "padding"), (3, 8, 8)),
}
MORE = {
    "convnet": lambda: ConvNet(width=8),
    "vgg, no norm": lambda: VGG([8, "M", 16, "M"], batch_norm=False, bias=False),
    "resnet10": lambda: ResNet10(4),
    "resnet18": lambda: ResNet18(4),
    "resnet20": ResNet20,
    "c4": GroupCNN,
}


def distance(first, second):
    return sum(
        float((first[name].double() - second[name].double()).square().sum()) for name in first if "running" not in name
    )


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", [*NETWORKS, *MORE])
def test_a_permuted_copy_aligns_back_to_the_bit(case):
    network, first = drawn(MORE[case] if case in MORE else NETWORKS[case][0])
    groups = permutation_groups(network, unitwise=(GroupMaxPool2d,))
    orders = random_permutations(groups, first, generator(3))
    second = permuted(first, groups, orders)
    assert distance(first, second) > 0
    for found in (match_weights(groups, first, second), matching._Matching(groups, first, second).forward()):
        assert all(torch.equal(orders[group][found[group]], torch.arange(len(orders[group]))) for group in groups)
    aligned = align(network, first, second, groups)
    assert same(aligned, first)
    for name in first:
        if name.endswith("num_batches_tracked"):
            assert aligned[name] is second[name]


@pytest.mark.parametrize("case", NETWORKS)
def test_of_two_networks_the_second_comes_nearer_and_computes_the_same(case):
    make, shape = NETWORKS[case]
    (network, first), (_, second) = drawn(make), drawn(make, seed=1)
    aligned = align(network, first, second)
    assert distance(first, aligned) < distance(first, second)
    assert same(aligned, align(network, first, second))
    images = torch.rand(2, *shape, generator=generator())
    assert torch.allclose(outputs(network, second, images), outputs(network, aligned, images), rtol=1e-10, atol=1e-12)
    assert same(align(network, aligned, aligned), aligned)


def test_an_example_proves_the_groups_found_or_given_and_extra_state_stays():
    (network, first), (_, second) = drawn(lambda: Dense([4, 3, 2])), drawn(lambda: Dense([4, 3, 2]), seed=1)
    images, told = torch.rand(2, 4, generator=generator()), {"_extra_state": {"told": 1}}
    aligned = align(network, first | told, second | told, example=images)
    assert aligned.pop("_extra_state") == {"told": 1}
    assert same(aligned, align(network, first, second))
    wrong = {"hidden.0": [("hidden.0.weight", 0), ("output.weight", 1)]}
    with pytest.raises(ValueError, match="these groups are no symmetry of Dense"):
        align(network, first, second, wrong, images)
    align(network, first, second, wrong)  # at one's own risk


@given(st.lists(st.integers(1, 5), min_size=3, max_size=5), st.integers(0, 99), st.floats(0, 1))
def test_alignment_never_moves_the_second_network_away(sizes, seed, nearness):
    (network, first), (_, other) = drawn(lambda: Dense(sizes), seed), drawn(lambda: Dense(sizes), seed + 100)
    second = {name: nearness * first[name] + (1 - nearness) * other[name] for name in first}
    assert distance(first, align(network, first, second)) <= distance(first, second) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_where_the_first_weights_say_nothing_the_order_as_given_counts(seed):
    network, first = drawn(lambda: Dense([4, 9, 9, 9, 2], bias=False), seed)
    noise = 1e-3 * torch.randn(9, 4, generator=generator(seed))
    first, second = (first | {"hidden.0.weight": weight} for weight in (noise, -noise))
    assert same(align(network, first, second), second)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_order_of_one_group_is_nearer(seed):
    (network, first), (_, second) = (drawn(lambda: Dense([2, 5, 5, 5, 2]), seed + more) for more in (0, 100))
    groups = permutation_groups(network)
    found = match_weights(groups, first, second)
    least = distance(first, permuted(second, groups, found))
    for group, order in itertools.product(groups, itertools.permutations(range(5))):
        assert distance(first, permuted(second, groups, found | {group: torch.tensor(order)})) >= least - 1e-9


def test_of_one_hidden_layer_the_order_is_the_best_of_all():
    (network, first), (_, second) = drawn(lambda: Dense([3, 5, 2])), drawn(lambda: Dense([3, 5, 2]), seed=1)
    groups = permutation_groups(network)
    every = [{"hidden.0": torch.tensor(order)} for order in itertools.permutations(range(5))]
    best = min(every, key=lambda orders: distance(first, permuted(second, groups, orders)))
    assert torch.equal(match_weights(groups, first, second)["hidden.0"], best["hidden.0"])


@pytest.mark.usefixtures("global_rng_untouched")
def test_restarts_draw_from_their_generator_alone_and_lose_nothing():
    with torch.random.fork_rng():
        (network, first), (_, second) = drawn(LeNet5), drawn(LeNet5, seed=1)
    groups, source = permutation_groups(network), generator(5)
    plain = permuted(second, groups, match_weights(groups, first, second, generator=source))
    assert torch.equal(source.get_state(), generator(5).get_state())
    one, two = (align(network, first, second, restarts=2, generator=generator(5)) for _ in range(2))
    assert same(one, two)
    assert distance(first, one) <= distance(first, plain)
    with pytest.raises(ValueError, match="restarts=2 draw their orders: give a generator"):
        match_weights(groups, first, second, restarts=2)


def test_running_statistics_move_with_their_units_and_are_not_compared():
    network, first = drawn(lambda: VGG([6, 8]))
    groups = permutation_groups(network)
    second = permuted(first, groups, random_permutations(groups, first, generator(1)))
    other = second | {"features.1.running_var": torch.tensor([1e6, 0.0, 3e6, 1.0, 2e6, 0.5])}
    one, two = (match_weights(groups, first, state) for state in (second, other))
    assert same(one, two)
    moved = permuted(other, groups, two)["features.1.running_var"]
    assert torch.equal(moved, other["features.1.running_var"][one["features.0"]])


def test_aligned_weights_keep_their_zeros():
    network, state = drawn(LeNet5)
    groups = permutation_groups(network)
    masks = {
        name: torch.rand(tensor.shape, generator=generator()) < 0.2 for name, tensor in state.items() if tensor.ndim > 1
    }
    pruned = state | {name: state[name] * mask for name, mask in masks.items()}
    back = align(network, pruned, permuted(pruned, groups, random_permutations(groups, state, generator(1))))
    assert all(torch.equal(back[name] != 0, mask) for name, mask in masks.items())


def test_groups_by_hand_and_a_group_on_two_axes_of_one_tensor():
    class Twice(Dense):
        def forward(self, images):
            values = self.hidden[0](images)
            return self.output(values + self.hidden[1](values).relu())

    (network, first), (_, other) = drawn(lambda: Twice([5, 7, 7, 3])), drawn(lambda: Twice([5, 7, 7, 3]), seed=1)
    groups = permutation_groups(network)
    hand = {
        "stream": [
            *(("hidden.0.weight", 0), ("hidden.0.bias", 0), ("hidden.1.weight", 1)),
            *(("hidden.1.weight", 0), ("hidden.1.bias", 0), ("output.weight", 1)),
        ]
    }
    assert [entry[:2] for entry in groups["hidden.0"]] == hand["stream"]
    second = permuted(first, hand, {"stream": torch.randperm(7, generator=generator())})
    assert same(align(network, first, second, hand), first)
    assert distance(first, align(network, first, other)) <= distance(first, other)


def test_states_that_do_not_fit_are_refused_by_name():
    network, state = drawn(lambda: Dense([4, 3, 2]))
    groups = permutation_groups(network)
    with pytest.raises(ValueError, match=r"the state has no output.weight, of group hidden.0"):
        match_weights(groups, state, {name: state[name] for name in state if name != "output.weight"})
    with pytest.raises(ValueError, match=r"hidden.0.weight is not in both states with the same shape"):
        match_weights(groups, drawn(lambda: Dense([5, 3, 2]))[1], state)
    with pytest.raises(ValueError, match=r"output.weight is not finite: did the training diverge\?"):
        match_weights(groups, state, state | {"output.weight": torch.full((2, 3), torch.nan)})


def test_without_scipy_a_line_says_what_to_install(monkeypatch):
    network, state = drawn(lambda: Dense([4, 3, 2]))
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ModuleNotFoundError, match=r"^weight matching needs scipy: pip install scipy$"):
        align(network, state, state)
