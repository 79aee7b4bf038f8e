import math

import pytest
import torch
from torch import nn

from lottery_callbacks import Pruning
from lottery_callbacks.apply_ticket import reinitialise
from lottery_callbacks.functional.masks import survivors
from lottery_lightning.networks import ResNet, ResNet10, ResNet18, ResNet20
from lottery_lightning.networks.resnet import Block


def small(**arguments):
    return ResNet((4, 8), 2, **arguments)


def convolutional(network):
    return sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize(
    ("make", "parameters", "convolutions"),
    [
        (ResNet20, 272_474, 270_256),
        (lambda: ResNet20(shortcut="padding"), 269_722, 267_696),
        (ResNet18, 11_173_962, 11_159_232),
        (lambda: ResNet18(width=32), 2_797_610, 2_790_240),
        (ResNet10, 4_903_242, 4_892_352),
        (lambda: ResNet10(width=32), 1_228_970, 1_223_520),
    ],
    ids=["20", "20-padding", "18", "18-narrow", "10", "10-narrow"],
)
def test_parameter_counts_are_those_of_the_docstrings(make, parameters, convolutions):
    with torch.device("meta"):
        network = make()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert convolutional(network) == convolutions
    assert list(dict(network.named_parameters()))[-2:] == ["output.weight", "output.bias"]


def test_with_its_running_statistics_resnet20_has_the_lottery_ticket_papers_274k():
    with torch.device("meta"):
        network = ResNet20()
    statistics = sum(buffer.numel() for name, buffer in network.named_buffers() if "running" in name)
    assert sum(p.numel() for p in network.parameters()) + statistics == 274_042


@pytest.mark.parametrize("shortcut", ["projection", "padding"])
def test_every_stage_but_the_first_halves_the_image_and_doubles_the_channels(shortcut):
    network = ResNet20(shortcut)
    values, shapes = network.norm(network.conv(torch.randn(2, 3, 32, 32))).relu(), []
    for block in network.blocks:
        values = block(values)
        shapes.append(tuple(values.shape[1:]))
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_images_of_any_size_give_logits():
    assert ResNet18(width=4, classes=7)(torch.randn(3, 3, 32, 32)).shape == (3, 7)
    assert ResNet10(width=4)(torch.randn(2, 3, 27, 40)).shape == (2, 10)


@pytest.mark.parametrize(
    ("shape", "shortcut", "expected"),
    [
        ((4, 4, 1), "projection", lambda block, x: x),
        ((4, 6, 2), "padding", lambda block, x: torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 2, 3, 3)], 1)),
        ((4, 6, 1), "padding", lambda block, x: torch.cat([x, torch.zeros(2, 2, 5, 5)], 1)),
        ((4, 6, 2), "projection", lambda block, x: block.shortcut[0](x) / math.sqrt(1 + 1e-5)),
    ],
    ids=["identity", "padding", "padding-without-stride", "projection"],
)
def test_a_block_whose_residual_is_zero_is_its_shortcut_rectified(shape, shortcut, expected):
    torch.manual_seed(0)
    block = Block(*shape, shortcut).eval()
    nn.init.zeros_(block.norm2.weight)
    values = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(values), expected(block, values).relu())


def test_a_block_adds_its_residual_before_the_last_relu():
    torch.manual_seed(0)
    block, values = Block(3, 3, 1, "projection"), torch.randn(2, 3, 5, 5)
    residual = block.norm2(block.conv2(block.norm1(block.conv1(values)).relu()))
    torch.testing.assert_close(block(values), (values + residual).relu())
    assert (values + residual < 0).any()


def test_all_convolutions_and_the_output_are_prunable_and_the_output_can_be_left_out():
    with torch.device("meta"):
        network = ResNet20()
    names = list(Pruning().prunable(network))
    assert len(names) == 22
    assert names[0] == "conv.weight"
    assert names[-1] == "output.weight"
    assert not any("norm" in name or "bias" in name for name in names)
    only = Pruning(exclude=["*output.weight"]).prunable(network)
    assert list(only) == names[:-1]
    assert sum(p.numel() for p in only.values()) == convolutional(network) == 270_256


def test_the_papers_densities_come_out_when_neither_shortcuts_nor_output_are_pruned():
    with torch.device("meta"):
        network = ResNet20()
    total = sum(p.numel() for p in Pruning().prunable(network).values())
    pruned = sum(p.numel() for p in Pruning(exclude=["*output.weight", "*shortcut*"]).prunable(network).values())
    assert total - pruned == 640 + 2560
    left = [survivors(pruned, 0.2, level) + total - pruned for level in (4, 6, 7, 10)]
    assert [round(100 * kept / total, 1) for kept in left] == [41.7, 27.1, 21.9, 11.8]


def test_reinitialising_draws_a_new_network_from_the_seed_alone():
    one, two, other = small(), small(), small()
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


def test_resetting_gives_norm_layers_their_beginning_and_biases_zero():
    network = small()
    network(torch.randn(8, 3, 16, 16))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(3)
    network.reset_parameters()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
            assert (layer.running_mean == 0).all()
            assert (layer.running_var == 1).all()
            assert layer.num_batches_tracked == 0
    assert (network.output.bias == 0).all()


@pytest.mark.parametrize(
    ("network", "variance"),
    [
        (ResNet20(), lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
        (ResNet((16, 32)), lambda fan_in, fan_out: 2 / fan_in),
        (ResNet10(width=32), lambda fan_in, fan_out: 2 / fan_out),
    ],
    ids=["glorot", "kaiming", "fan-out"],
)
def test_initial_variances_are_those_of_the_networks_paper(network, variance):
    torch.manual_seed(0)
    network.reset_parameters()
    seen = 0
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 2000:
            field = layer.kernel_size[0] ** 2
            expected = variance(layer.in_channels * field, layer.out_channels * field)
            assert float(layer.weight.detach().var()) == pytest.approx(expected, rel=0.15)
            seen += 1
    assert seen > 6


@pytest.mark.parametrize("shortcut", ["projection", "padding"])
def test_gradients_reach_every_parameter(shortcut):
    torch.manual_seed(0)
    network = small(shortcut=shortcut)
    network(torch.randn(8, 3, 16, 16)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert float(parameter.grad.abs().max()) > 1e-3, name


@pytest.mark.parametrize("arguments", [{"widths": []}, {"blocks": 0}])
def test_a_network_without_stages_is_refused(arguments):
    with pytest.raises(ValueError, match=r"^widths=\[.*\], blocks=\d makes no stage: give widths, as in \[16, 32, 64"):
        ResNet(**arguments)


def test_an_unknown_shortcut_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"^shortcut='identity' is not known: choose projection or padding$"):
        ResNet(shortcut="identity")
