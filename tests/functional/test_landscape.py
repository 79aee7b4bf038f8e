import itertools
import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lottery_callbacks.functional.evaluation import Metrics, evaluate_on
from lottery_callbacks.functional.interpolation import along
from lottery_callbacks.functional.landscape import Surface, grid_around, surface
from lottery_callbacks.functional.plane import plane
from lottery_callbacks.functional.random_plane import random_plane


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def raw(state):
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def copied(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


class Weights(nn.Module):
    """Three weights, whose loss is the squared distance from a minimum."""

    minimum = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)

    def __init__(self, *weights):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([weights], dtype=torch.float64))


def squared_distance(one):
    return Metrics(float((one.w - one.minimum).square().sum().detach()), 0.25)


def network(seed=0, norm=True):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(6, 8), *[nn.BatchNorm1d(8)] * norm, nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        if norm:
            made[1].running_mean.normal_()
            made[1].running_var.uniform_(0.5, 2)
    return made


def through(count=3, norm=True):
    return plane(*(copied(network(seed, norm)) for seed in range(1, count + 1)))


def data(seed=0):
    source = generator(seed)
    return [(torch.randn(n, 6, generator=source), torch.randint(3, (n,), generator=source)) for n in (16, 5)]


GRID = ((-1.0, 0.0, 2.0), (0.0, 1.5))


# ---- the grid


@given(
    st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=4),
    st.integers(2, 9),
    st.floats(0.01, 2),
)
def test_the_grid_has_even_points_and_the_same_margin_on_each_side(coordinates, points, margin):
    extents = [max(values) - min(values) for values in zip(*coordinates, strict=True)]
    beyond = margin * (max(extents) or 2)
    for axis, values in zip(grid_around(coordinates, points, margin), zip(*coordinates, strict=True), strict=True):
        assert len(axis) == points
        assert axis[0] == pytest.approx(min(values) - beyond, abs=1e-9)
        assert axis[-1] == pytest.approx(max(values) + beyond, abs=1e-9)
        steps = [high - low for low, high in itertools.pairwise(axis)]
        assert steps == pytest.approx([(axis[-1] - axis[0]) / (points - 1)] * (points - 1), abs=1e-9)


def test_around_one_network_the_grid_is_that_of_the_paper():
    assert grid_around([(0.0, 0.0)], points=5) == ((-1.0, -0.5, 0.0, 0.5, 1.0),) * 2


@pytest.mark.parametrize("margin", [0, -0.1, math.nan])
def test_networks_at_the_rim_are_refused(margin):
    with pytest.raises(ValueError, match=f"margin={margin} leaves networks at the rim: choose a part of their extent"):
        grid_around([(0.0, 0.0)], margin=margin)


@pytest.mark.parametrize("grid", [((0, 1), (0,)), ((), (0, 1)), ((0, 1, 1), (0, 1)), ((1, 0), (0, 1))])
def test_a_grid_that_does_not_rise_is_refused(grid):
    with pytest.raises(ValueError, match="do not rise: give two points or more of each axis, rising"):
        surface(network(), through(), evaluate_on(data()), grid)


# ---- surfaces that are known


def states(*places):
    return [copied(Weights(*place)) for place in places]


def test_a_quadratic_has_its_closed_form_on_the_plane_through_three():
    first, second, third = (0.0, 0.0, 0.0), (3.0, 0.0, 0.0), (1.0, 2.0, 0.0)
    found = surface(Weights(7.0, 7.0, 7.0), plane(*states(first, second, third)), squared_distance, GRID)
    x0, y0, z0 = Weights.minimum[0].tolist()  # x and y are the first two weights
    assert (found.xs, found.ys) == GRID
    for y, losses in zip(found.ys, found.losses, strict=True):
        assert losses == pytest.approx([(x - x0) ** 2 + (y - y0) ** 2 + z0**2 for x in found.xs], abs=1e-6)
    assert found.errors == ((0.25,) * 3,) * 2
    assert found.points[1] == pytest.approx((3.0, 0.0, 4 + 4 + 0.25, 0.25), abs=1e-6)
    assert found.points[2] == pytest.approx((1.0, 2.0, 16 + 0.25, 0.25), abs=1e-6)
    assert (found.norms, found.unit) == ("none", "L2 distance")


