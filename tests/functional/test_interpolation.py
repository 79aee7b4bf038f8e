import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lottery_callbacks.functional.evaluation import Metrics, evaluate_on
from lottery_callbacks.functional.interpolation import Line, along, even, interpolate

KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)


def raw(state):
    return {name: tensor.contiguous().reshape(-1).view(torch.uint8).tolist() for name, tensor in state.items()}


def drawn(seed, kind=torch.float32, size=50):
    """A weight of which half is pruned, with the same half in each draw, a frozen one and two counters."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, size, generator=generator).to(kind)
    weight[1] = 0
    return {
        "weight": weight,
        "frozen": torch.linspace(-3, 3, 7).to(kind),
        "count": torch.tensor(seed),
        "on": torch.tensor([seed % 2 == 0]),
    }


def network(seed=0, norm=True):
    torch.manual_seed(seed)
    norms = [nn.BatchNorm1d(8)] if norm else []
    made = nn.Sequential(nn.Linear(6, 8), *norms, nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
                part.num_batches_tracked += seed
    return made


def states(norm=True):
    return network(1, norm).state_dict(), network(2, norm).state_dict()


def data(seed=0, sizes=(16, 16, 5)):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


# ---- interpolate


@pytest.mark.parametrize("kind", KINDS)
@given(seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)), t=st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_mixture_is_the_formula_the_same_from_both_sides_and_inside_the_mask(kind, seeds, t):
    first, second = (drawn(seed, kind) for seed in seeds)
    found = interpolate(first, second, t)
    exact = (1 - t) * first["weight"].to(torch.complex128) + t * second["weight"].to(torch.complex128)
    unit = torch.finfo(kind).eps
    assert found["weight"].dtype == kind
    assert (found["weight"].to(torch.complex128) - exact).abs().max() <= 4 * unit * (exact.abs().max() + 1)
    assert raw(found)["frozen"] == raw(first)["frozen"]
    assert not any(raw({"pruned": found["weight"][1]})["pruned"])  # +0.0
    back = interpolate(second, first, 1 - t)
    assert [raw(found)[name] for name in ("weight", "frozen")] == [raw(back)[name] for name in ("weight", "frozen")]
    assert (found["count"], found["on"]) == (first["count"], first["on"])


def test_the_ends_are_the_networks_themselves_as_copies():
    first, second = drawn(1), drawn(2)
    for state in (first, second):
        state["weight"][0, :3] = torch.tensor([-0.0, math.inf, math.nan])
    for t, state in ((0, first), (0.0, first), (1, second), (1.0, second)):
        found = interpolate(first, second, t)
        assert raw(found) == raw(state)
        assert all(found[name].data_ptr() != state[name].data_ptr() for name in state)


def test_pruned_weights_whose_zeros_have_signs_are_plain_zeros_between():
    first, second = {"w": torch.tensor([0.0, -0.0, -0.0])}, {"w": torch.tensor([-0.0, -0.0, 0.0])}
    assert not any(raw(interpolate(first, second, 0.3))["w"])


@pytest.mark.parametrize("t", [0, 0.25, 1])
def test_of_two_precisions_the_wider_one_is_kept(t):
    first, second = drawn(1, torch.bfloat16), drawn(2, torch.float32)
    for a, b, at in ((first, second, t), (second, first, 1 - t)):
        found = interpolate(a, b, at)["weight"]
        assert found.dtype == torch.float32
        assert torch.allclose(found, (1 - t) * first["weight"].float() + t * second["weight"], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("weight"), r"weight is \(2, 50\) in the first network and absent in the second: give"),
        (lambda state: state.update(more=torch.ones(3)), r"more is absent in the first network and \(3,\) in the sec"),
        (lambda state: state.update(count=torch.ones(2)), r"count is \(\) in the first network and \(2,\) in the sec"),
    ],
)
def test_networks_of_two_architectures_are_refused_by_name(change, message):
    other = drawn(2)
    change(other)
    with pytest.raises(ValueError, match=message):
        interpolate(drawn(1), other, 0.5)


# ---- barrier and instability


def test_barrier_and_instability_are_those_of_the_papers():
    line = Line((0, 0.2, 0.5, 1), losses=(1.0, 2.0, 2.5, 3.0), errors=(0.1, 0.11, 0.12, 0.13), norms="none")
    assert line.barrier == pytest.approx(2.0 - 1.4)  # over the chord at t = 0.2, not at the highest loss
    assert line.instability == pytest.approx(0.13 - 0.115)  # of the worse end
    assert line.stable
    for error, stable in ((0.0199, True), (0.02, False)):  # below 2 %
        assert Line((0, 0.5, 1), (1, 1, 1), (0.0, error, 0.0), "none").stable == stable
    assert Line((0, 0.5, 1), (1, 0, 1), (0.0, 0.0, 0.0), "none").barrier == 0


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_gives_no_barrier_that_is_one(place, value):
    losses = [1.0, 1.0, 1.0]
    losses[place] = value
    line = Line((0, 0.5, 1), tuple(losses), (math.nan,) * 3, "none")
    assert not math.isfinite(line.barrier)
    assert math.isnan(line.instability)
    assert not line.stable


@given(st.integers(2, 60))
def test_points_are_even_and_mirror_each_other_to_the_bit(points):
    grid = even(points)
    assert len(grid) == points
    assert grid == pytest.approx([i / (points - 1) for i in range(points)])
    assert (grid[0], grid[-1]) == (0, 1)
    assert all(t == 1 - grid[i] for i, t in enumerate(reversed(grid)) if i < points // 2)


# ---- along


class Valley(nn.Module):
    """One weight w, whose loss is w^2 or -w^2."""

    def __init__(self, weight):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weight))


@pytest.mark.parametrize(("sign", "barrier"), [(1, 0.0), (-1, 4 * (1 - (1 / 29) ** 2))])
def test_a_line_over_a_hill_has_its_height_for_a_barrier_and_one_through_a_valley_none(sign, barrier):
    ends = [Valley(w).state_dict() for w in (-2.0, 2.0)]
    line = along(Valley(7.0), *ends, lambda one: Metrics(sign * one.w.item() ** 2))
    assert len(line.t) == 30
    assert line.losses == pytest.approx([sign * (4 * t - 2) ** 2 for t in line.t], abs=1e-6)
    assert line.barrier == pytest.approx(barrier, abs=1e-6)
    assert math.isnan(line.instability)
    assert line.norms == "none"


@pytest.mark.parametrize("norm", [True, False])
def test_a_network_and_itself_have_no_barrier_at_all(norm):
    state = network(3, norm).state_dict()
    line = along(network(4, norm), state, state, evaluate_on(data()), ts=30)
    assert len(set(line.losses)) == 1
    assert (line.barrier, line.instability) == (0.0, 0.0)
    assert line.norms == ("average" if norm else "none")


def test_the_ends_are_an_ordinary_evaluation_and_the_line_is_the_same_from_both_sides():
    ends, evaluate = states(), evaluate_on(data())
    line = along(network(3), *ends, evaluate, ts=8)
    back = along(network(4), *ends[::-1], evaluate, ts=8)
    assert line.losses == back.losses[::-1]
    assert line.errors == back.errors[::-1]
    assert line.barrier == pytest.approx(back.barrier, rel=1e-12)
    assert line.instability == back.instability
    for place, state in zip((0, -1), ends, strict=True):
        alone = network(5)
        alone.load_state_dict(state)
        assert evaluate(alone) == (line.losses[place], line.errors[place])
    alone.load_state_dict(interpolate(*ends, line.t[3]))
    assert evaluate(alone) == (line.losses[3], line.errors[3])
    assert len(set(line.losses)) == 8


def test_an_end_may_be_the_networks_own_state_dict():
    other, evaluate, used = network(2).state_dict(), evaluate_on(data()), network(1)
    apart = network(1).state_dict()
    assert along(used, used.state_dict(), other, evaluate, 5) == along(network(3), apart, other, evaluate, 5)
    assert along(used, other, used.state_dict(), evaluate, 5) == along(network(3), other, apart, evaluate, 5)


def test_points_may_be_given():
    ends, evaluate = states(), evaluate_on(data())
    line = along(network(3), *ends, evaluate, ts=(0, 0.5, 1))
    assert line.t == (0, 0.5, 1)
    assert line.losses == along(network(3), *ends, evaluate, ts=3).losses


@pytest.mark.parametrize("ts", [(), (0,), (0, 0.5), (0.1, 1), (0, 0.7, 0.3, 1), (0, 0.5, 0.5, 1), (0, 2, 1)])
def test_points_that_do_not_rise_from_0_to_1_are_refused(ts):
    with pytest.raises(ValueError, match="do not rise from 0 to 1: give 0, points between, and 1"):
        along(network(3), *states(), evaluate_on(data()), ts=ts)


@pytest.mark.parametrize("points", [0, 1])
def test_fewer_than_two_points_are_refused(points):
    with pytest.raises(ValueError, match="make no line: choose 2 or more"):
        along(network(3), *states(), evaluate_on(data()), ts=points)


class Watched(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("norms", ["average", "reestimate"])
def test_the_network_and_the_random_state_are_left_as_they_were(global_rng, norms, fails):
    ends, used = states(), network(3)
    used[3].eval()  # a mode of its own
    used[1].momentum = 0.3
    used(data()[0][0]).sum().backward()
    gradients = [(p.grad, p.grad.clone()) for p in used.parameters()]
    tensors, buffer = {name: t.clone() for name, t in used.state_dict().items()}, used[1].running_mean
    modes, random_state = [part.training for part in used.modules()], global_rng()

    def evaluate(one):
        one.train()
        assert all(p.grad is not old for p, (old, _) in zip(one.parameters(), gradients, strict=True))
        one(torch.randn(4, 6)).sum().backward()
        one[1].running_mean = torch.zeros(8)
        if fails:
            raise Watched
        return Metrics(0.0)

    def run():
        return along(used, *ends, evaluate, 4, norms, lambda one: one(torch.randn(9, 6)))

    if fails:
        with pytest.raises(Watched):
            run()
    else:
        run()
    assert raw(used.state_dict()) == raw(tensors)
    assert used[1].running_mean is buffer
    assert used[1].momentum == 0.3
    assert [part.training for part in used.modules()] == modes
    assert all(p.grad is old and old.equal(value) for p, (old, value) in zip(used.parameters(), gradients, strict=True))
    assert global_rng() == random_state


def test_what_an_evaluation_draws_is_the_same_at_every_point():
    state, draws = network(3).state_dict(), []
    along(network(3), state, state, lambda one: draws.append(float(torch.rand(()))) or Metrics(0.0), ts=5)
    assert len(draws) == 5
    assert len(set(draws)) == 1


def test_reestimated_statistics_are_means_over_the_batches_with_dropout_off():
    first, second = states()
    seen, modes, batches = [], [], [inputs for inputs, _ in data(1)]

    def reestimate(one):
        modes.append([part.training for part in one.modules()])
        for inputs in batches:
            assert not one(inputs).requires_grad

    def evaluate(one):
        seen.append({name: t.clone() for name, t in one.state_dict().items()})
        return evaluate_on(data())(one)

    line = along(network(3), first, second, evaluate, 3, "reestimate", reestimate)
    assert line.norms == "reestimate"
    assert modes == [[False, False, True, False, False, False]]  # once, inside
    assert raw(seen[0]) == raw(first)
    assert raw(seen[2]) == raw(second)
    middle = interpolate(first, second, 0.5)
    hidden = [inputs @ middle["0.weight"].T + middle["0.bias"] for inputs in batches]
    expected = torch.stack([h.mean(0) for h in hidden]).mean(0), torch.stack([h.var(0) for h in hidden]).mean(0)
    assert torch.allclose(seen[1]["1.running_mean"], expected[0], atol=1e-6)
    assert torch.allclose(seen[1]["1.running_var"], expected[1], rtol=1e-5)
    assert raw(seen[1])["0.weight"] == raw(middle)["0.weight"]
    average = along(network(3), first, second, evaluate_on(data()), 3)
    assert line.losses[::2] == average.losses[::2]
    assert line.losses[1] != average.losses[1]


def test_a_network_without_batch_norm_has_no_statistics_to_reestimate():
    line = along(network(3, False), *states(False), evaluate_on(data()), 3, "reestimate", lambda one: 1 / 0)
    assert line.norms == "none"
    assert line.losses == along(network(3, False), *states(False), evaluate_on(data()), 3).losses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("reestimate",), "norms='reestimate': choose 'average', or 'reestimate' with a function that runs the net"),
        (("recompute",), "norms='recompute': choose 'average', or"),
        (("reestimate", lambda one: None), "reestimate ran no batch through the batch norm layers: run the network"),
    ],
)
def test_statistics_that_nobody_can_compute_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        along(network(3), *states(), evaluate_on(data()), 3, *arguments)


def test_states_of_another_network_are_refused_by_name():
    with pytest.raises(ValueError, match=r"1\.weight is \(8,\) in the first network and absent in the second"):
        along(network(3), *states(norm=False), evaluate_on(data()))


def test_batches_that_can_be_read_once_are_refused_at_the_second_point():
    with pytest.raises(ValueError, match="no example to evaluate on: give a loader or a list, which can be read again"):
        along(network(3), *states(), evaluate_on(iter(data())))


class Told(nn.Linear):
    """Has an extra state, which is no tensor."""

    def get_extra_state(self):
        return {"told": 1}

    def set_extra_state(self, state):
        pass


def test_extra_state_is_not_read():
    first, second = Told(6, 3), Told(6, 3)
    assert "_extra_state" in first.state_dict()
    line = along(Told(6, 3), first.state_dict(), second.state_dict(), evaluate_on(data()), 3)
    assert (line.losses[0], line.losses[2]) == (evaluate_on(data())(first).loss, evaluate_on(data())(second).loss)


@pytest.mark.parametrize(("norms", "reestimate"), [("average", None), ("reestimate", lambda one: 1 / 0)])
def test_statistics_of_instance_norm_are_averaged_and_recorded_so(norms, reestimate):
    norm = nn.InstanceNorm1d(2, track_running_stats=True)
    ends = [{name: tensor + 0.5 + place for name, tensor in norm.state_dict().items()} for place in range(2)]
    seen = []
    line = along(norm, *ends, lambda one: seen.append(one.running_var.clone()) or Metrics(0.0), 3, norms, reestimate)
    assert line.norms == "average"
    assert torch.equal(seen[1], torch.full((2,), 2.0))


def test_a_network_that_cannot_be_put_back_is_refused_before_anything_is_put_in():
    scripted = torch.jit.script(network(3))
    with pytest.raises(ValueError, match="the network is scripted"):
        along(scripted, *states(), lambda one: 1 / 0)
