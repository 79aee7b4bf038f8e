from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import bounds, strong_layer
from lottery_callbacks.functional.counter_random import uniform
from lottery_callbacks.functional.strong_edges import Counts
from lottery_callbacks.functional.strong_layer import Block
from lottery_callbacks.functional.subset_sum import subset_sum

layer_of = strong_layer.strong_layer
splits, parts = st.sampled_from(["sign", "assigned"]), st.sampled_from(["any", "nonnegative"])


def target(outputs, inputs, seed=0, scale=0.5):
    g = torch.Generator().manual_seed(seed)
    return [
        scale * (2 * torch.rand(*shape, generator=g, dtype=torch.float64) - 1)
        for shape in [(outputs, inputs), (outputs,)]
    ]


def materialised(ticket):
    """The two random matrices and the hidden biases whole, and their masks."""
    random, edges = ticket.random, ticket.edges
    outputs, inputs = random.shape
    rows = torch.arange(2 * random.n * (inputs + 1))
    first = uniform(random.seed, random.layer, 0, rows.unsqueeze(1), torch.arange(inputs))
    second = uniform(random.seed, random.layer, 1, torch.arange(outputs).unsqueeze(1), rows)
    biases = uniform(random.seed, random.layer, 2, rows, torch.zeros(1).long())
    masks = [torch.zeros_like(matrix, dtype=torch.bool) for matrix in (first, second, biases)]
    constant = edges.inputs < 0
    masks[0][edges.units[~constant], edges.inputs[~constant]] = True
    masks[1][edges.outputs, edges.units[edges.places]] = True
    masks[2][edges.units[constant]] = True
    return [matrix.double() * mask for matrix, mask in zip((first, second, biases), masks, strict=True)], masks


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**64 - 1), splits, parts, st.booleans())
def test_the_pruned_random_network_is_the_ticket(outputs, inputs, n, seed, split, known, biased):
    weight, bias = target(outputs, inputs, seed % 1000)
    ticket = layer_of(weight, bias if biased else None, seed=seed, layer=3, n=n, size=1, split=split, inputs=known)
    (first, second, biases), masks = materialised(ticket)
    assert tuple(int(mask.sum()) for mask in masks) == ticket.counts
    x = target(inputs, inputs, seed % 77)[0]
    x = x.abs() if known == "nonnegative" else x
    hidden = (x @ first.T + biases).relu()
    positive, negative, constant = ticket.effective()
    effective = x.relu() @ positive.T + (-x).relu() @ negative.T + constant
    torch.testing.assert_close(hidden @ second.T, effective, rtol=0, atol=1e-13)
    errors = torch.stack([(positive - weight).abs(), (negative + weight).abs()][: len(ticket.errors)])
    torch.testing.assert_close(ticket.errors, errors, rtol=0, atol=1e-15)
    torch.testing.assert_close(ticket.bias_errors, (constant - bias).abs() if biased else bias[:0], rtol=0, atol=1e-15)
    if known == "nonnegative":
        assert not negative.any()
    ticket.edges.verify(ticket.random, ticket.counts, 1)


@pytest.mark.parametrize("known", ["any", "nonnegative"])
def test_counts_are_those_of_the_papers(known):
    outputs, inputs, n, k = 30, 20, 21, 3
    weight, bias = target(outputs, inputs)
    signs = 2 if known == "any" else 1
    for b in (bias, None):
        ticket = layer_of(weight, b, seed=0, layer=0, n=n, size=k, inputs=known)
        assert ticket.infeasible == []
        columns = inputs + (b is not None)
        assert ticket.counts.second == k * signs * outputs * inputs + k * outputs * (b is not None)
        assert ticket.random.parameters == 2 * n * columns**2 + 2 * n * columns * outputs
        assert ticket.random.parameters == bounds.parameters([columns, outputs], [n])
        assert sum(ticket.counts) <= ticket.random.survivors_bound(k)
        assert ticket.random.survivors_bound(k) == bounds.survivors_bound([columns, outputs], [n], [k], shared=True)
        assert ticket.counts.first <= 2 * n * inputs
        ticket.edges.verify(ticket.random, ticket.counts, k)