def test_a_quadratic_has_its_closed_form_on_the_surface_through_four():
    sheet = plane(*states((0.0, 0.0, 1.0), (3.0, 0.0, -1.0), (1.0, 2.0, 0.0), (4.0, 4.0, 2.0)))
    found = surface(Weights(7.0, 7.0, 7.0), sheet, squared_distance, GRID)
    for y, losses in zip(found.ys, found.losses, strict=True):
        places = [sheet.at(x, y)["w"] for x in found.xs]
        assert losses == pytest.approx([float((place - Weights.minimum).square().sum()) for place in places])
    assert [point[:2] for point in found.points] == sheet.coordinates
    assert [point.loss for point in found.points] == pytest.approx([5.25, 10.25, 16.25, 47.25])


def test_a_quadratic_has_its_closed_form_around_one_network():
    one = Weights(1.0, -1.0, 2.0)
    sheet = random_plane(one, generator())
    found = surface(one, sheet, squared_distance, GRID)
    u, v = (direction["w"] for direction in sheet.directions)
    away = one.w.detach() - one.minimum
    for y, losses in zip(found.ys, found.losses, strict=True):
        expected = [
            float((away**2).sum() + 2 * (away * (x * u + y * v)).sum() + ((x * u + y * v) ** 2).sum()) for x in found.xs
        ]
        assert losses == pytest.approx(expected)
    assert found.points == ((0.0, 0.0, 3.25, 0.25),)
    assert found.unit == "filter norms"


def test_a_row_of_the_surface_is_the_line_between_two_networks():
    sheet, evaluate = through(), evaluate_on(data())
    length = sheet.coordinates[1][0]
    found = surface(network(), sheet, evaluate, ([t * length for t in (0, 0.25, 0.5, 1)], [0, 1]))
    line = along(network(), *sheet.states[:2], evaluate, (0, 0.25, 0.5, 1))
    assert found.losses[0] == pytest.approx(line.losses, rel=1e-5)
    assert found.errors[0] == pytest.approx(line.errors)
    assert [(point.loss, point.error) for point in found.points[:2]] == [
        (line.losses[0], line.errors[0]), (line.losses[-1], line.errors[-1])
    ]  # fmt: skip
    assert len({loss for row in found.losses for loss in row}) == 8


def rescaled_relu(made):
    """Layers scaled against each other, by a power of two, so that every product is as exact as before."""
    made[0].weight.mul_(8), made[0].bias.mul_(8), made[-1].weight.div_(8)


def rescaled_filters(made):
    scales = 2.0 ** torch.arange(-4, 4)
    made[0].weight.mul_(scales[:, None]), made[0].bias.mul_(scales)
    made[1].running_mean.mul_(scales), made[1].running_var.mul_(scales**2)


@pytest.mark.parametrize(("norm", "rescale"), [(False, rescaled_relu), (True, rescaled_filters)])
def test_a_network_and_its_rescaled_twin_have_the_same_filter_normalised_surface(norm, rescale):
    found = []
    for change in (lambda made: None, rescale):
        made = network(norm=norm)
        for part in made.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.eps = 0.0
        with torch.no_grad():
            change(made)
        sheet = random_plane(made, generator())
        found.append(surface(made, sheet, evaluate_on(data()), grid_around(sheet.coordinates, 4)))
    assert found[0] == found[1]
    assert len({loss for row in found[0].losses for loss in row}) == 16


