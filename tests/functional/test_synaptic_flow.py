import copy

import pytest
import torch
from torch import nn

from lottery_callbacks.functional.synaptic_flow import synaptic_flow
from lottery_lightning.networks import Conv, ConvNet


def flow_by_hand(weights, biases, inputs):
    """dR/d|w| of R = 1' f(|w|, 1) for a chain of linear layers."""
    weights = [w.detach().abs().double().requires_grad_() for w in weights]
    values = torch.ones(inputs, dtype=torch.float64)
    for weight, bias in zip(weights, biases, strict=True):
        values = weight @ values + bias.detach().abs().double()
    return torch.autograd.grad(values.sum(), weights)


def test_synaptic_flow_goes_through_absolute_parameters_and_neutral_batch_norm():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, eps=0), nn.ReLU(), nn.Linear(8, 5))
    net[1].running_mean.fill_(4.0)
    net[1].running_var.fill_(9.0)
    net[2].eval()
    before, flags = copy.deepcopy(net.state_dict()), [part.training for part in net.modules()]
    weights = {"0.weight": net[0].weight, "3.weight": net[3].weight}
    flow = synaptic_flow(net, weights, [torch.tensor([1, 2]), torch.randn(4, 6)])
    for found, expected in zip(
        flow.values(), flow_by_hand(weights.values(), (net[0].bias, net[3].bias), 6), strict=True
    ):
        assert torch.allclose(found, expected, rtol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [part.training for part in net.modules()] == flags


def test_synaptic_flow_of_a_convolution_counts_the_paths_through_each_weight():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten())
    nn.init.constant_(net[0].weight, -0.5)
    flow = synaptic_flow(net, {"0.weight": net[0].weight}, torch.randn(3, 1, 5, 5))
    assert flow["0.weight"].unique().tolist() == [9.0]  # each weight is used at the 3 x 3 places of the output


def test_the_flow_is_conserved_from_layer_to_layer_of_a_network_without_biases():
    net = Conv(2)
    weights = {name: p for name, p in net.named_parameters() if p.ndim > 1}
    flow = synaptic_flow(net, weights, torch.randn(2, 3, 32, 32))
    totals = [float((flow[name] * weight.detach().abs()).sum()) for name, weight in weights.items()]
    assert totals == pytest.approx([totals[0]] * len(totals), rel=1e-9)
    assert totals[0] > 0


@pytest.mark.parametrize(
    ("net", "batch", "message"),
    [
        (nn.Linear(2, 2), {"tokens": torch.tensor([[1, 2]])}, "needs an input of floats, and the batch has none"),
        (nn.Bilinear(2, 2, 1), torch.ones(1, 2), r"cannot run Bilinear\.forward on one float64 example \(.*input2"),
        (nn.Module(), torch.ones(1, 2), r"cannot run Module\.forward on one float64 example \("),
        (nn.Sequential(nn.Linear(2, 3), nn.Softmax(1)), torch.ones(1, 2), "needs a positive flow"),
        (nn.Sequential(nn.Linear(2, 3), nn.LogSoftmax(1)), torch.ones(1, 2), "needs a positive flow"),
        (ConvNet(width=8), torch.ones(1, 3, 32, 32), "needs a positive flow"),
    ],
)
def test_what_has_no_flow_is_refused_in_one_line(net, batch, message):
    weights = {name: p for name, p in net.named_parameters() if p.ndim > 1}
    with pytest.raises(ValueError, match=f"^synflow {message}.*choose another score$") as error:
        synaptic_flow(net, weights, batch)
    assert "\n" not in str(error.value)
    assert all(part.training for part in net.modules())
