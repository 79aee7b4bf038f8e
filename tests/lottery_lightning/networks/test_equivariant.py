import importlib
import itertools
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, Pruning
from lottery_callbacks.apply_ticket import reinitialise
from lottery_lightning.networks.equivariant import GroupCNN, GroupConv2d, GroupMaxPool2d, LiftingConv2d
from lottery_lightning.networks.groups import (
    check_grid,
    compose,
    filter_table,
    inverse,
    order,
    transform,
    transform_features,
)
from lottery_lightning.tasks import ImageClassifier

GROUPS = ("C4", "D4")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def small(group, seed=0, dtype=torch.float32):
    """12 -> 10 -> 5 -> 3 -> 1, in evaluation, with the statistics of noise and affine pairs at random."""
    torch.manual_seed(seed)
    network = GroupCNN(group, (3, 4, 3), (3, 3, 3), (1,), classes=4).to(dtype)
    with torch.no_grad():
        for layer in network.features:
            if isinstance(layer, nn.BatchNorm3d):
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_(0, 0.5)
                layer.momentum = 1.0
        network.output.bias.normal_(0, 0.5)
        network(torch.randn(8, 1, 12, 12, dtype=dtype))
    return network.eval()


@torch.no_grad()
def mask_at_random(network, density):
    for parameter in Pruning().prunable(network).values():
        parameter.mul_(torch.rand_like(parameter) < density)


def error(found, expected):
    return float((found - expected).detach().norm() / expected.detach().norm())


# ---- the groups


@pytest.mark.parametrize("group", GROUPS)
def test_the_tables_are_those_of_a_group(group):
    elements = range(order(group))
    for g, h, k in itertools.product(elements, repeat=3):
        assert compose(compose(g, h), k) == compose(g, compose(h, k))
    for g in elements:
        assert compose(g, 0) == compose(0, g) == g
        assert compose(g, inverse(g)) == compose(inverse(g), g) == 0
        assert sorted(compose(g, h) for h in elements) == list(elements)


def test_the_rotations_commute_and_the_reflections_do_not():
    assert [compose(1, g) for g in range(4)] == [1, 2, 3, 0]
    assert (compose(1, 4), compose(4, 1)) == (5, 7)


def test_elements_act_on_a_known_image():
    image = torch.tensor([[1, 2], [3, 4]])
    assert transform(image, 1).tolist() == [[2, 4], [1, 3]]  # counterclockwise
    assert transform(image, 4).tolist() == [[2, 1], [4, 3]]  # left and right change places
    assert transform(image, 5).tolist() == [[1, 3], [2, 4]]  # first the reflection, then the turn
    orbit = {str(transform(image, g).tolist()) for g in range(8)}
    assert len(orbit) == 8


@pytest.mark.parametrize("group", GROUPS)
def test_acting_twice_is_acting_by_the_product(group):
    maps = torch.randn(order(group), 3, 3)
    for g, h in itertools.product(range(order(group)), repeat=2):
        assert torch.equal(transform(transform(maps, h), g), transform(maps, compose(g, h)))
        twice = transform_features(transform_features(maps, h), g)
        assert torch.equal(twice, transform_features(maps, compose(g, h)))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("lifting", [True, False])
def test_rows_of_a_filter_table_are_permutations_that_compose_like_the_group(group, lifting):
    table = filter_table(group, 3, lifting)
    taps = 9 if lifting else 9 * order(group)
    assert table.shape == (order(group), taps)
    assert torch.equal(table.sort(1).values, torch.arange(taps).expand_as(table))
    for g, h in itertools.product(range(order(group)), repeat=2):
        assert torch.equal(table[h][table[g]], table[compose(g, h)])


# ---- the layers, against loops over the definition

TURN, MIRROR = torch.tensor([[0, -1], [1, 0]]), torch.tensor([[1, 0], [0, -1]])


def matrix(g):
    """What element g does to centred (row, column) coordinates."""
    result = torch.eye(2, dtype=torch.int64)
    for _ in range(g % 4):
        result = TURN @ result
    return result @ MIRROR if g >= 4 else result


