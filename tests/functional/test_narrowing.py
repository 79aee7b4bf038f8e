"""Smaller networks compute what the masked ones do, whatever a removed unit still gives out."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from drawn_networks import drawn, generator, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lottery_callbacks.functional.compressibility import compressed, hidden_weights
from lottery_callbacks.functional.narrowing import narrowed
from lottery_lightning.networks import VGG, Conv, ConvNet, Dense, GroupCNN, LeNet5, ResNet, ResNet10, ResNet20
from lottery_lightning.networks.equivariant import GroupMaxPool2d

NETWORKS = {  # parameters before and after half of the columns of each layer but the last
    "dense": (lambda: Dense([784, 300, 100, 10]), (1, 28, 28), 266_610, 784 * 150 + 150 + 150 * 50 + 50 + 510),
    "no biases": (lambda: Dense([20, 16, 12, 5], bias=False), (20,), 572, 20 * 8 + 8 * 6 + 6 * 5),
    "conv": (lambda: Conv(2), (3, 32, 32), 4_301_642, 1_076_966),
    "lenet5": (LeNet5, (1, 28, 28), 61_706, 78 + 3 * 8 * 25 + 8 + 200 * 60 + 60 + 60 * 42 + 42 + 430),
    "vgg": (lambda: VGG([8, 8, "M", 16]), (3, 8, 8), 2_178, 27 * 5 + 10 + 9 * 5 * 5 + 10 + 9 * 5 * 8 + 16 + 90),
    "vgg, no norm": (lambda: VGG([8, "M", 16, "M"], False, False), (3, 8, 8), 1_528, 27 * 4 + 36 * 8 + 80),
    "convnet": (lambda: ConvNet(width=8), (3, 32, 32), 2_730, 1_232),
    "resnet": (lambda: ResNet((4, 8), 1), (3, 8, 8), 1_454, None),
    "resnet, padding": (lambda: ResNet((4, 8), 1, "padding"), (3, 8, 8), 1_406, None),
    "resnet10": (lambda: ResNet10(4), (3, 16, 16), 19_902, None),
    "resnet20": (lambda: ResNet20(width=4), (3, 8, 8), 17_534, None),
    "c4": (GroupCNN, (1, 28, 28), 24_740, None),
}


def columns(network, ratio=0.5):
    return compressed(hidden_weights(dict(network.named_parameters())), "column", ratio=ratio)


def close(one, other, rounding):
    return bool(one.isfinite().all()) and torch.allclose(
        one, other, rtol=0, atol=rounding * float(other.detach().abs().max())
    )


def images(*shape, count=3, seed=9):
    return torch.randn(count, *shape, generator=generator(seed), dtype=torch.float64)


def of_sizes(network):
    """Every layer declares the sizes that its weights have."""
    for part in network.modules():
        if isinstance(part, nn.Linear):
            assert (part.out_features, part.in_features) == part.weight.shape
        elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            first, second = part.weight.shape[:2]
            sizes = [part.out_channels, part.in_channels // part.groups]
            assert sizes == ([first, second] if isinstance(part, nn.Conv2d) else [second, first])
        elif isinstance(part, nn.BatchNorm2d | nn.BatchNorm3d | nn.BatchNorm1d):
            assert {tensor.numel() for name, tensor in part.state_dict().items() if "num" not in name} == {
                part.num_features
            }
        elif isinstance(part, nn.GroupNorm):
            assert len(part.weight) == part.num_channels
    return True


@pytest.mark.parametrize("case", NETWORKS)
def test_half_of_the_columns_go_and_the_outputs_stay(case):
    make, shape, before, after = NETWORKS[case]
    network, state = drawn(make)
    found = columns(network)
    small = narrowed(network, found.masks, images(*shape, count=2), unitwise=(GroupMaxPool2d,))
    new, wanted = images(*shape), outputs(network, found.state(state), images(*shape))
    assert close(small.network.eval()(new.float()).double(), wanted, 3e-6)
    assert (small.before, after or small.after) == (before, small.after)
    assert small.after == sum(parameter.numel() for parameter in small.network.parameters()) < before
    assert type(small.network) is type(network)
    assert of_sizes(small.network)
    assert float(wanted.std()) > 0


@pytest.mark.parametrize("case", ["lenet5", "vgg", "convnet", "resnet", "resnet, padding", "c4"])
def test_in_float64_outputs_are_equal_to_its_rounding(case):
    make, shape = NETWORKS[case][:2]
    network = drawn(make)[0].double()
    found = columns(network, 0.6)
    small = narrowed(network, found.masks, images(*shape), unitwise=(GroupMaxPool2d,)).network.eval()
    new = images(*shape, seed=1)
    assert close(small(new), outputs(network, found.state(network.state_dict()), new), 1e-11)


def test_a_neuron_leaves_its_constant_in_the_bias_of_the_next_layer():
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))
    network[0].bias.data = torch.tensor([0.5, -2.0, 3.0])
    network[2].weight.data = torch.tensor([[1.0, 10.0, 100.0]])
    masks = {"0.weight": torch.tensor([True, False, False])[:, None].expand(3, 2)}
    small, before, after, units = narrowed(network, masks, torch.rand(2, 2))
    assert small[2].bias.tolist() == [300]
    assert torch.equal(small[0].weight, network[0].weight[:1])
    assert (before, after, units) == (9 + 3, 3 + 1 + 1, {"0": (3, 1)})
    network[0].bias.data[2] = -1
    assert narrowed(network, masks, torch.rand(2, 2)).network[2].bias is None


def padded(first, norm=True, **second):
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4)] if norm else []
    network = nn.Sequential(first, *norms, nn.ReLU(), nn.Conv2d(4, 3, 3, **second))
    if norm:
        network[1].bias.data = torch.tensor([1.0, 2.0, -1.0, 0.5])
    return network


@pytest.mark.parametrize(
    ("second", "gone", "stay"),
    [
        ({"padding": 1}, [0, 1, 2], 2),  # one bears the other's constants
        ({"padding": 1}, [0, 2], 3),  # what bears nothing but itself stays
        ({"padding": 1}, [2], 3),
        ({"padding": 1}, [0, 1, 2, 3], 1),
        ({"padding": 0}, [0, 1, 2], 1),
        ({"padding": "valid"}, [0, 1], 2),
        ({"padding": "same"}, [0, 1], 3),
        ({"padding": 1, "padding_mode": "circular"}, [0, 1], 2),
        ({"padding": 1, "padding_mode": "reflect", "bias": False}, [0, 1], 2),
        ({"padding": 0}, [0, 1, 2, 3], 1),
    ],
)
def test_what_zero_padding_cuts_at_the_edge_is_borne_by_one_unit(second, gone, stay):
    network = padded(nn.Conv2d(2, 4, 3), **second)
    mask = torch.ones(4, 2, 3, 3, dtype=torch.bool)
    mask[gone] = False
    small = narrowed(network, {"0.weight": mask}, images(2, 6, 6))
    assert small.units == {"0": (4, stay)}
    masked = deepcopy(network).double().eval()
    masked[0].weight.data[~mask] = 0
    assert close(small.network.double().eval()(images(2, 9, 9)), masked(images(2, 9, 9)), 1e-6)  # another size of image


class Several(nn.Module):
    """Depthwise, transposed and gated convolutions, cat, PReLU, tied weights, a shared layer, and norms of all."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 12, 3, groups=6)
        self.squeeze, self.gate = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.up, self.act = nn.ConvTranspose2d(12, 5, 2, bias=False), nn.PReLU(5)
        self.whole, self.wide = nn.GroupNorm(1, 8), nn.Conv2d(5, 8, 1)
        self.join, self.norm = nn.Linear(13, 7), nn.LayerNorm(7)
        self.again, self.one, self.two = nn.Linear(7, 7), nn.Linear(7, 5), nn.Linear(7, 5)
        self.two.weight = self.one.weight
        self.after = nn.Linear(5, 6)
        self.output = nn.Linear(6, 3)

    def forward(self, values):
        values = self.depthwise(F.relu(self.stem(values)))
        values = values * torch.sigmoid(self.gate(F.silu(self.squeeze(F.adaptive_avg_pool2d(values, 1)))))
        values = self.act(self.up(values))
        values = torch.cat([values, self.whole(self.wide(values))], 1).mean((2, 3))
        values = self.again(self.again(self.norm(self.join(values))).relu()).relu()
        return self.output(self.after(self.one(values).relu() * self.two(values).relu()).relu())


