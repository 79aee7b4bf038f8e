"""What is removed at a budget and at a ratio, to the count; what it costs; and what is left of the network."""

from fractions import Fraction

import pytest
import torch
from drawn_networks import generator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lottery_callbacks import Pruning
from lottery_callbacks.functional.compressibility import Point, compressed, curve, errors, hidden_weights
from lottery_callbacks.functional.evaluation import evaluate_on
from lottery_callbacks.functional.in_place import load, preserved
from lottery_callbacks.functional.masks import keep_highest, kept, ones
from lottery_lightning.networks import Conv, Dense, ResNet, VGG11Wide

matrices = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(st.integers(-3, 3), min_size=width, max_size=width), min_size=1, max_size=8)
)


def one(weight, by, **at):
    return compressed({"w": weight}, by, **at).layers["w"]


@pytest.mark.parametrize("by", ["column", "magnitude"])
@given(rows=matrices, twentieths=st.integers(0, 19), scale=st.sampled_from([1.0, 2.0**-40, 2.0**40]))
def test_a_budget_removes_as_much_as_exact_fractions_allow_and_of_equals_the_first(by, rows, twentieths, scale):
    pieces = rows if by == "column" else [[value] for row in rows for value in row]
    energies = [sum(value * value for value in piece) for piece in pieces]
    order = sorted(range(len(energies)), key=energies.__getitem__)
    allowed = Fraction(twentieths, 20) * sum(energies)
    gone = [order[:k] for k in range(len(order) + 1) if sum(energies[i] for i in order[:k]) <= allowed][-1]
    weight = torch.tensor(rows, dtype=torch.float64) * scale
    layer = one(weight, by, budget=twentieths / 20)
    mask = torch.tensor([[i not in gone] * len(piece) for i, piece in enumerate(pieces)]).view(weight.shape)
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.weight, torch.where(mask, weight, 0))
    assert (layer.pieces, layer.removed, layer.parameters) == (len(pieces), len(gone), int(mask.sum()))
    lost = sum(energies[i] for i in gone)
    assert layer.error == pytest.approx(lost / sum(energies) if lost else 0, rel=1e-12)
    assert layer.pruning_ratio == pytest.approx(1 - int(mask.sum()) / mask.numel())


def test_a_million_equal_weights_lose_a_decimal_part_to_the_count():
    for value, budget, removed in ((0.1, 0.3, 300_000), (1 / 3, 0.7, 700_000), (1e-3, 0.123457, 123_457)):
        assert one(torch.full((1000, 1000), value), "magnitude", budget=budget).removed == removed


@pytest.mark.parametrize("by", ["column", "magnitude", "singular_value"])
def test_without_a_budget_exactly_zeros_go_and_a_layer_of_zeros_goes_whole(by):
    weight = torch.zeros(6, 4)
    weight[2], weight[4, 1] = 1.0, 1e-12  # rank 2
    layer = one(weight, by, budget=0)
    assert layer.removed == {"column": 4, "magnitude": 24 - 5, "singular_value": 2}[by]
    assert (layer.error, layer.energy) == (0, pytest.approx(4))
    assert torch.allclose(layer.weight, weight, rtol=0, atol=1e-15)
    rounded = torch.outer(torch.tensor([3.0, 7, 11]), torch.tensor([5.0, 13, 17, 19]))  # one singular value, exactly
    assert one(rounded, by, budget=0).removed == (2 if by == "singular_value" else 0)
    nothing = compressed({"w": torch.zeros(3, 2)}, by, budget=0)
    assert (nothing.pruning_ratio, nothing.error) == (1, 0)
    assert errors(torch.zeros(3, 2), by).unique().tolist() == [0]


@pytest.mark.parametrize(
    ("ratio", "pieces", "removed"),
    [(0, 7, 0), (1, 7, 7), (0.3, 10, 3), (0.7, 10, 7), (0.29, 100, 29), (0.99, 100, 99), (0.15, 10, 1), (0.999, 9, 8)],
)
def test_a_ratio_removes_the_whole_part_of_its_product(ratio, pieces, removed):
    weight = torch.rand(pieces, pieces, generator=generator())
    assert one(weight, "column", ratio=ratio).removed == removed
    assert one(weight, "singular_value", ratio=ratio).removed == removed
    assert one(weight.view(1, pieces, pieces)[:, :1], "magnitude", ratio=ratio).removed == removed