def naive(layer, inputs):
    """out[o, g](x) = bias[o] + sum over i, h, y of weight[o, i, g^-1 h](g^-1 y) in[i, h](x + y), tap by tap."""
    size, matrices = layer.kernel_size[0], [matrix(g) for g in range(len(layer.index))]
    lifting = inputs.ndim == 4
    outputs = []
    for of_g in matrices:
        back = of_g.T  # orthogonal
        total = 0.0
        for h, of_h in enumerate(matrices[:1] if lifting else matrices):
            plane = next(k for k, m in enumerate(matrices) if torch.equal(m, back @ of_h))
            bank = layer.weight if lifting else layer.weight[:, :, plane]
            filters = torch.stack([
                bank[..., (u + size - 1) // 2, (v + size - 1) // 2]
                for row, column in itertools.product(range(size), repeat=2)
                for u, v in [(back @ torch.tensor([2 * row - size + 1, 2 * column - size + 1])).tolist()]
            ], -1).unflatten(-1, (size, size))  # fmt: skip
            source = inputs if lifting else inputs[:, :, h]
            total = total + F.conv2d(source, filters, stride=layer.stride, padding=layer.padding)
        outputs.append(total + layer.bias[:, None, None])
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", [LiftingConv2d, GroupConv2d])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (4, 1, 0), (3, 2, 0), (1, 1, 0), (2, 1, 1)])
def test_layers_and_their_gradients_equal_loops_over_the_definition(group, kind, kernel, stride, padding):
    torch.manual_seed(0)
    layer = kind(2, 3, kernel, group, stride, padding).double()
    planes = () if kind is LiftingConv2d else (order(group),)
    inputs = torch.randn(2, 2, *planes, 5, 5, dtype=torch.float64, requires_grad=True)
    found, expected = layer(inputs), naive(layer, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    wanted = (inputs, layer.weight, layer.bias)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


# ---- equivariance under any mask


@pytest.mark.parametrize("dtype", TOLERANCE)
@given(group=st.sampled_from(GROUPS), density=st.floats(0.02, 1), seed=st.integers(0, 2**20))
def test_logits_are_invariant_and_every_layer_is_equivariant_under_any_mask(dtype, group, density, seed):
    network = small(group, seed, dtype)
    mask_at_random(network, density)
    images = torch.randn(2, 1, 12, 12, dtype=dtype)
    logits = network(images)
    for g in range(order(group)):
        assert error(network(transform(images, g)), logits) < TOLERANCE[dtype]
        maps, act = images, transform
        for layer in network.features:
            turned, maps = layer(act(maps, g)), layer(maps)
            act = transform_features
            assert (turned - act(maps, g)).norm() <= TOLERANCE[dtype] * maps.norm()


@pytest.mark.parametrize("arguments", [(), ("D4", (4, 4, 4, 4), (5, 3, 3, 3), (1, 2))], ids=["default", "narrow"])
def test_networks_of_the_configs_are_invariant_in_training_and_evaluation(arguments):
    network, images = GroupCNN(*arguments), torch.randn(4, 1, 28, 28)
    elements = range(order("D4" if len(network.features[0].index) == 8 else "C4"))
    mask_at_random(network, 0.3)
    for training in (True, False):
        network.train(training)
        logits = network(images)
        assert logits.shape == (4, 10)
        assert all(error(network(transform(images, g)), logits) < 1e-5 for g in elements)


def test_rotations_alone_do_not_make_a_network_invariant_to_reflections():
    network, images = small("C4"), torch.randn(2, 1, 12, 12)
    assert error(network(transform(images, 4)), network(images)) > 0.05


@pytest.mark.parametrize("group", GROUPS)
def test_a_mask_on_the_expanded_filter_breaks_equivariance_and_one_on_the_weight_does_not(group):
    torch.manual_seed(0)
    layer, maps = GroupConv2d(3, 3, 3, group, bias=False), torch.randn(2, 3, order(group), 6, 6)

    def worst(filters):
        def convolve(maps):
            return F.conv2d(maps.flatten(1, 2), filters).unflatten(1, (3, order(group)))

        expected = [transform_features(convolve(maps), g) for g in range(order(group))]
        return max(error(convolve(transform_features(maps, g)), e) for g, e in enumerate(expected))

    with torch.no_grad():
        filters = layer.expanded()
        assert worst(filters * (torch.rand_like(filters) < 0.5)) > 0.3
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.5)
        assert worst(layer.expanded()) < 1e-5


# ---- grids


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (GroupMaxPool2d(2), (1, 1, 4, 7, 7), r"windows of 2 at stride 2, padding 0, do not cover a grid of 7 x 7 ev"),
        (GroupConv2d(1, 1, 3, stride=2), (1, 1, 4, 6, 6), r"size \+ 2 padding - kernel = 3 must be a multiple of the"),
        (LiftingConv2d(1, 1, 5, stride=2, padding=2), (1, 1, 28, 28), r"windows of 5 at stride 2, padding 2, do not"),
        (LiftingConv2d(1, 1, 3), (1, 1, 2, 2), r"kernel = -1 must be a multiple of the stride, 0 or more; change one"),
        (LiftingConv2d(1, 1, 3), (1, 1, 6, 8), r"^a quarter turn does not map a grid of 6 x 8 onto itself: pad or"),
        (GroupMaxPool2d(2), (1, 1, 4, 4, 6), r"a grid of 4 x 6 onto itself"),
    ],
)  # fmt: skip
def test_grids_that_the_group_does_not_map_onto_themselves_are_refused(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape))


