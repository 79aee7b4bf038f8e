import pytest
import torch
from torch import nn

from lottery_callbacks import load_strong_ticket, save_strong_ticket, strong_network
from lottery_lightning.networks import GroupCNN
from lottery_lightning.networks.equivariant import GroupConv2d, GroupMaxPool2d, LiftingConv2d
from lottery_lightning.networks.groups import order, transform, transform_features
from lottery_lightning.networks.strong_equivariant import StrongGroupConv2d, StrongLiftingConv2d

GROUPS = ("C4", "D4")


def trained(group):
    """A small network whose batch norms have seen data."""
    network = GroupCNN(group, [3, 4, 4], [3, 3, 3], [1], classes=5)
    for _ in range(3):
        network.train()(torch.randn(16, 1, 14, 14))
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm3d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
    return network.eval()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("known", ["any", "nonnegative"])
def test_the_ticket_is_near_its_target_and_as_equivariant(group, known):
    network = trained(group)
    ticket = strong_network(network, seed=3, n=30, size=3, inputs=known)
    ticket.verify()
    images = torch.rand(20, 1, 14, 14)
    with torch.no_grad():
        wanted, found = network(images), ticket(images)
        assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()
        exact = ticket.double()(images.double())
        for g in range(order(group)):
            turned = ticket(transform(images.double(), g))
            assert (turned - exact).abs().max() <= 1e-12 * exact.abs().max()
        for g in range(order(group)):
            turned = ticket.float()(transform(images, g))
            assert (turned - found).abs().max() <= 1e-5 * found.abs().max()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("lifting", [True, False])
def test_a_layer_s_maps_turn_with_its_input_whatever_is_kept(group, lifting):
    kind, shape = (LiftingConv2d, (2, 7, 7)) if lifting else (GroupConv2d, (2, order(group), 7, 7))
    act = transform if lifting else transform_features
    layer = kind(2, 3, 3, group, stride=2, padding=1).double()
    ticket = strong_network(nn.Sequential(layer), seed=0, n=8, tolerance=0.1).double()  # few edges, of varying number
    assert isinstance(ticket.strong[0], StrongLiftingConv2d if lifting else StrongGroupConv2d)
    values = torch.randn(2, *shape, dtype=torch.float64)
    maps = ticket(values)
    assert maps.shape == (2, 3, order(group), 4, 4)
    for g in range(order(group)):
        torch.testing.assert_close(ticket(act(values, g)), transform_features(maps, g), rtol=0, atol=1e-12)
    steps = ticket._steps()[0]
    torch.testing.assert_close(steps.target(values) * ticket.scales[0], layer(values), rtol=0, atol=1e-12)
    torch.testing.assert_close(steps.approximation(values) * ticket.scales[0], maps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", GROUPS)
def test_counts_are_those_of_the_coefficients(group):
    ticket = strong_network(trained(group), seed=0, n=21, size=2, inputs="any")
    g = order(group)
    outputs, inputs = [3 * 9, 4 * 9 * g, 4 * 9 * g, 5], [1, 3, 4, 4]
    coefficients = sum(o * i for o, i in zip(outputs, inputs, strict=True))
    assert ticket.weights == coefficients + 3 + 4 + 4 + 5
    assert ticket.random_parameters == sum(
        42 * (i + 1) * (i + 1) + 42 * (i + 1) * o for o, i in zip(outputs, inputs, strict=True)
    )
    assert ticket.counts.second == 2 * (2 * coefficients + 16)
    assert not any(layer.infeasible for layer in ticket.tickets)


@pytest.mark.parametrize("group", GROUPS)
def test_found_is_at_most_certified(group):
    ticket = strong_network(trained(group), seed=0, n=21, size=3)
    found, certified = ticket.searched_error(20, 3, (1, 14, 14)), ticket.certificate((1, 14, 14))
    assert 0 < found.value <= certified.value
    assert ticket.certificate((1, 14, 14), radius=2.0).value > certified.value


def test_the_bound_of_a_group_convolution_holds_on_all_its_maps():
    layer = GroupConv2d(2, 2, 3, "D4", padding=1, bias=False).double()
    norm = strong_network(nn.Sequential(layer), seed=0, n=8, size=1).certificate((2, 8, 5, 5)).norms[0]
    with torch.no_grad():
        maps = layer(torch.eye(2 * 8 * 25, dtype=torch.float64).view(-1, 2, 8, 5, 5)).flatten(1)
        scale = 2 * float(layer.weight.abs().max())
    assert torch.linalg.matrix_norm(maps, 2) / scale <= norm * (1 + 1e-12)


def test_a_file_gives_the_same_ticket(tmp_path):
    network, images = trained("C4"), torch.randn(3, 1, 14, 14)
    ticket = strong_network(network, seed=0, n=12, size=2)
    found = load_strong_ticket(save_strong_ticket(ticket, tmp_path / "ticket.safetensors"), network)
    assert found(images).equal(ticket(images))
    torch.testing.assert_close(found.errors, ticket.errors, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"features.4 as a matrix \[144, 3\] with 4 biases.* \[288, 3\] with 4"):
        load_strong_ticket(tmp_path / "ticket.safetensors", trained("D4"))


def test_a_file_of_another_group_with_as_many_coefficients_is_refused(tmp_path):
    path, lifting = tmp_path / "ticket.safetensors", LiftingConv2d(1, 2, 3, "C4")
    save_strong_ticket(strong_network(nn.Sequential(lifting), seed=0, n=8, size=1), path)
    for other in (LiftingConv2d(1, 2, 3, "D4"), nn.Conv2d(1, 2, 3)):
        with pytest.raises(ValueError, match="has 0 as a StrongLiftingConv2d of 4 group elements: the network's is a"):
            load_strong_ticket(path, nn.Sequential(other))


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_parent():
    class Doubled(LiftingConv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match="cannot be traced"):
        strong_network(nn.Sequential(Doubled(1, 2, 3, "C4")), seed=0, n=8, size=1)


def test_grids_that_the_group_does_not_map_onto_themselves_are_refused():
    ticket = strong_network(nn.Sequential(LiftingConv2d(1, 2, 3, "C4", stride=2)), seed=0, n=8, size=1)
    with pytest.raises(ValueError, match="grid of 6 x 6"):
        ticket(torch.rand(1, 1, 6, 6))


def test_pooling_moves_no_two_maps_further_apart():
    values, others = torch.randn(2, 50, 3, 4, 6, 6, dtype=torch.float64)
    pool = GroupMaxPool2d(3)
    apart = (pool(values) - pool(others)).flatten(1).norm(dim=1)
    assert (apart <= pool.lipschitz * (values - others).flatten(1).norm(dim=1)).all()
    layer, shape = LiftingConv2d(1, 2, 3, "C4"), (1, 8, 8)
    without, with_pool = (
        strong_network(nn.Sequential(*chain), seed=0, n=8, size=1) for chain in ([layer], [layer, pool])
    )
    assert with_pool.certificate(shape).value == without.certificate(shape).value