@pytest.mark.parametrize(
    "question", [{"size": 2}, {}, {"min_size": 1}, {"tolerance": 0.02}, {"tolerance": 0.02, "min_size": 1}]
)
@pytest.mark.parametrize("split", ["sign", "assigned"])
def test_each_sum_is_the_solver_s(question, split, monkeypatch):
    monkeypatch.setattr(strong_layer, "NUMBERS", 100)  # several chunks
    weight, bias = target(4, 5)
    weight[1, 2] = 0.0
    ticket = layer_of(weight, bias, seed=9, layer=1, n=8, split=split, **question)
    s = torch.arange(16)
    half = torch.ones(16, dtype=torch.bool) if split == "sign" else s < 8
    for j in range(6):
        u = uniform(9, 1, 0, 16 * j + s, torch.tensor(j)) if j < 5 else uniform(9, 1, 2, 16 * j + s, torch.tensor(0))
        for i, sign in enumerate((1, -1) if j < 5 else (1,)):
            valid = (u * sign > 0) & (half if sign > 0 or split == "sign" else ~half)
            for o in range(4):
                v = uniform(9, 1, 1, torch.tensor(o), 16 * j + s)
                asked = sign * weight[o, j] if j < 5 else bias[o]
                best = subset_sum(asked.view(1), (v.double() * u.double().abs()), valid=valid, **question)
                error = ticket.errors[i, o, j] if j < 5 else ticket.bias_errors[o]
                torch.testing.assert_close(error, best.errors[0], rtol=0, atol=1e-15)
    ticket.edges.verify(ticket.random, ticket.counts, question.get("size"))


def test_at_most_40_units_enter():
    ticket = layer_of(*target(3, 2), seed=0, layer=0, n=60, size=2)
    usable = ticket.random.usable(units := ticket.random.units(torch.arange(2)), ticket.random.first(units), 1)
    assert usable.sum(1).min() > 40
    last = units[0][usable[0]][39]
    assert ticket.edges.units[(ticket.edges.inputs == 0) & (ticket.edges.first > 0)].max() <= last


def test_a_bias_of_each_group_of_outputs():
    weight, bias = target(6, 3)
    ticket = layer_of(weight, bias[:2], seed=0, layer=0, n=12, size=3)
    constant = ticket.effective()[2]
    assert (constant[[0, 3]] - bias[:2]).abs().max() < 0.03
    assert not constant[[1, 2, 4, 5]].any()
    ticket.edges.verify(ticket.random, ticket.counts, 3)


def test_what_cannot_be_done_is_listed():
    weight, bias = target(3, 4)
    weight[1, 2] = 30.0
    ticket = layer_of(weight, bias, seed=0, layer=0, n=3, size=2, tolerance=0.01)
    units = ticket.random.units(torch.arange(5))
    first = ticket.random.first(units)
    few = {
        Block(j, sign) for sign in (1, -1) for j in range(4) if ticket.random.usable(units, first, sign)[j].sum() < 2
    }
    assert set(ticket.infeasible) - {Block(-1, 1)} == few
    assert few
    assert {(far.block, far.output, far.target) for far in ticket.out_of_reach} >= {
        (Block(2, sign), 1, sign * 30.0) for sign in (1, -1) if Block(2, sign) not in few
    }
    for far in ticket.out_of_reach:
        errors = (
            ticket.bias_errors if far.block.input < 0 else ticket.errors[int(far.block.sign < 0), :, far.block.input]
        )
        assert far.error == errors[far.output]
    for block in few:
        part = int(block.sign < 0)
        assert torch.equal(ticket.errors[part, :, block.input], weight[:, block.input].abs())
    assert ticket.misses == (ticket.errors > 0.01).sum() + (ticket.bias_errors > 0.01).sum()
    ticket.edges.verify(ticket.random, ticket.counts, 2)