@given(size=st.integers(2, 9), kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 2))
@settings(max_examples=40)
def test_a_strided_layer_is_equivariant_exactly_where_its_grid_is_allowed(size, kernel, stride, padding):
    rest = size + 2 * padding - kernel
    if rest < 0:
        return
    torch.manual_seed(0)
    filters = LiftingConv2d(1, 2, kernel, "C4").double().expanded()
    image = torch.randn(1, 1, size, size, dtype=torch.float64)

    def convolve(image):
        return F.conv2d(image, filters, stride=stride, padding=padding).unflatten(1, (2, 4))

    with torch.no_grad():
        difference = float((convolve(transform(image, 1)) - transform_features(convolve(image), 1)).abs().max())
    if rest % stride == 0:
        check_grid((size, size), kernel, stride, padding)
        assert difference < 1e-12
    else:
        with pytest.raises(ValueError, match="do not cover"):
            check_grid((size, size), kernel, stride, padding)
        assert difference > 1e-6


# ---- the network


@pytest.mark.parametrize(
    ("network", "weights", "others"),
    [
        (GroupCNN(), 90 + 5 * 3_600 + 6_400 + 100, 150),  # arXiv 1602.07576: 24,490 without the linear layer
        (GroupCNN("D4", (7,) * 7), 63 + 5 * 3_528 + 6_272 + 70, 108),
        (GroupCNN("C4", (8, 8, 16, 16), (5, 3, 3, 3), (1, 2)), 200 + 2_304 + 4_608 + 9_216 + 160, 106),
    ],
)
def test_parameter_counts_and_prunable_names(network, weights, others):
    prunable = Pruning().prunable(network)
    filters = [f"features.{i}.weight" for i, m in enumerate(network.features) if isinstance(m, GroupConv2d)]
    assert list(prunable) == [*filters, "output.weight"]
    assert sum(p.numel() for p in prunable.values()) == weights
    assert sum(p.numel() for p in network.parameters()) == weights + others


def test_the_state_dict_holds_the_canonical_filters_and_no_tables():
    network = GroupCNN("D4", (3, 4), (3, 3), ())
    assert network.features[0].weight.shape == (3, 1, 3, 3)
    assert network.features[3].weight.shape == (4, 3, 8, 3, 3)
    assert [name for name in network.state_dict() if "features.3" in name] == ["features.3.weight"]


