from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional.interpolation import interpolate
from lottery_callbacks.functional.plane import plane


def drawn(seed, scale=1.0):
    """Two tensors, of which one row is pruned in all draws, and a counter."""
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(3, 20, generator=generator)
    weight[1] = 0
    return {"weight": weight, "bias": torch.randn(5, generator=generator), "count": torch.tensor(seed)}


def raw(state):
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def flat(state):
    return torch.cat([state[name].double().reshape(-1) for name in ("weight", "bias")])


def difference(one, other):
    return float((flat(one) - flat(other)).norm())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e3]), count=st.sampled_from([3, 4]))
def test_each_network_lies_at_its_coordinates_to_the_bit(kind, seed, scale, count):
    states = [drawn(seed + i, scale) for i in range(count)]
    states = [state | {"weight": state["weight"].to(kind)} for state in states]
    surface = plane(*states)
    assert len(surface.coordinates) == count
    for (x, y), state in zip(surface.coordinates, states, strict=True):
        assert raw(surface.at(x, y)) == raw(state)


@given(seed=st.integers(0, 10**6), x=st.floats(-9, 9), y=st.floats(-9, 9))
def test_three_networks_span_a_plane_in_units_of_their_distances(seed, x, y):
    states = [drawn(seed + i) for i in range(3)]
    surface = plane(*states)
    for (a, at_a), (b, at_b) in combinations(zip(states, surface.coordinates, strict=True), 2):
        assert difference(a, b) == pytest.approx(((at_a[0] - at_b[0]) ** 2 + (at_a[1] - at_b[1]) ** 2) ** 0.5)
    u, v = (flat(direction) for direction in surface.directions)
    assert (float(u @ u), float(v @ v)) == pytest.approx((1, 1), abs=1e-5)
    assert float(u @ v) == pytest.approx(0, abs=1e-5)
    first, *_ = surface.coordinates
    assert first == (0, 0)
    assert surface.coordinates[1][1] == pytest.approx(0)  # Gram-Schmidt: the first direction is that to the second
    assert raw(surface.origin) == raw(states[0])
    expected = flat(surface.origin) + x * u + y * v
    assert torch.allclose(flat(surface.at(x, y)), expected, atol=1e-4)
    assert surface.height == 0
    assert not surface.at(x, y)["weight"][1].any()


@given(seed=st.integers(0, 10**6))
def test_four_networks_are_the_corners_of_a_surface_with_straight_edges(seed):
    states = [drawn(seed + i) for i in range(4)]
    surface = plane(*states)
    mean = sum(flat(state) for state in states) / 4
    assert torch.allclose(flat(surface.origin), mean, atol=1e-6)
    for i in range(4):
        (x0, y0), (x1, y1) = surface.coordinates[i], surface.coordinates[(i + 1) % 4]
        middle = interpolate(states[i], states[(i + 1) % 4], 0.25)
        assert torch.allclose(flat(surface.at(0.75 * x0 + 0.25 * x1, 0.75 * y0 + 0.25 * y1)), flat(middle), atol=1e-5)
    u, v = (flat(direction) for direction in surface.directions)
    assert (float(u @ u), float(v @ v), float(u @ v)) == pytest.approx((1, 1, 0), abs=1e-5)
    for (x, y), state in zip(surface.coordinates, states, strict=True):
        assert float((flat(state) - (mean + x * u + y * v)).norm()) == pytest.approx(surface.height, rel=1e-4)
    assert surface.height > 0
    assert not surface.at(0.3, -0.2)["weight"][1].any()


def test_a_parallelogram_is_flat():
    first, second, third = (drawn(seed) for seed in range(3))
    fourth = {name: first[name] + third[name] - second[name] for name in first}
    surface = plane(first, second, third, fourth)
    assert surface.height == pytest.approx(0, abs=1e-5)
    side = surface.coordinates[0], surface.coordinates[1]
    assert difference(first, second) == pytest.approx(
        ((side[0][0] - side[1][0]) ** 2 + (side[0][1] - side[1][1]) ** 2) ** 0.5, rel=1e-5
    )


def test_the_counters_are_those_of_the_nearest_network():
    states = [drawn(seed) for seed in range(3)]
    surface = plane(*states)
    x, y = surface.coordinates[2]
    assert surface.at(0.9 * x, 0.9 * y)["count"] == 2
    assert surface.at(0.1 * x, 0.1 * y)["count"] == 0


def test_low_precision_is_kept():
    states = [{name: tensor.bfloat16() for name, tensor in drawn(seed).items()} for seed in range(3)]
    assert plane(*states).at(1.0, 1.0)["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("count", [3, 4])
def test_networks_on_one_line_are_refused(count):
    first, second = drawn(0), drawn(1)
    others = [interpolate(first, second, t) for t in (0.3, 0.6)]
    with pytest.raises(ValueError, match="lie on one line, or two are the same: give three or four that span a plane"):
        plane(first, second, *others[: count - 2])
    with pytest.raises(ValueError, match="lie on one line"):
        plane(first, first, second)


def test_another_architecture_is_refused_by_name():
    other = drawn(2) | {"bias": torch.zeros(6)}
    with pytest.raises(ValueError, match=r"bias is \(5,\) in the first network and \(6,\) in the second"):
        plane(drawn(0), drawn(1), other)


def test_a_network_that_has_diverged_is_named_as_such():
    first, second, third = ({"w": torch.randn(3, generator=torch.Generator().manual_seed(seed))} for seed in range(3))
    second["w"][1] = float("nan")
    with pytest.raises(ValueError, match="a network's weights are not finite: did the training diverge"):
        plane(first, second, third)