def test_pruned_weights_are_zero_all_over_the_grid():
    masks = {
        name: torch.rand(shape, generator=generator()) < 0.3
        for name, shape in (("0.weight", (8, 6)), ("4.weight", (3, 8)))
    }
    tickets = [network(seed) for seed in range(3)]
    with torch.no_grad():
        for ticket in tickets:
            for name, mask in masks.items():
                ticket.get_parameter(name).mul_(mask)
    seen = []

    def evaluate(one):
        seen.extend(bool(one.get_parameter(name)[~mask].any()) for name, mask in masks.items())
        return evaluate_on(data())(one)

    for sheet in (plane(*map(copied, tickets)), random_plane(tickets[0], generator(), masks)):
        surface(network(), sheet, evaluate, GRID)
    assert len(seen) == 2 * (3 + 6 + 1 + 6)
    assert not any(seen)


# ---- what is left behind


class Watched(Exception):
    pass


@pytest.mark.parametrize("fails", ["", "evaluate", "tell"])
@pytest.mark.parametrize("norms", ["average", "reestimate"])
def test_the_network_and_the_random_state_are_left_as_they_were(global_rng, norms, fails):
    used = network()
    used[3].eval()  # a mode of its own
    used(data()[0][0]).sum().backward()
    gradients = [(p.grad, p.grad.clone()) for p in used.parameters()]
    before, modes, random_state = copied(used), [part.training for part in used.modules()], global_rng()

    def evaluate(one):
        one.train()(torch.randn(4, 6)).sum().backward()
        one[1].running_mean = torch.zeros(8)
        if fails == "evaluate":
            raise Watched
        return Metrics(0.0)

    def tell(*_):
        if fails == "tell":
            raise Watched

    def run():
        surface(used, through(), evaluate, GRID, norms, lambda one: one(torch.randn(9, 6)), tell=tell)

    if fails:
        with pytest.raises(Watched):
            run()
    else:
        run()
    assert raw(used.state_dict()) == raw(before)
    assert [part.training for part in used.modules()] == modes
    assert all(p.grad is old and old.equal(value) for p, (old, value) in zip(used.parameters(), gradients, strict=True))
    assert global_rng() == random_state


def test_the_plane_may_be_made_of_the_network_s_own_state_dict():
    used, others, evaluate = network(1), [copied(network(seed)) for seed in (2, 3)], evaluate_on(data())
    expected = surface(network(0), plane(copied(used), *others), evaluate, GRID)
    assert surface(used, plane(used.state_dict(), *others), evaluate, GRID) == expected
    assert surface(used, plane(*others, used.state_dict()), evaluate, GRID).points[2][2:] == expected.points[0][2:]


# ---- batch norm


def test_statistics_are_those_of_the_plane_or_computed_anew_on_the_grid_alone():
    sheet, batches = through(), [inputs for inputs, _ in data(1)]
    sheet.states[2]["0.weight"][0, 0] = -0.0  # which no sum gives
    seen = []

    def evaluate(one):
        seen.append(copied(one))
        return evaluate_on(data())(one)

    def reestimate(one):
        for inputs in batches:
            one(inputs)

    grid = ((0.0, 1.0), (0.0, 1.0))  # with the first network on it
    average = surface(network(), sheet, evaluate, grid)
    assert [raw(state) for state in seen[3:]] == [raw(sheet.at(x, y)) for y in grid[1] for x in grid[0]]
    seen.clear()
    anew = surface(network(), sheet, evaluate, grid, "reestimate", reestimate)
    assert [raw(state) for state in seen[:3]] == [raw(state) for state in sheet.states]
    for state in seen[3:]:
        hidden = [inputs @ state["0.weight"].T + state["0.bias"] for inputs in batches]
        assert torch.allclose(state["1.running_mean"], torch.stack([h.mean(0) for h in hidden]).mean(0), atol=1e-6)
        assert torch.allclose(state["1.running_var"], torch.stack([h.var(0) for h in hidden]).mean(0), rtol=1e-5)
    assert (average.norms, anew.norms) == ("average", "reestimate")
    assert average.points == anew.points
    assert average.losses[0][0] == average.points[0].loss != anew.losses[0][0]