def test_single_weights_are_those_of_the_house_masks():
    weights = {"a": torch.randint(-2, 3, (9, 5), generator=generator()).float(), "b": torch.ones(4, 4)}
    found = compressed(weights, "magnitude", ratio=0.4)
    scores, budget = {name: weight.abs() for name, weight in weights.items()}, {("a",): 45 - 18, ("b",): 16 - 6}
    wanted = keep_highest(scores, ones(weights), budget)
    assert all(torch.equal(found.masks[name], wanted[name]) for name in weights)
    assert kept(found.masks) == {"a": 27, "b": 10}
    assert all(mask.is_contiguous() for mask in found.masks.values())


def test_a_column_is_a_row_of_torch_and_a_filter_of_a_convolution():
    weight = torch.ones(3, 2, 3, 3)
    weight[1] *= 0.1
    layer = one(weight, "column", budget=0.1)
    assert layer.mask.flatten(1).float().mean(1).tolist() == [1, 0, 1]
    assert (layer.pieces, layer.parameters) == (3, 36)


def test_singular_values_leave_the_best_matrix_of_the_rank():
    weight = torch.randn(4, 3, 2, generator=generator(), dtype=torch.float64)
    layer = one(weight, "singular_value", ratio=0.5)
    values = torch.linalg.svdvals(weight.view(4, 6))
    assert (torch.linalg.matrix_rank(layer.weight.view(4, 6)).item(), layer.pieces, layer.removed) == (2, 4, 2)
    assert layer.error == pytest.approx(float(values[2:].square().sum() / weight.square().sum()), rel=1e-12)
    assert layer.error == pytest.approx(float((layer.weight - weight).square().sum() / weight.square().sum()))
    assert layer.mask is None
    assert (layer.parameters, one(weight, "singular_value", ratio=0.25).parameters) == (20, 24)  # 3 (4 + 6) > 24
    assert layer.pruning_ratio == pytest.approx(4 / 24)


@pytest.mark.parametrize("by", ["column", "magnitude", "singular_value"])
def test_errors_are_those_of_each_count_and_rise_from_0_to_1(by):
    weight = torch.randn(5, 4, generator=generator())
    found = errors(weight, by)
    pieces = {"column": 5, "magnitude": 20, "singular_value": 4}[by]
    assert (len(found), found.dtype, float(found[0]), float(found[-1])) == (pieces + 1, torch.float64, 0, 1)
    for k in range(pieces + 1):
        layer = one(weight, by, ratio=k / pieces)
        measured = float((layer.weight - weight).square().sum() / weight.square().sum())
        assert layer.removed == k
        assert float(found[k]) == pytest.approx(measured, abs=1e-6)
        assert layer.error == float(found[k])
    assert bool((found.diff() >= 0).all())


def test_counts_and_errors_of_several_layers_are_taken_together():
    weights = {"a": torch.tensor([[1.0, 1], [2, 2]]), "b": torch.tensor([[3.0], [4], [0], [1]])}
    found = compressed(weights, "column", budget=0.25)
    assert {name: (layer.removed, layer.pruning_ratio) for name, layer in found.layers.items()} == {
        "a": (1, 0.5),
        "b": (2, 0.5),
    }
    assert found.pruning_ratio == pytest.approx(4 / 8)
    assert found.error == pytest.approx((2 + 1) / (10 + 26))
    assert curve(weights, "column", [0, 0.5, 1]) == [
        Point(0, 0, 0),
        Point(0.5, pytest.approx(0.5), pytest.approx(3 / 36)),
        Point(1, 1, 1),
    ]
    assert [point.ratio for point in curve(weights)] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]


