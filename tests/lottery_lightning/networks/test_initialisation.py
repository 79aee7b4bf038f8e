import math

import pytest
import torch
from torch import nn

from lottery_lightning.networks import Dense, LeNet5
from lottery_lightning.networks.initialisation import initialise

SCHEMES = {  # standard deviation from fan_in and fan_out, and kurtosis: 3 for a normal, 1.8 for a uniform law
    "glorot_normal": (lambda i, o: math.sqrt(2 / (i + o)), 3.0),
    "kaiming_normal": (lambda i, o: math.sqrt(2 / i), 3.0),
    "kaiming_uniform": (lambda i, o: math.sqrt(6 / i) / math.sqrt(3), 1.8),
    "default": (lambda i, o: 1 / math.sqrt(3 * i), 1.8),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", [nn.Linear(784, 300), nn.Conv2d(32, 64, 3)], ids=["linear", "convolution"])
def test_weights_have_the_law_of_the_scheme(scheme, layer):
    torch.manual_seed(0)
    initialise(nn.Sequential(layer), scheme)
    weight = layer.weight.detach().double()
    field = weight[0, 0].numel()
    std, kurtosis = SCHEMES[scheme]
    expected = std(weight.shape[1] * field, weight.shape[0] * field)
    assert float(weight.std()) == pytest.approx(expected, rel=0.03)
    assert abs(float(weight.mean())) < 5 * expected / math.sqrt(weight.numel())
    assert float((weight / expected).pow(4).mean()) == pytest.approx(kurtosis, rel=0.06)
    if kurtosis < 3:
        assert float(weight.abs().max()) <= expected * math.sqrt(3) * (1 + 1e-6)
    assert bool((layer.bias == 0).all()) == (scheme != "default")


@pytest.mark.parametrize("network", [Dense([784, 300, 100, 10]), LeNet5()], ids=["dense", "lenet5"])
def test_networks_are_glorot_normal_by_default(network):
    torch.manual_seed(0)
    network.reset_parameters()
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and layer.weight.numel() > 20_000:
            expected = math.sqrt(2 / (layer.in_features + layer.out_features))
            assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.03)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            assert (layer.bias == 0).all()


def test_layers_without_bias_and_other_layers_are_left_in_peace():
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    with torch.no_grad():
        network[1].weight.fill_(5.0)
    before = network[0].weight.clone()
    initialise(network, "glorot_normal")
    assert (network[1].weight == 5).all()
    assert not torch.equal(network[0].weight, before)


@pytest.mark.parametrize("make", [lambda init: Dense([4, 3], init=init), lambda init: LeNet5(init=init)])
def test_an_unknown_scheme_is_refused_with_the_choices(make):
    known = "glorot_normal, kaiming_normal, kaiming_normal_fan_out, kaiming_uniform or default"
    message = rf"^init='glorot' is not known: {known}$"
    with pytest.raises(ValueError, match=message):
        make("glorot")