def test_a_network_without_batch_norm_has_no_statistics_to_reestimate():
    sheet = through(norm=False)
    found = surface(network(0, False), sheet, evaluate_on(data()), GRID, "reestimate", lambda one: 1 / 0)
    assert found == surface(network(0, False), sheet, evaluate_on(data()), GRID)
    assert found.norms == "none"


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
        surface(network(), through(), evaluate_on(data()), GRID, *arguments)


def test_a_plane_of_another_architecture_is_refused_by_name():
    with pytest.raises(ValueError, match=r"1\.weight is \(8,\) in the first network and absent in the second"):
        surface(network(), through(norm=False), evaluate_on(data()), GRID)


# ---- stopping and going on


def noisy(one):
    """An evaluation that draws."""
    with torch.no_grad():
        return Metrics(float(one.train()(torch.randn(5, 6)).square().mean()), float(torch.rand(())))


def reestimated(one):
    one(torch.randn(9, 6))


@pytest.mark.parametrize("stop", range(1, 10))
def test_a_surface_that_goes_on_has_the_bits_of_an_unbroken_one(stop):
    sheet, written = through(), []
    options = {"norms": "reestimate", "reestimate": reestimated}
    whole = surface(network(), sheet, noisy, GRID, **options)

    def tell(point, left):
        written.append(json.dumps(point))
        assert left == 9 - len(written)
        if len(written) == stop:
            raise Watched

    with pytest.raises(Watched):
        surface(network(), sheet, noisy, GRID, **options, tell=tell)
    more, done = [], [json.loads(line) for line in written]
    again = surface(network(5), sheet, noisy, GRID, **options, done=done, tell=lambda *told: more.append(told))
    assert again == whole
    assert [left for _, left in more] == list(range(8 - stop, -1, -1))


def test_points_come_in_the_order_of_rows_after_the_networks_and_the_network_holds_them():
    used, sheet, places = network(), through(), []

    def tell(point, left):
        places.append(point[:2])
        assert raw(used.state_dict()) == raw(sheet.at(*point[:2]))

    found = surface(used, sheet, lambda one: Metrics(len(places)), GRID, tell=tell)
    assert places == [*sheet.coordinates, (-1, 0), (0, 0), (2, 0), (-1, 1.5), (0, 1.5), (2, 1.5)]
    assert found.losses == ((3, 4, 5), (6, 7, 8))
    assert [point.loss for point in found.points] == [0, 1, 2]
    assert all(math.isnan(error) for row in found.errors for error in row)


def test_what_an_evaluation_draws_is_the_same_at_every_point():
    found = surface(network(), through(), lambda one: Metrics(float(torch.rand(()))), GRID)
    assert len({loss for row in found.losses for loss in row} | {point.loss for point in found.points}) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda done: done[1:],
        lambda done: [*done, (9.0, 9.0, 0.0, 0.0)],
        lambda done: [(x, y + 1e-9, *rest) for x, y, *rest in done],
    ],
)
def test_finished_points_of_another_surface_are_refused(change):
    sheet, told = through(), []
    surface(network(), sheet, evaluate_on(data()), GRID, tell=lambda point, left: told.append(point))
    with pytest.raises(
        ValueError, match="the finished points are not those of this plane and grid: give them in their"
    ):
        surface(network(), sheet, evaluate_on(data()), GRID, done=change(told))


def test_a_surface_goes_into_json_and_comes_back():
    found = surface(network(), through(), evaluate_on(data()), GRID)
    text = json.dumps(asdict(found))
    assert json.dumps(asdict(Surface(**json.loads(text)))) == text


def test_the_default_grid_is_that_around_the_plane_s_networks():
    sheet = through()
    found = surface(network(), sheet, lambda one: Metrics(0.0))
    assert (found.xs, found.ys) == grid_around(sheet.coordinates)
    assert len(found.xs) == 25