@given(st.integers(0, 1000), st.sampled_from([{"size": 2}, {}, {"min_size": 2}]))
def test_out_of_reach_is_beyond_every_sum(seed, question):
    weight, _ = target(2, 2, seed, scale=2.0)
    ticket = layer_of(weight, None, seed=seed, layer=0, n=2, **question)
    far = {(block, output) for block, output, _, _ in ticket.out_of_reach}
    for sign in (1, -1):
        for j in range(2):
            units = ticket.random.units(torch.tensor([j]))[0]
            first = ticket.random.first(units)
            usable = ticket.random.usable(units, first, sign)
            for o in range(2):
                products = ticket.random.second(torch.tensor(o), units).double() * first.double().abs()
                ends = [subset_sum(torch.tensor([e]), products, valid=usable, **question) for e in (-99.0, 99.0)]
                least, most = (float(end.sums) for end in ends)
                beyond = bool(ends[0].feasible) and not least <= sign * weight[o, j] <= most
                assert ((Block(j, sign), o) in far) == beyond


def test_any_other_edge_or_weight_is_found():
    ticket = layer_of(*target(3, 4), seed=0, layer=0, n=8, size=2)
    edges, random = ticket.edges, ticket.random

    def refused(edges, message, counts=ticket.counts, random=random):
        with pytest.raises(RuntimeError, match=message):
            edges.verify(random, counts, 2)

    def changed(name, place, value):
        tensor = getattr(edges, name).clone()
        tensor[place] = value
        return replace(edges, **{name: tensor})

    refused(edges, "were recorded", ticket.counts._replace(first=1))
    refused(changed("first", 0, torch.nextafter(edges.first[0], torch.tensor(2.0))), "first-layer weights")
    refused(changed("second", 5, -edges.second[5]), "second-layer weights")
    refused(changed("inputs", 0, 1), "another input")
    refused(changed("units", 1, 0), "ascending")
    refused(changed("places", 0, 10**6), "edges lead nowhere")
    refused(changed("outputs", 0, 1), "ascending")
    refused(edges, "first-layer weights", random=replace(random, seed=1))
    refused(edges, "unusable sign", random=replace(random, inputs="nonnegative"))

    def without(edge):
        others = torch.arange(len(edges.outputs)) != edge
        return replace(edges, **{name: getattr(edges, name)[others] for name in ("outputs", "places", "second")})

    times = edges.places.bincount()[edges.places]
    once, often = without(int((times == 1).nonzero()[0])), without(int((times > 1).nonzero()[0]))
    refused(once, "units lead nowhere", once.counts)
    refused(often, "not of 2 products", often.counts)
    often.verify(random, often.counts, None)
    with pytest.raises(RuntimeError, match="not of 3 products"):
        edges.verify(random, ticket.counts, 3)


@pytest.mark.parametrize("question", [{"size": 1}, {}, {"tolerance": 0.01, "min_size": 1}])
def test_progress_counts_targets(question):
    calls = []
    layer_of(*target(3, 4), seed=0, layer=0, n=4, progress=lambda *call: calls.append(call), **question)
    assert calls[-1] == (27, 27)
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {27}


def test_refusals():
    weight, bias = target(3, 4)
    for wrong in ({"n": 0}, {"size": 0}, {"split": "x"}, {"inputs": "x"}, {"size": 1, "min_size": 1}):
        with pytest.raises(ValueError, match=r"choose|fixed size"):
            layer_of(weight, bias, **{"seed": 0, "layer": 0, "n": 4} | wrong)
    with pytest.raises(ValueError, match="do not fit"):
        layer_of(weight, bias[:2], seed=0, layer=0, n=4)
    with pytest.raises(ValueError, match="finite"):
        layer_of(weight / 0, None, seed=0, layer=0, n=4)
    assert layer_of(weight, None, seed=0, layer=0, n=4, size=5, split="assigned").counts == Counts(0, 0, 0)
