import pytest
import torch
from torch import nn

from lottery_callbacks import Pruning
from lottery_callbacks.apply_ticket import reinitialise
from lottery_lightning.networks import ConvNet


def test_it_has_the_parameter_counts_of_the_docstring_and_of_the_papers_cifar_100_network():
    with torch.device("meta"):
        network, hundred = ConvNet(), ConvNet(classes=100)
    assert sum(p.numel() for p in network.parameters()) == 320_010
    only = Pruning(exclude=["*output.weight"])
    assert sum(p.numel() for p in only.prunable(network).values()) == 298_368
    assert sum(p.numel() for p in Pruning().prunable(network).values()) == 318_848
    assert sum(p.numel() for p in Pruning().prunable(hundred).values()) == 503_168


def test_convolutions_and_the_output_are_prunable_and_norm_layers_are_not():
    names = [f"features.{place}.weight" for place in (0, 4, 8)]
    assert list(Pruning().prunable(ConvNet(width=4))) == [*names, "output.weight"]
    assert list(Pruning(exclude=["*output.weight"]).prunable(ConvNet(width=4))) == names


@pytest.mark.parametrize(("depth", "size", "left"), [(3, 32, 4), (1, 9, 4), (4, 16, 1)])
def test_each_convolution_is_followed_by_a_halving(depth, size, left):
    network = ConvNet(depth, 6, size, classes=5)
    images = torch.randn(2, 3, size, size)
    assert network.features(images).shape == (2, 6 * left**2)
    assert network(images).shape == (2, 5)


def test_instance_norm_makes_the_contrast_of_an_image_indifferent_and_images_independent():
    torch.manual_seed(0)
    network, images = ConvNet(width=8).requires_grad_(False), torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(network(5 * images), network(images), rtol=0, atol=1e-3)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))
    assert float((network(images) - network(images.flip(0))).abs().max()) > 0.1


def test_grey_images_change_the_first_convolution_alone():
    with torch.device("meta"):
        grey, coloured = ConvNet(size=28, channels=1), ConvNet(size=28)
    shapes, other = ({name: p.shape for name, p in one.named_parameters()} for one in (grey, coloured))
    assert shapes.pop("features.0.weight") == (128, 1, 3, 3)
    assert other.pop("features.0.weight") == (128, 3, 3, 3)
    assert shapes == other
    assert ConvNet(width=4, size=28, channels=1)(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_pooling_averages():
    network = ConvNet(depth=1, width=4, size=4)
    values = torch.randn(2, 4, 4, 4)
    expected = values.view(2, 4, 2, 2, 2, 2).mean((3, 5))
    torch.testing.assert_close(network.features[3](values), expected)


def test_reinitialising_draws_a_new_network_from_the_seed_alone():
    one, two, other = (ConvNet(width=8) for _ in range(3))
    with torch.no_grad():
        for tensor in two.state_dict().values():
            tensor.fill_(3)
    for network, seed in ((one, 5), (two, 5), (other, 6)):
        reinitialise(network, seed)
    norms = {f"features.{place}.{kind}" for place in (1, 5, 9) for kind in ("weight", "bias")}
    for (name, tensor), same, different in zip(
        one.state_dict().items(), two.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, same), name
        assert torch.equal(tensor, different) == (name in norms), name


def test_resetting_gives_norm_layers_scale_1_and_shift_0():
    network = ConvNet(width=8)
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm):
            nn.init.constant_(layer.weight, 3)
            nn.init.constant_(layer.bias, 3)
    network.reset_parameters()
    assert (network.features[1].weight == 1).all()
    assert (network.features[1].bias == 0).all()


def test_initial_weights_have_torchs_variance():
    torch.manual_seed(0)
    network = ConvNet()
    for layer, fan_in in ((network.features[4], 9 * 128), (network.output, 2048)):
        weight = layer.weight.detach()
        assert float(weight.var()) == pytest.approx(1 / (3 * fan_in), rel=0.05)
        assert float(weight.abs().max()) <= fan_in**-0.5
        assert float(layer.bias.detach().abs().max()) > 0


def test_gradients_reach_every_parameter_but_the_biases_that_instance_norm_cancels():
    torch.manual_seed(0)
    network = ConvNet(width=8)
    network(torch.randn(8, 3, 32, 32)).square().sum().backward()
    cancelled = {f"features.{place}.bias" for place in (0, 4, 8)}
    for name, parameter in network.named_parameters():
        largest = float(parameter.grad.abs().max())
        assert largest < 1e-4 if name in cancelled else largest > 1e-3, name


@pytest.mark.parametrize(("depth", "size"), [(0, 32), (4, 15)])
def test_more_poolings_than_the_image_has_are_refused(depth, size):
    with pytest.raises(ValueError, match=rf"^depth={depth} poolings leave nothing of size={size}: give at least 1 and"):
        ConvNet(depth=depth, size=size)
