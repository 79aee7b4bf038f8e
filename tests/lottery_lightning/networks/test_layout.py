import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from lottery_lightning.networks import Conv, ResNet20
from lottery_lightning.networks.layout import channels_last


def test_values_stay_and_channels_come_last():
    images = torch.randn(2, 3, 4, 4)
    found = channels_last(images)
    assert found.equal(images)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("network", [Conv(2), ResNet20()], ids=["conv", "resnet"])
def test_every_convolution_of_the_network_reads_channels_last(network):
    seen = []
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    network(torch.randn(2, 3, 32, 32))
    assert len(seen) > 1
    assert all(seen)


def test_gradients_of_single_examples_work_under_vmap():
    network, images, labels = Conv(2), torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    weights = dict(network.named_parameters())

    def loss(weights, image, label):
        return F.cross_entropy(functional_call(network, weights, image[None]), label[None])

    each = vmap(grad(loss), (None, 0, 0))(weights, images, labels)
    for i in range(2):
        alone = grad(loss)(weights, images[i], labels[i])
        for name in weights:
            torch.testing.assert_close(each[name][i], alone[name], rtol=1e-4, atol=1e-6)