def test_gradients_reach_every_parameter():
    network = small("D4").train()
    network(torch.randn(6, 1, 12, 12)).square().sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": (4, 4)}, r"^2 channels and 7 kernels: give one of each a layer, at least one$"),
        ({"channels": (), "kernels": ()}, r"^0 channels and 0 kernels"),
        ({"pool_after": (2, 9)}, r"^pool_after names \[9\]: layers are counted from 1 to 7$"),
        ({"group": "C8"}, r"^group='C8' is not known: choose C4 or D4$"),
        ({"init": "glorot"}, r"^init='glorot' is not known"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupCNN(**arguments)


@pytest.mark.parametrize(("init", "scale"), [("glorot_normal", 2 / (30 + 40)), ("kaiming_normal", 2 / 30)])
def test_filters_are_drawn_by_the_fans_of_the_group_filter(init, scale):
    torch.manual_seed(0)
    network = GroupCNN("C4", (30, 40), (5, 5), (), init=init)
    weight = network.features[3].weight.detach()
    assert float(weight.var()) == pytest.approx(scale / (4 * 25), rel=0.03)


def test_reinitialising_draws_every_layer_from_the_seed_alone():
    one, two = small("C4", seed=1), small("C4", seed=2)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    for network in (one, two):
        reinitialise(network, 5)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
        assert name.endswith("num_batches_tracked") or not torch.equal(tensor, before[name]), name
    assert (one.features[1].running_mean == 0).all()
    assert (one.output.bias == 0).all()


# ---- the lottery


def fit(callback, make_trainer, folder, seed, module):
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(40, 1, 12, 12, generator=generator), torch.arange(40) % 4
    L.seed_everything(seed, verbose=False)
    loader = DataLoader(TensorDataset(images, labels), 8)
    trainer = make_trainer(callbacks=[callback], default_root_dir=folder, max_steps=6, limit_val_batches=0)
    trainer.fit(module, loader, loader)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_a_lottery_prunes_and_rewinds_it_and_each_level_equals_its_ticket_bit_for_bit(make_trainer, tmp_path):
    module = ImageClassifier(small("D4").train(), num_classes=4)
    imp = IterativeMagnitudePruning(rate=0.4, run_dir=tmp_path)
    finals = [fit(imp, make_trainer, level.run_dir, level.number, module) for level in imp.levels(2)]
    weights = list(Pruning().prunable(module))
    for level in (1, 2):
        fresh = ImageClassifier(small("D4", seed=9).train(), num_classes=4)
        again = fit(ApplyTicket(imp.ticket_path(level)), make_trainer, tmp_path / "again", level, fresh)
        assert all(torch.equal(again[name], finals[level][name]) for name in finals[level])
        kept = sum(int((again[name] != 0).sum()) for name in weights)
        assert kept / sum(again[name].numel() for name in weights) == pytest.approx(0.6**level, abs=0.02)
        images = torch.randn(3, 1, 12, 12)
        logits = fresh.eval()(images)
        assert all(error(fresh(transform(images, g)), logits) < 1e-5 for g in range(8))


# ---- e2cnn, an independent implementation


@pytest.fixture
def e2cnn(monkeypatch):
    """The library, with what numpy 2 took from it: `tostring`, and `copy=False` where a copy is needed."""
    package = pytest.importorskip("e2cnn")
    for module in ("nn", "gspaces", "kernels.irreps_basis", "kernels.utils"):
        importlib.import_module(f"e2cnn.{module}")
    monkeypatch.setattr(package.kernels.irreps_basis.R2FlipsDiscreteRotationsSolution, "__hash__", object.__hash__)
    older = vars(np) | {"array": lambda values, copy=True: np.array(values, copy=copy or None)}
    monkeypatch.setattr(package.kernels.utils, "np", SimpleNamespace(**older))
    return package


@pytest.mark.parametrize("lifting", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.filterwarnings("ignore")
def test_filters_of_e2cnn_are_filters_of_ours(group, lifting, e2cnn):
    e2nn, gspaces = e2cnn.nn, e2cnn.gspaces
    torch.manual_seed(0)
    space = gspaces.Rot2dOnR2(4) if group == "C4" else gspaces.FlipRot2dOnR2(4)
    pixels, regular = e2nn.FieldType(space, [space.trivial_repr]), [space.regular_repr]
    source = e2nn.FieldType(space, 2 * ([space.trivial_repr] if lifting else regular))
    theirs = e2nn.R2Conv(source, e2nn.FieldType(space, 3 * regular), 5, bias=False).eval()

    def number(element):  # which of our elements does the same to an image
        image = torch.randn(1, 1, 5, 5)
        turned = e2nn.GeometricTensor(image, pixels).transform(element).tensor
        return next(g for g in range(order(group)) if torch.allclose(turned, transform(image, g), atol=1e-5))

    elements = list(space.testing_elements)
    theirs_first = space.fibergroup.elements
    assert sorted(map(number, elements)) == list(range(order(group)))
    planes = torch.tensor([theirs_first.index(e) for e in sorted(elements, key=number)])
    filters = theirs.expand_parameters()[0].detach().unflatten(0, (3, -1))[:, planes]
    bank = filters[:, 0] if lifting else filters[:, 0].unflatten(1, (2, -1))[:, :, planes]
    ours = (LiftingConv2d if lifting else GroupConv2d)(2, 3, 5, group, bias=False)
    with torch.no_grad():
        ours.weight.copy_(bank)
        images = torch.randn(2, source.size, 9, 9)
        expected = theirs(e2nn.GeometricTensor(images, source)).tensor.unflatten(1, (3, -1))[:, :, planes]
        inputs = images if lifting else images.unflatten(1, (2, -1))[:, :, planes]
        assert error(ours(inputs), expected) < 1e-6