def test_every_kind_of_layer_is_cut_or_left_whole():
    network, state = drawn(Several)
    for norm in ("whole", "norm"):  # constant behind it, and yet a part of what the others are normed by
        network.get_submodule(norm).weight.data[1:3] = state[f"{norm}.weight"][1:3] = 0
    masks = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in network.named_parameters()}
    for name in ("stem", "squeeze", "wide", "join", "again", "one", "after"):
        masks[f"{name}.weight"][1:3] = False
    masks["depthwise.weight"][8] = False  # the filter alone: its unit is given out by the stem
    masks["gate.weight"][[2, 3, 4, 5]] = False
    masks["up.weight"][:, 1:3] = False
    small = narrowed(network, masks, images(3, 6, 6))
    stays = {"wide": (8, 8), "join": (7, 7), "one": (5, 5)}  # norms of several units, tied weights
    # of the stem's two, one bears the constants that a transposed convolution reads
    assert small.units == {"stem": (6, 5), "squeeze": (4, 2), "up": (5, 3), "after": (6, 4), **stays}
    assert small.network.depthwise.weight.shape == (10, 1, 3, 3)
    assert (small.network.depthwise.groups, small.network.depthwise.in_channels) == (5, 5)
    assert small.network.act.num_parameters == 3
    assert small.network.one.weight is small.network.two.weight
    masked = {name: torch.where(masks[name], state[name], 0) if name in masks else state[name] for name in state}
    masked["two.weight"] = masked["one.weight"]
    new = images(3, 6, 6, seed=1)
    assert close(small.network.eval()(new.float()).double(), outputs(network, masked, new), 3e-6)
    assert of_sizes(small.network)


