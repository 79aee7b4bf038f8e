"""Hidden units: which axes hold them, and that permuting them changes no output."""

import itertools
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from drawn_networks import drawn, generator, outputs
from torch import nn
from torch.nn.utils import parametrizations, prune

from lottery_callbacks.functional.hidden_units import check_groups, permutation_groups
from lottery_callbacks.functional.permutations import permuted, random_permutations
from lottery_lightning.networks import VGG, Conv, ConvNet, Dense, GroupCNN, LeNet5, ResNet, ResNet10, ResNet18, ResNet20
from lottery_lightning.networks.equivariant import GroupMaxPool2d


def widths(groups, state):
    return {group: len(order) for group, order in random_permutations(groups, state, generator()).items()}


def vgg11_bn():
    """Torchvision's, with a narrow classifier behind its blocks of 49 pixels."""
    with torch.device("meta"):
        network = torchvision.models.vgg11_bn()
        network.classifier[0], network.classifier[3] = nn.Linear(512 * 49, 32), nn.Linear(32, 24)
        network.classifier[6] = nn.Linear(24, 10)
    network.to_empty(device="cpu")
    for part in network.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return network


NETWORKS = {
    "dense": (lambda: Dense([20, 16, 12, 5]), (20,), 2, 28),
    "conv": (lambda: Conv(2), (3, 32, 32), 4, 640),
    "lenet5": (LeNet5, (1, 28, 28), 4, 226),
    "convnet": (lambda: ConvNet(width=8), (3, 32, 32), 3, 24),
    "vgg": (lambda: VGG([8, 8, "M", 16]), (3, 8, 8), 3, 32),
    "vgg, no norm": (lambda: VGG([8, "M", 16, "M"], batch_norm=False, bias=False), (3, 8, 8), 2, 24),
    "resnet": (lambda: ResNet((4, 8, 16), 2), (3, 8, 8), 9, 84),
    "resnet, padding": (lambda: ResNet((4, 8, 16), 2, "padding"), (3, 8, 8), 9, 72),
    "resnet10": (lambda: ResNet10(4), (3, 16, 16), 8, 120),
    "resnet18": (lambda: ResNet18(4), (3, 16, 16), 12, 180),
    "resnet20": (ResNet20, (3, 8, 8), 12, 448),
    "c4": (GroupCNN, (1, 28, 28), 7, 70),
    "torchvision resnet18": (torchvision.models.resnet18, (3, 64, 64), 12, 2880),
    "torchvision vgg11_bn": (vgg11_bn, (3, 64, 64), 10, 2808),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_any_order_of_hidden_units_gives_the_same_outputs(case):
    make, shape, count, units = NETWORKS[case]
    network, state = drawn(make)
    groups = permutation_groups(network, unitwise=(GroupMaxPool2d,))
    assert (len(groups), sum(widths(groups, state).values())) == (count, units)
    moved = permuted(state, groups, random_permutations(groups, state, generator(1)))
    hidden = {name for name, tensor in state.items() if tensor.numel() > 1 and not name.endswith("output.bias")}
    assert {name for name in hidden if torch.equal(state[name], moved[name])} <= {"fc.bias", "classifier.6.bias"}
    images = torch.rand(2, *shape, generator=generator(2))
    before, after = outputs(network, state, images), outputs(network, moved, images)
    assert torch.allclose(before, after, rtol=1e-12, atol=1e-12 * float(before.abs().max()))
    assert float(before.std()) > 0


def test_the_groups_of_lenet5_and_of_tied_residual_streams_in_full():
    def places(groups):
        return {group: [entry[:2] for entry in entries] for group, entries in groups.items()}

    groups = permutation_groups(LeNet5())
    assert all(entry.places is None for entries in groups.values() for entry in entries)
    layers = ["features.0", "features.3", "hidden.1", "hidden.3", "output"]
    assert places(groups) == {
        layer: [(f"{layer}.weight", 0), (f"{layer}.bias", 0), (f"{after}.weight", 1)]
        for layer, after in itertools.pairwise(layers)
    }
    norm = ["weight", "bias", "running_mean", "running_var"]
    assert places(permutation_groups(ResNet((4,), 1))) == {
        "conv": [
            ("conv.weight", 0),
            *((f"norm.{name}", 0) for name in norm),
            ("blocks.0.conv1.weight", 1),
            ("blocks.0.conv2.weight", 0),
            *((f"blocks.0.norm2.{name}", 0) for name in norm),
            ("output.weight", 1),
        ],
        "blocks.0.conv1": [
            ("blocks.0.conv1.weight", 0),
            *((f"blocks.0.norm1.{name}", 0) for name in norm),
            ("blocks.0.conv2.weight", 1),
        ],
    }
    padded = permutation_groups(ResNet((2, 6), 1, "padding"))
    (old,) = [entry.places for entry in padded["conv"] if entry[:2] == ("output.weight", 1)]
    (new,) = [entry.places for entry in padded["blocks.1.conv2"] if entry[:2] == ("output.weight", 1)]
    assert (old.tolist(), new.tolist()) == ([[0], [1]], [[2], [3], [4], [5]])


def test_a_network_on_the_meta_device_a_compiled_one_and_a_lightning_module_are_read(make_module):
    with torch.device("meta"):
        network = torchvision.models.vgg11_bn()
    units = widths(permutation_groups(network), network.state_dict())
    assert (units["features.0"], units["classifier.0"], len(units)) == (64, 4096, 10)
    assert permutation_groups(torch.compile(LeNet5())) == permutation_groups(LeNet5())

    class Module(type(make_module())):
        def forward(self, values):
            return self.network(values)

    assert permutation_groups(Module())["network.0"][-1] == ("network.4.weight", 1, None)
    assert permutation_groups(nn.Linear(3, 3)) == {}


class Several(nn.Module):
    """Gates, depthwise and transposed convolutions, cat, a shared layer, tied weights, norms of all kinds."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(1, 6)
        self.depthwise = nn.Conv2d(6, 12, 3, groups=6)
        self.squeeze, self.gate = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.up, self.act = nn.ConvTranspose2d(12, 5, 2), nn.PReLU(5)
        self.instance = nn.InstanceNorm2d(17, affine=True, track_running_stats=True)
        self.wide, self.layernorm = nn.Linear(17 * 4, 7), nn.LayerNorm(7)
        self.shared, self.one, self.two = nn.Linear(7, 7), nn.Linear(7, 5), nn.Linear(5, 7)
        self.two.weight = nn.Parameter(self.one.weight.detach().T.clone())
        self.same = nn.Linear(7, 7)
        self.same.weight = self.shared.weight
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.output = nn.Linear(7, 3)

    def forward(self, images):
        values = self.depthwise(F.relu(self.norm(self.stem(2 * images - 1))))
        values = values * torch.sigmoid(self.gate(F.silu(self.squeeze(F.adaptive_avg_pool2d(values, 1)))))
        up = self.act(self.up(values))
        values = self.instance(torch.cat([up, F.pad(values, (0, 1, 0, 1))], 1))
        values = F.adaptive_avg_pool2d(values, 2).view(images.shape[0], -1)
        values = self.layernorm(self.wide(values))
        values = self.shared(self.shared(values).tanh()).relu() + self.same(values) * self.scale
        return self.output(values - self.two(self.one(values).relu()))


def test_gates_depthwise_and_transposed_convolutions_cat_shared_and_tied_weights():
    network, state = drawn(Several)
    images = torch.rand(2, 3, 6, 6, generator=generator())
    groups = permutation_groups(network, example=images)
    assert widths(groups, state) == {"stem": 6, "squeeze": 4, "up": 5, "wide": 7, "one": 5}
    assert [entry.places.shape for entry in groups["stem"] if entry[:2] == ("wide.weight", 1)] == [(6, 8)]
    moved = permuted(state, groups, random_permutations(groups, state, generator(1)))
    assert torch.equal(moved["same.weight"], moved["shared.weight"])
    assert not torch.equal(moved["shared.weight"], state["shared.weight"])
    assert torch.allclose(outputs(network, state, images), outputs(network, moved, images), rtol=1e-12, atol=1e-12)


class Through(nn.Module):
    """A layer, a function of its units and of the module, and a layer."""

    def __init__(self, function, **parts):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
        self.gamma = nn.Parameter(torch.ones(6))
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, values):
        return self.last(self.function(self, self.first(values)))


class Mixed(nn.Linear):
    """Declares what it is not: its inputs are turned round."""

    def forward(self, input):
        return super().forward(input.flip(-1))


class Adapted(nn.Linear):
    def __init__(self):
        super().__init__(6, 6)
        self.adapter = nn.Parameter(torch.ones(6))


def patched():
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    network[0].forward = lambda values: values.cumsum(1)
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool3d(1)), r"1 \(MaxPool3d\) .*not known"),
        (nn.Sequential(nn.Conv1d(3, 4, 1), nn.AvgPool2d(1)), r"1 \(AvgPool2d\) .*not known"),
        (nn.Sequential(nn.Conv1d(3, 4, 1), nn.ZeroPad2d(1)), r"1 \(ZeroPad2d\) .*not known"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), r"1 \(GroupNorm\) .*2 groups of channels"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2)), r"1 \(Conv2d\) .*2 groups of channels"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm([5, 5])), r"1 \(LayerNorm\) .*more than features"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4)), r"1 \(Linear\) .*values of 4 dimensions"),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(8, 4)), r"1 \(Linear\) .*takes 8 units and gets 4"),
        (nn.Sequential(nn.Linear(6, 6), nn.Softmax(1)), r"1 \(Softmax\) .*not known"),
        (nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 6)), r"1 \(LSTM\) .*not known"),
        (nn.Sequential(nn.Linear(6, 6), nn.Flatten(0)), r"1 \(Flatten\) .*than a whole example"),
        (nn.Sequential(nn.Linear(6, 6), Adapted()), r"1 \(Adapted\) .*the parameter adapter besides"),
        (nn.Sequential(nn.Linear(6, 6), parametrizations.weight_norm(nn.Linear(6, 6))), "1 .*original0 besides"),
        (nn.Sequential(prune.l1_unstructured(nn.Linear(6, 6), "weight", 3)), "0 .*the parameter weight_orig besides"),
        (patched(), r"0 \(Linear\) .*its forward is set from outside"),
        (Through(lambda module, values: values * module.gamma), r"gamma \(gamma\) .*a weight .*without its layer"),
        (Through(lambda module, values: values[:, :3]), r"getitem \(getitem\) .*something else than pixels"),
        (Through(lambda module, values: values.cumsum(1)), r"cumsum \(cumsum\) .*not known"),
        (Through(lambda module, values: values.view(-1, 3, 2)), r"view \(view\) .*makes another shape"),
        (Through(lambda module, values: values.mean(1)), r"mean \(mean\) .*something else than space"),
        (Through(lambda module, values: torch.cat([values, values], 0)), r"cat \(cat\) .*more than hidden units"),
        (Through(lambda module, values: values if values.sum() > 0 else -values), "Through cannot be traced"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(network, message):
    with pytest.raises(ValueError, match=f"^{message}.*: give groups by hand$") as error:
        permutation_groups(network)
    assert "\n" not in str(error.value)


def test_units_that_inputs_or_outputs_hold_stay_in_place():
    class Added(Dense):
        def forward(self, images):
            return self.output(self.hidden[0](images).relu() + images)

    assert permutation_groups(Added([6, 6, 2])) == {}
    shared = nn.Linear(6, 6)
    assert permutation_groups(nn.Sequential(shared, nn.ReLU(), shared)) == {}


def test_an_example_proves_the_groups_and_leaves_the_network_as_it_is():
    values = torch.rand(4, 6, generator=generator())
    wrong = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Mixed(6, 2))
    with pytest.raises(ValueError, match="these groups are no symmetry of Sequential"):
        permutation_groups(wrong, example=values)
    right = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).train()
    before = deepcopy(right.state_dict())
    groups = permutation_groups(right, example=values)
    assert all(torch.equal(before[name], tensor) for name, tensor in right.state_dict().items())
    assert all(part.training for part in right.modules())
    with pytest.raises(ValueError, match="no symmetry"):
        check_groups(right, {"one": groups["0"][:-1]}, values)
    with pytest.raises(ValueError, match="cannot run on the example in float64"):
        check_groups(right, groups, values[:, :3])


class Tokens(nn.Module):
    """Batch norm of as many tokens as there are features."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, values):
        return self.last(self.norm(self.first(values)).relu())


class Pixels(nn.Module):
    """Takes pixels for examples."""

    def __init__(self, width):
        super().__init__()
        self.width, self.first, self.last = width, nn.Conv2d(3, 4, 3), nn.Linear(width, 2)

    def forward(self, images):
        return self.last(self.first(images).view(-1, self.width))


@pytest.mark.parametrize(("make", "shape"), [(Tokens, (6, 5)), (lambda: Pixels(4), (3, 4, 4))])
def test_what_sizes_alone_do_not_tell_an_example_does_also_before_training(make, shape):
    network, example = make(), torch.rand(3, *shape, generator=generator())
    before = deepcopy(network.state_dict())
    permutation_groups(network)
    with pytest.raises(ValueError, match="these groups are no symmetry of"):
        permutation_groups(network, example=example)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_compiled_networks_groups_are_proven_by_the_names_within():
    groups = permutation_groups(network := nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    check_groups(torch.compile(network), groups, torch.rand(3, 6, generator=generator()))


@pytest.mark.parametrize(("conv", "pool", "shape"), [("1d", "1d", (9,)), ("2d", "2d", (9, 9)), ("3d", "3d", (9, 9, 9))])
def test_pools_of_the_values_own_rank_pass_units_on(conv, pool, shape):
    convolution, average = getattr(nn, f"Conv{conv}"), getattr(nn, f"AvgPool{pool}")
    network = nn.Sequential(convolution(2, 4, 3), average(2), nn.Upsample(scale_factor=2), convolution(4, 2, 1))
    groups = permutation_groups(network, example=torch.rand(1, 2, *shape, generator=generator()))
    assert widths(groups, network.state_dict()) == {"0": 4}


def test_masks_move_with_their_weights():
    network, state = drawn(LeNet5)
    groups = permutation_groups(network)
    masks = {
        name: torch.rand(tensor.shape, generator=generator()) < 0.2 for name, tensor in state.items() if tensor.ndim > 1
    }
    pruned = state | {name: state[name] * mask for name, mask in masks.items()}
    orders = random_permutations(groups, state, generator(1))
    moved, weights = permuted(masks, groups, orders), permuted(pruned, groups, orders)
    assert moved.keys() == masks.keys()
    for name, mask in moved.items():
        assert mask.dtype == torch.bool
        assert torch.equal(weights[name] != 0, mask)
        assert not torch.equal(mask, masks[name])


def test_a_permutation_that_does_not_fit_is_refused_by_name():
    network, state = drawn(lambda: Dense([4, 3, 2]))
    groups = permutation_groups(network)
    order = torch.tensor([2, 0, 1])
    with pytest.raises(ValueError, match=r"permutation of hidden.0 does not hold each of 0 to 2 once"):
        permuted(state, groups, {"hidden.0": torch.tensor([0, 0, 1])})
    with pytest.raises(ValueError, match=r"hidden.0.weight has 3 entries on axis 0, which 2 units do not fit"):
        permuted(state, groups, {"hidden.0": order[1:]})
    with pytest.raises(ValueError, match=r"state has no hidden.0.bias: give the names of the network"):
        permuted({f"network.{name}": tensor for name, tensor in state.items()}, groups, {"hidden.0": order})
