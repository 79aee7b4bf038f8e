import pytest
import torch
from torch import nn

from lottery_lightning.distillation import features
from lottery_lightning.networks import ConvNet, LeNet5


def test_they_are_what_the_last_linear_layer_reads_and_carry_gradients():
    network, images = ConvNet(depth=1, width=4, size=8, channels=1), torch.randn(3, 1, 8, 8, requires_grad=True)
    found = features(network, images)
    assert torch.equal(found, network.features(images))
    found.sum().backward()
    assert bool(images.grad.any())
    assert not network.output._forward_pre_hooks


def test_of_several_linear_layers_it_is_the_last():
    network, images = LeNet5(), torch.randn(2, 1, 28, 28)
    layers = [part for part in network.modules() if isinstance(part, nn.Linear)]
    found = features(network, images)
    assert len(layers) > 1
    assert found.shape == (2, layers[-1].in_features)
    torch.testing.assert_close(layers[-1](found), network(images))


def test_more_than_two_dimensions_are_flattened():
    network = nn.Sequential(nn.Linear(4, 2))
    assert features(network, torch.ones(5, 3, 4)).shape == (5, 12)


def test_a_network_without_them_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^Conv2d has no Linear layer: features are the input of the last one$"):
        features(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2))

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(1, 1)

        def forward(self, images):
            return images

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, images):
            return self.linear(images.view(-1, 2))

    with pytest.raises(ValueError, match=r"^Tokens gives its last Linear layer 6 rows of 2 images: .* one an image$"):
        features(Tokens(), torch.ones(2, 1, 2, 3))
    with pytest.raises(ValueError, match=r"^Idle does not call its last Linear layer: there are no features$"):
        features(Idle(), torch.ones(1, 1))