def test_shared_units_go_where_all_layers_that_give_them_out_lose_them():
    network, state = drawn(lambda: ResNet((4, 6), 1))
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in network.named_parameters() if p.ndim == 4}
    for name in ("conv.weight", "blocks.0.conv2.weight", "blocks.1.conv2.weight"):
        masks[name][[0, 3]] = False
    masks["blocks.1.shortcut.0.weight"][[0, 1, 3]] = False
    small = narrowed(network, masks, images(3, 8, 8))
    # of the first stage's two, one bears the constants under the padding of the next convolutions
    assert small.units == {
        "conv": (4, 3), "blocks.0.conv1": (4, 4), "blocks.1.conv1": (6, 6), "blocks.1.shortcut.0": (6, 4),
    }  # fmt: skip
    masked = {name: torch.where(masks[name], state[name], 0) if name in masks else state[name] for name in state}
    new = images(3, 8, 8, seed=1)
    assert close(small.network.eval()(new.float()).double(), outputs(network, masked, new), 3e-6)


@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), density=st.sampled_from([0.1, 0.5, 0.9]), width=st.integers(1, 6))
def test_any_columns_of_a_network_with_norms_and_skips_may_go(seed, density, width):
    network, state = drawn(lambda: ResNet((width, width + 1), 1), seed)
    draws = generator(seed)
    masks = {}
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4:
            kept = torch.rand(len(parameter), generator=draws) < density
            masks[name] = kept.view(-1, 1, 1, 1).expand(parameter.shape)
    small = narrowed(network.double(), masks, images(3, 5, 5, count=1))
    masked = {name: torch.where(masks[name], state[name], 0) if name in masks else state[name] for name in state}
    new = images(3, 5, 5, count=2, seed=1)
    assert close(small.network.eval()(new), outputs(network, masked, new), 1e-9)
    assert all(1 <= stay <= there for there, stay in small.units.values())


def test_single_weights_count_and_a_unit_with_one_left_stays():
    network, state = drawn(lambda: Dense([4, 3, 2]))
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = True
    small = narrowed(network, {"hidden.0.weight": mask}, torch.rand(1, 4))
    assert small.units == {"hidden.0": (3, 1)}
    assert small.network.hidden[0].weight.tolist() == [[0, 0, state["hidden.0.weight"][1, 2].item(), 0]]


