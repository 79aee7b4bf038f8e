import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lottery_callbacks.functional.random_plane import random_plane


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def raw(state):
    return {name: t.contiguous().reshape(-1).view(torch.uint8).tolist() for name, t in state.items()}


def network(seed=0):
    """Filters of three kinds, biases, and norm layers of one and of two dimensions."""
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LayerNorm((5, 5)), nn.PReLU(),
        nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip
    with torch.no_grad():
        made[1].running_mean.normal_()
    return made


MOVING = ("0.weight", "4.weight", "6.weight")


def rows(tensor):
    return tensor.detach().double().reshape(len(tensor), -1)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_each_filter_of_a_direction_has_the_norm_of_the_network_s_and_nothing_else_moves(kind):
    made = network().to(kind)
    plane = random_plane(made, generator())
    for direction in plane.directions:
        assert tuple(direction) == MOVING
        for name, step in direction.items():
            weight = made.get_parameter(name).detach()
            wide = torch.complex128 if kind.is_complex else torch.float64
            norms = [t.to(wide).reshape(len(t), -1).norm(dim=1) for t in (step, weight)]
            assert step.dtype == torch.promote_types(kind, torch.float32)
            assert torch.allclose(*norms, rtol=1e-6)
    assert not torch.equal(*(direction["6.weight"] for direction in plane.directions))
    assert plane.at(0.5, 0.5)["6.weight"].dtype == kind


@given(seed=st.integers(0, 10**6), x=st.floats(-3, 3), y=st.floats(-3, 3))
def test_a_point_is_the_network_and_its_steps_along_the_directions(seed, x, y):
    made = network(seed % 7)
    state = made.state_dict()
    plane = random_plane(made, generator(seed))
    found, (one, other) = plane.at(x, y), plane.directions
    assert raw({n: t for n, t in found.items() if n not in MOVING}) == raw(
        {n: t for n, t in state.items() if n not in MOVING}
    )
    for name in MOVING:
        expected = state[name].double() + x * one[name].double() + y * other[name].double()
        assert torch.allclose(found[name].double(), expected, atol=1e-6)


def test_at_the_origin_is_the_network_to_the_bit_as_a_copy():
    made = network()
    with torch.no_grad():
        made[0].weight[0, 0, 0, 0] = -0.0
    before = raw(made.state_dict())
    plane = random_plane(made, generator())
    origin = plane.at(*plane.coordinates[0])
    assert raw(origin) == before
    for tensor in (*origin.values(), *made.state_dict().values()):
        tensor.zero_()
    assert raw(plane.at(0, 0)) == before


def test_draws_come_from_the_generator_alone(global_rng):
    made = network()
    before = global_rng()
    first, again, other = (random_plane(made, generator(seed)) for seed in (0, 0, 1))
    assert global_rng() == before
    assert [raw(d) for d in first.directions] == [raw(d) for d in again.directions]
    assert raw(first.directions[0]) != raw(other.directions[0])


def test_a_double_network_steps_along_the_same_direction():
    one, other = (random_plane(made, generator()).directions[1] for made in (network(), network().double()))
    assert all(torch.allclose(one[name].double(), other[name], rtol=1e-6) for name in MOVING)


def test_directions_are_gaussian_and_nearly_orthogonal():
    one, other = (d["weight"].double()[0] for d in random_plane(nn.Linear(40_000, 1), generator()).directions)
    unit = one / one.square().mean().sqrt()
    assert abs(float(unit.mean())) < 0.02  # 4 standard errors
    assert float(unit.abs().median()) == pytest.approx(0.6745, abs=0.02)
    assert abs(float(torch.cosine_similarity(one, other, dim=0))) < 0.02


def test_vectors_move_on_demand_each_entry_by_its_own_size():
    made = network()
    plane = random_plane(made, generator(), vectors=True)
    parameters = dict(made.named_parameters())
    assert list(plane.directions[0]) == list(parameters)
    for direction in plane.directions:
        bias, step = parameters["6.bias"].detach(), direction["6.bias"]
        assert torch.allclose(step.abs(), bias.abs(), rtol=1e-6)
    steps = torch.cat(
        [d[name] * parameters[name].detach().sign() for d in plane.directions for name in ("0.bias", "6.bias")]
    )
    assert steps.min() < 0 < steps.max()  # to either side
    scale = plane.directions[0]["2.weight"]  # of the layer norm, in rows
    assert torch.allclose(scale.norm(dim=1), torch.ones(5).mul(5**0.5), rtol=1e-6)


# ---- masks


@pytest.mark.parametrize("zeroed", [True, False])
@given(seed=st.integers(0, 10**6))
def test_pruned_weights_stay_and_have_no_part_in_norms(zeroed, seed):
    made, source = network(), generator(seed)
    masks = {
        name: torch.rand(made.get_parameter(name).shape, generator=source) < 0.4 for name in ("0.weight", "6.weight")
    }
    masks["6.weight"][1] = False  # a neuron that is dead
    if zeroed:
        with torch.no_grad():
            for name, mask in masks.items():
                made.get_parameter(name).mul_(mask)
    plane = random_plane(made, generator(seed), masks)
    point = plane.at(0.7, -1.3)
    for name, mask in masks.items():
        weight = made.get_parameter(name).detach()
        assert raw({"": point[name][~mask]}) == raw({"": weight[~mask]})
        assert not (point[name] == weight)[mask].any()
        for direction in plane.directions:
            assert not any(raw({"": direction[name][~mask]})[""])  # +0.0
            assert torch.allclose(rows(direction[name]).norm(dim=1), rows(weight * mask).norm(dim=1), rtol=1e-6)
    assert torch.isfinite(point["6.weight"]).all()


def test_a_mask_thins_out_the_direction_that_is_drawn_without_it():
    made, mask = network(), torch.rand(3, 54, generator=generator()) < 0.5
    dense, thin = (random_plane(made, generator(), masks).directions[0] for masks in ({}, {"6.weight": mask}))
    one, other = rows(dense["6.weight"] * mask), rows(thin["6.weight"])
    assert torch.allclose(torch.cosine_similarity(one, other), torch.ones(3, dtype=torch.float64))
    assert raw({"": dense["4.weight"]}) == raw({"": thin["4.weight"]})


@pytest.mark.parametrize(("name", "shape"), [("7.weight", (3, 54)), ("6.weight", (3, 53)), ("1.running_mean", (4,))])
def test_a_mask_that_fits_no_parameter_is_refused_by_name(name, shape):
    with pytest.raises(ValueError, match=rf"the mask {name} \(.*\) fits no parameter: name and shape it as its weight"):
        random_plane(network(), generator(), {name: torch.ones(shape, dtype=torch.bool)})


# ---- what is no ordinary network


def test_tied_weights_move_together():
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    made[1].weight = made[0].weight
    point = random_plane(made, generator()).at(1, 1)
    assert torch.equal(point["0.weight"], point["1.weight"])
    assert not torch.equal(point["0.weight"], made[0].weight)


@pytest.mark.parametrize("made", [nn.BatchNorm1d(3), nn.LayerNorm((2, 2)), nn.ReLU()])
def test_a_network_without_filters_is_refused(made):
    with pytest.raises(ValueError, match="no weight moves: the network has no filters but zeros, or vectors=True is"):
        random_plane(made, generator())


def test_a_network_of_zeros_is_refused():
    made = nn.Linear(3, 2)
    nn.init.zeros_(made.weight)
    with pytest.raises(ValueError, match="no weight moves"):
        random_plane(made, generator())
    assert random_plane(made, generator(), vectors=True).at(1, 0)["bias"].any()