def test_the_state_has_the_new_weights_under_all_names_and_the_rest_as_it_was():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    network[1].weight = network[0].weight
    state = network.state_dict()
    found = compressed({"0.weight": network[0].weight}, "magnitude", ratio=0.5)
    after = found.state(state)
    assert list(after) == list(state)
    assert after["0.weight"] is after["1.weight"] is found.layers["0.weight"].weight
    assert all(after[name] is state[name] for name in state.keys() - {"0.weight", "1.weight"})
    assert not after["0.weight"].requires_grad
    with pytest.raises(ValueError, match=r"the state has no 0\.weight: "):
        found.state({"0.bias": state["0.bias"]})


def test_accuracy_after_pruning_is_measured_on_the_network_that_is_back_afterwards():
    torch.manual_seed(0)
    network = Dense([6, 12, 3])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images, labels = torch.randn(200, 6, generator=generator()), torch.arange(200) % 3
    found = compressed(hidden_weights(dict(network.named_parameters())), "column", ratio=0.75)
    with preserved(network):
        load(network, found.state(network.state_dict()))
        error = evaluate_on([(images, labels)])(network).error
    other = Dense([6, 12, 3])
    other.load_state_dict(found.state(before))
    assert error == float((other(images).argmax(1) != labels).double().mean())
    assert error != evaluate_on([(images, labels)])(network).error
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_types_stay_and_half_precision_is_summed_in_float64(kind):
    weight = torch.full((300, 300), 300.0, dtype=kind)  # squares and sums beyond float16
    for by in ("column", "magnitude", "singular_value"):
        layer = one(weight, by, budget=0.1)
        assert layer.weight.dtype == kind
        assert layer.removed == {"column": 30, "magnitude": 9000, "singular_value": 299}[by]


def test_hidden_weights_leave_out_the_last_layer_and_what_is_no_matrix():
    def names(network, **options):
        return list(hidden_weights(dict(network.named_parameters()), **options))

    assert names(Dense([4, 3, 2])) == ["hidden.0.weight"]
    assert names(Dense([4, 3, 2]), first_convolution=False) == ["hidden.0.weight"]
    assert names(Conv(2), first_convolution=False) == ["features.2.weight", "hidden.0.weight", "hidden.2.weight"]
    assert names(ResNet((4,), 1)) == ["conv.weight", "blocks.0.conv1.weight", "blocks.0.conv2.weight"]
    assert hidden_weights({}) == {}
    network = Conv(2)
    prunable = Pruning(exclude=["output*"]).prunable(network)
    assert list(prunable) == names(network)


def test_the_papers_network_has_its_published_counts():
    with torch.device("meta"):
        weights = hidden_weights(dict(VGG11Wide().named_parameters()), first_convolution=False)
    assert sum(weight.numel() for weight in weights.values()) == 36_877_696 - 3_456 - 10_240


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"a": torch.ones(2, 2)}, {}, "give one of budget"),
        ({"a": torch.ones(2, 2)}, {"budget": 0.1, "ratio": 0.1}, "give one of budget"),
        ({"a": torch.ones(2, 2)}, {"budget": 1}, r"budget=1 is outside \[0, 1\)"),
        ({"a": torch.ones(2, 2)}, {"budget": -0.1}, r"budget=-0.1 is outside \[0, 1\)"),
        ({"a": torch.ones(2, 2)}, {"ratio": 1.1}, r"ratio=1.1 is outside \[0, 1\]"),
        ({"a": torch.ones(2, 2)}, {"ratio": -0.1}, r"ratio=-0.1 is outside \[0, 1\]"),
        ({"a": torch.ones(2, 2)}, {"by": "row", "ratio": 0}, "by='row' is not known: choose one of column, magnitude"),
        ({"a": torch.ones(2)}, {"ratio": 0}, r"a: a weight of shape \(2,\) is no layer's"),
        ({"a": torch.ones(0, 2)}, {"ratio": 0}, r"a: a weight of shape \(0, 2\) is no layer's"),
        ({"a": torch.ones(2, 2), "b": torch.tensor([[1.0, torch.nan]])}, {"ratio": 0}, "b: the weights are not finite"),
        ({}, {"ratio": 0}, "there is no weight to compress"),
    ],
)
def test_what_makes_no_compression_is_refused_in_one_line(weights, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        compressed(weights, **options)
    assert "\n" not in str(caught.value)