def test_the_network_is_left_alone_and_the_copy_is_like_it_and_trains_on():
    network = drawn(lambda: VGG([4, 6]))[0].half()
    network.features[0].weight.requires_grad_(False)
    network.output.bias.grad = torch.ones_like(network.output.bias)
    network.train().features[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    small = narrowed(network, columns(network).masks, images(3, 4, 4)).network
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network.output.bias.grad is not None
    assert list(small.state_dict()) == list(before)
    assert {p.dtype for p in small.parameters()} == {torch.float16}
    assert [part.training for part in small.modules()] == [part.training for part in network.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in network.parameters()]
    assert all(p.grad is None for p in small.parameters())
    assert not any(part._forward_pre_hooks for part in (*small.modules(), *network.modules()))
    small.float()(images(3, 4, 4).float()).sum().backward()
    assert small.features[3].weight.grad.shape == small.features[3].weight.shape


def test_a_compiled_network_and_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.output = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, one, other):
            return self.output(self.first(one - other).relu())

    network = Two()
    inputs = torch.rand(2, 3), torch.rand(2, 3)
    small = narrowed(torch.compile(network), columns(network).masks, inputs)
    assert small.units == {"first": (4, 2)}
    assert small.network(*inputs).shape == (2, 2)


class Both(nn.Module):
    """Two padded readers, of which each sees 0 where the other does not."""

    def __init__(self):
        super().__init__()
        self.first, self.output = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, values):
        values = self.first(values)
        return self.output((self.one(values.relu()) * self.two((-values).relu())).mean((2, 3)))


def test_units_stay_of_which_none_could_bear_the_others():
    network = drawn(Both)[0].double()
    network.first.bias.data = torch.tensor([1.0, -1, 0, 2], dtype=torch.float64)
    mask = torch.zeros(4, 1, 3, 3, dtype=torch.bool)
    mask[3] = True
    small = narrowed(network, {"first.weight": mask}, images(1, 5, 5))
    assert small.units["first"] == (4, 3)  # the one that is 0 goes
    network.first.weight.data[:3] = 0
    assert close(small.network(images(1, 5, 5, seed=1)), network(images(1, 5, 5, seed=1)), 1e-12)


class Gated(nn.Module):
    """One unit multiplies all others: what is constant before it is none after it."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.output = nn.Linear(3, 4), nn.Linear(3, 1), nn.Linear(4, 2)

    def forward(self, values):
        return self.output(self.first(values) * self.gate(values))


def test_what_an_input_changes_is_no_constant_also_where_the_example_is_a_single_one():
    network = drawn(Gated)[0].double()
    small = narrowed(network, dead(network, "first.weight"), images(3, count=1))
    assert small.units["first"] == (4, 4)


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.output = nn.Linear(3, 4), nn.Conv2d(1, 2, 1), nn.Linear(8, 2)

    def forward(self, values):
        return self.output(self.first(values).relu().view(-1, 4).repeat(1, 2))


class Named(nn.Module):
    """Its forward names a width."""

    def __init__(self):
        super().__init__()
        self.first, self.output = nn.Conv2d(1, 4, 1), nn.Linear(16, 2)

    def forward(self, values):
        return self.output(self.first(values).relu().view(-1, 16))


class Turned(nn.Linear):
    def forward(self, input):
        return super().forward(input) + torch.arange(self.out_features)


def dead(network, name="0.weight"):
    mask = torch.ones_like(dict(network.named_parameters())[name], dtype=torch.bool)
    mask[:2] = False
    return {name: mask}


@pytest.mark.parametrize(
    ("network", "masks", "shape", "message"),
    [
        (Dense([3, 4, 2]), {"other.weight": torch.ones(4, 3)}, (3,), "mask of other.weight fits no parameter of Dense"),
        (Dense([3, 4, 2]), {"hidden.0.weight": torch.ones(3, 3)}, (3,), "mask of hidden.0.weight fits no parameter"),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(4, 4, affine=False)), {}, (1, 3, 3), r"1 \(GroupNorm\) has no"),
        (Fixed(), {}, (3,), r"repeat \(repeat\) cannot be followed"),
        (Named(), dead(Named(), "first.weight"), (1, 2, 2), "Named cannot run with fewer units .*must name no width"),
        (
            nn.Sequential(nn.Linear(3, 4), Turned(4, 4), nn.Linear(4, 2)),
            {"1.weight": dead(nn.Linear(4, 4), "weight")["weight"]},
            (3,),
            "gives other outputs with fewer units",
        ),
    ],
)
def test_what_cannot_be_made_smaller_is_refused_in_one_line(network, masks, shape, message):
    with pytest.raises(ValueError, match=message) as caught:
        narrowed(network, masks, images(*shape))
    assert "\n" not in str(caught.value)
