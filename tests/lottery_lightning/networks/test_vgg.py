import math

import pytest
import torch
from torch import nn

from lottery_callbacks import Pruning
from lottery_callbacks.apply_ticket import reinitialise
from lottery_lightning.networks import VGG, VGG16, VGG19, VGG11Wide
from lottery_lightning.networks.initialisation import initialise

PLANS = {
    VGG16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512",
    VGG19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512",
    VGG11Wide: "128 M 256 M 512 512 M 1024 1024 M 1024 1024 M",
}


def meta(make):
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize(
    ("make", "parameters", "convolutions"),
    [
        (VGG16, 14_724_042, 14_710_464),
        (VGG19, 20_035_018, 20_018_880),
        (VGG11Wide, 36_877_696, 36_867_456),
    ],
)
def test_parameter_counts_are_those_of_the_docstrings(make, parameters, convolutions):
    network = meta(make)
    assert sum(p.numel() for p in network.parameters()) == parameters
    only = Pruning(exclude=["*output.weight"]).prunable(network)
    assert sum(p.numel() for p in only.values()) == convolutions


@pytest.mark.parametrize("make", PLANS)
def test_convolutions_and_poolings_come_in_the_papers_order(make):
    layers = [layer for layer in meta(make).features if isinstance(layer, nn.Conv2d | nn.MaxPool2d)]
    steps = ["M" if isinstance(layer, nn.MaxPool2d) else str(layer.out_channels) for layer in layers]
    assert " ".join(steps) == PLANS[make]


@pytest.mark.parametrize(("make", "left"), [(VGG16, (512, 2, 2)), (VGG19, (512, 2, 2)), (VGG11Wide, (1024, 1, 1))])
def test_images_of_32_by_32_give_logits(make, left):
    network, images = meta(lambda: make(classes=7)), torch.empty(3, 3, 32, 32, device="meta")
    assert network.features(images).shape == (3, *left)
    assert network(images).shape == (3, 7)


def test_features_are_averaged_over_the_image():
    torch.manual_seed(0)
    network, images = VGG([4, "M", 5]), torch.randn(2, 3, 8, 8)
    expected = network.output(network.features(images).flatten(2).mean(2))
    torch.testing.assert_close(network(images), expected)


def test_every_convolution_is_normalised_and_rectified_unless_batch_norm_is_off():
    kinds = [type(layer) for layer in VGG([4, "M", 5]).features]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    plain = VGG([4, "M", 5], batch_norm=False, bias=False)
    assert [type(layer) for layer in plain.features] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Conv2d, nn.ReLU]
    assert [name for name, _ in plain.named_parameters()] == ["features.0.weight", "features.3.weight", "output.weight"]


def test_all_convolutions_and_the_output_are_prunable_and_the_output_can_be_left_out():
    network = meta(VGG19)
    names = list(Pruning().prunable(network))
    assert len(names) == 17
    assert names[-1] == "output.weight"
    assert all(isinstance(network.get_submodule(name.removesuffix(".weight")), nn.Conv2d) for name in names[:-1])
    assert list(Pruning(exclude=["*output.weight"]).prunable(network)) == names[:-1]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_reinitialising_draws_a_new_network_from_the_seed_alone(batch_norm):
    one, two, other = (VGG([8, "M", 16], batch_norm) for _ in range(3))
    with torch.no_grad():
        for tensor in two.state_dict().values():
            tensor.fill_(3)
    for network, seed in ((one, 5), (two, 5), (other, 6)):
        reinitialise(network, seed)
    for (name, tensor), same, different in zip(
        one.state_dict().items(), two.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, same), name
        assert torch.equal(tensor, different) == (tensor.ndim < 2), name


def test_resetting_gives_norm_layers_their_beginning():
    network = VGG([4, "M", 5])
    network(torch.randn(8, 3, 8, 8))
    nn.init.constant_(network.features[1].weight, 3)
    network.reset_parameters()
    norm = network.features[1].state_dict()
    assert {name: tensor.unique().tolist() for name, tensor in norm.items()} == {
        "weight": [1], "bias": [0], "running_mean": [0], "running_var": [1], "num_batches_tracked": [0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "variance"),
    [
        (VGG16, lambda fan_in, fan_out: 2 / fan_in),
        (VGG19, lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
        (VGG11Wide, lambda fan_in, fan_out: 2 / fan_out),
    ],
)
def test_initial_variances_are_those_of_the_networks_paper(make, variance):
    torch.manual_seed(0)
    init = meta(make).init
    for before, after in ((3, 64), (64, 128)):  # the real widths of 512 and more take seconds to draw
        layer = VGG([before, after, after], init=init).features[3]
        expected = variance(9 * before, 9 * after)
        assert float(layer.weight.detach().var()) == pytest.approx(expected, rel=0.1)
        assert abs(float(layer.weight.detach().mean())) < 5 * math.sqrt(expected / layer.weight.numel())


def test_fan_out_leaves_linear_layers_as_torch_gives_them():
    layers = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Linear(20, 10))
    torch.manual_seed(0)
    initialise(layers, "kaiming_normal_fan_out")
    assert (layers[0].bias == 0).all()
    assert float(layers[0].weight.detach().var()) == pytest.approx(2 / (9 * 64), rel=0.05)
    drawn = [tensor.clone() for tensor in layers[1].parameters()]
    torch.manual_seed(0)
    layers[0].reset_parameters()
    nn.init.normal_(layers[0].weight)
    layers[1].reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(drawn, layers[1].parameters(), strict=True))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_gradients_reach_every_parameter(batch_norm):
    torch.manual_seed(0)
    network = VGG([8, "M", 16, 16], batch_norm)
    network(torch.randn(8, 3, 8, 8)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 1e-3, name


def test_an_empty_plan_is_refused():
    with pytest.raises(ValueError, match=r"^plan=\[\] makes no layer: give channels and poolings, as in \[64, 64, 'M'"):
        VGG([])
