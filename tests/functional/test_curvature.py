"""Products with Hessian and GGN against dense matrices, over unequal batches, under masks, and without a trace."""

import builtins
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks.functional.curvature import Curvature

DOUBLE = torch.float64


def seed(number=0):
    return torch.Generator().manual_seed(number)


# ---- networks, and their dense matrices


def mlp(dtype=DOUBLE):
    """Linear, BatchNorm with statistics of its own, Tanh, Dropout, Linear: 43 parameters, in train mode."""
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in network.parameters():
            nn.init.normal_(parameter)
        network[1].running_mean.normal_()
        network[1].running_var.uniform_(0.5, 2)
    return network.to(dtype)


def batches(sizes=(7, 4, 1), shape=(4,), dtype=DOUBLE):
    generator = seed(2)
    return [
        (torch.randn(n, *shape, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def joined(pairs):
    return tuple(torch.cat(tensors) for tensors in zip(*pairs, strict=True))


def as_function(network, inputs):
    """The outputs in eval mode as a function of the flat parameters, and these."""
    named = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def outputs(flat):
        parts = flat.split([p.numel() for p in named.values()])
        weights = {n: part.view_as(p) for (n, p), part in zip(named.items(), parts, strict=True)}
        return functional_call(network, weights, (inputs,))

    return outputs, torch.cat([p.reshape(-1) for p in named.values()])


def dense(network, pairs, kind="hessian", loss=F.cross_entropy):
    """d2L / dw2, of torch.func, or J' (d2L / df2) J, for one large batch."""
    inputs, targets = joined(pairs)
    training = network.training
    network.eval()
    outputs, flat = as_function(network, inputs)
    if kind == "ggn":
        jacobian = torch.autograd.functional.jacobian(outputs, flat).flatten(0, -2)
        at = outputs(flat)
        curved = hessian(lambda f: loss(f.view_as(at), targets))(at.reshape(-1))
        found = jacobian.T @ curved @ jacobian
    else:
        found = hessian(lambda weights: loss(outputs(weights), targets))(flat)
    network.train(training)
    return found


def matrix_of(operator):
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def some_masks(network):
    generator = seed(3)
    return {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in network.named_parameters() if p.ndim > 1}


def kept_of(network, masks):
    ones = ((n, masks.get(n, torch.ones_like(p, dtype=torch.bool))) for n, p in network.named_parameters())
    return torch.cat([mask.reshape(-1) for _, mask in ones])


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("masked", [False, True])
def test_batches_of_unequal_size_give_the_dense_matrix_of_one_large_batch_on_the_kept_coordinates(kind, masked):
    network, pairs = mlp(), batches()
    masks = some_masks(network) if masked else {}
    operator = Curvature(network, pairs, kind=kind, masks=masks)
    kept = kept_of(network, masks)
    expected = dense(network, pairs, kind)[kept][:, kept]
    assert operator.shape == expected.shape
    assert (operator.examples, operator.sizes["1.weight"], sum(operator.sizes.values())) == (12, 4, kept.sum())
    torch.testing.assert_close(matrix_of(operator), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(operator @ torch.ones(len(expected)).double(), expected.sum(1), rtol=1e-10, atol=1e-12)
    assert operator.products == len(expected) + 1
    assert masked == bool((~kept).any())


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_named_parameters_give_their_diagonal_block(kind):
    network, pairs = mlp(), batches()
    masks = some_masks(network)
    whole, kept = dense(network, pairs, kind), kept_of(network, masks)
    parameters = dict(network.named_parameters())
    chosen = {name: parameters[name] for name in ("4.weight", "0.bias")}  # another order than the network's
    chosen["4.weight"].requires_grad_(False)  # named, and so differentiated by
    places = torch.cat([torch.arange(28, 40)[masks["4.weight"].reshape(-1)], torch.arange(16, 20)])
    assert kept[places].all()
    found = matrix_of(Curvature(network, pairs, kind=kind, masks=masks, parameters=chosen))
    torch.testing.assert_close(found, whole[places][:, places], rtol=1e-10, atol=1e-12)
    assert "4.weight" not in Curvature(network, pairs, kind=kind).sizes
    assert not chosen["4.weight"].requires_grad


class Sequence(nn.Module):
    """Any layer on sequences [batch, 6, 4] between two linear ones."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), layer, nn.Linear(4, 3)

    def forward(self, inputs):
        found = self.layer(self.first(inputs))
        return self.last((found[0] if isinstance(found, tuple) else found).mean(1))


LAYERS = {
    "layer norm": lambda: nn.LayerNorm(4),
    "instance norm": lambda: nn.InstanceNorm1d(6, affine=True),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, activation="gelu"),
    "convolution": lambda: nn.Sequential(nn.Conv1d(6, 5, 2), nn.MaxPool1d(2, 1, 1), nn.Softplus()),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_whose_fast_kernels_have_no_second_derivative_or_a_wrong_one(name, kind):
    network = Sequence(LAYERS[name]())
    pairs = batches((3, 2), (6, 4), torch.float32)
    sloppy = Curvature(network, pairs, kind=kind)
    vectors = torch.randn(sloppy.shape[0], 3, generator=seed())
    sloppy = sloppy @ vectors  # of kernels of its own, for LSTM
    network.double()
    pairs, vectors = [(inputs.double(), labels) for inputs, labels in pairs], vectors.double()
    found = Curvature(network, pairs, kind=kind) @ vectors
    if kind == "ggn":
        expected = dense(network, pairs, kind) @ vectors
    else:  # by central differences, since torch.func.hessian is wrong here too
        inputs, targets = joined(pairs)
        outputs, flat = as_function(network.eval(), inputs)
        gradient = grad(lambda weights: F.cross_entropy(outputs(weights), targets))
        steps = 1e-5 * vectors.T
        expected = torch.stack([gradient(flat + step) - gradient(flat - step) for step in steps], 1) / 2e-5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sloppy.double(), found, rtol=1e-3, atol=1e-4)


def test_the_hessian_is_that_of_curvlinops_where_torch_differentiates_twice_rightly():
    curvlinops = pytest.importorskip("curvlinops")
    network, pairs = mlp().eval(), batches()
    theirs = curvlinops.HessianLinearOperator(network, nn.CrossEntropyLoss(), list(network.parameters()), pairs)
    vectors = torch.randn(43, 2, generator=seed(), dtype=DOUBLE)
    torch.testing.assert_close(Curvature(network, pairs) @ vectors, theirs @ vectors, rtol=1e-10, atol=1e-12)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 1)
        self.other.weight = self.one.weight

    def forward(self, inputs):
        return self.other(self.one(inputs).tanh())


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_tied_parameters_are_one_and_unused_ones_are_flat(kind):
    network, pairs = Tied().double(), batches()
    found = matrix_of(Curvature(network, pairs, kind=kind))
    assert found.shape == (16 + 4 + 4 + 3, 27)
    torch.testing.assert_close(found, dense(network, pairs, kind), rtol=1e-10, atol=1e-12)
    assert not found[-3:].any()


def test_a_network_that_is_compiled_is_multiplied_eagerly():
    network, pairs = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double(), batches()
    compiled = torch.compile(network, backend="eager")
    parameters = dict(network.named_parameters())
    for kind in ("hessian", "ggn"):
        found = matrix_of(Curvature(compiled, pairs, kind=kind, parameters=parameters))
        assert torch.equal(found, matrix_of(Curvature(network, pairs, kind=kind)))


def smooth(outputs, targets):
    return F.softplus(outputs).mul(targets.unsqueeze(1)).mean()


LOSSES = {
    "weights and ignored labels": nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 5.0, 0.5]).double(), ignore_index=1, label_smoothing=0.1
    ),
    "ignored labels": nn.CrossEntropyLoss(ignore_index=2),
    "squares": nn.MSELoss(),
    "binary": nn.BCEWithLogitsLoss(),
    "a function": smooth,
}


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_loss_is_averaged_over_batches_as_over_one_large_one(name, kind):
    network, pairs, loss = mlp(), batches((5, 3)), LOSSES[name]
    if name in ("squares", "binary"):
        pairs = [(inputs, inputs[:, :3].sigmoid()) for inputs, _ in pairs]
    found = matrix_of(Curvature(network, pairs, loss, kind))
    torch.testing.assert_close(found, dense(network, pairs, kind, loss), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_loss_that_is_linear_in_the_weights_has_no_curvature(kind):
    assert not matrix_of(Curvature(nn.Linear(4, 3), batches(dtype=torch.float32), first, kind)).any()


class Quadratic(nn.Module):
    """Outputs w'Aw / 2 for each input, times it: the Hessian of their mean is A times the mean input."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix
        self.weight = nn.Parameter(torch.ones(len(matrix), dtype=matrix.dtype))

    def forward(self, inputs):
        return inputs * (self.weight @ self.matrix @ self.weight) / 2


def first(outputs, targets):
    return outputs.mean()


def test_a_quadratic_has_its_own_matrix_and_sums_over_batches_are_double():
    random = torch.randn(4, 4, generator=seed(), dtype=DOUBLE)
    matrix = random + random.T
    data = [(torch.tensor([value], dtype=DOUBLE), torch.zeros(1)) for value in (2.0, 1.0, 6.0)]
    found = matrix_of(Curvature(Quadratic(matrix), data, first))
    torch.testing.assert_close(found, 3 * matrix)
    data = [(torch.tensor([value]), torch.zeros(1)) for value in (1e9, 3.0, -1e9)]
    found = matrix_of(Curvature(Quadratic(torch.eye(2)), data, first))
    assert torch.equal(found, torch.eye(2))  # in float32 the 3 would be lost


def test_nothing_is_left_behind(global_rng):
    network, data = mlp(torch.float32), batches(dtype=torch.float32)
    network.append(nn.TransformerEncoderLayer(3, 1, 4, batch_first=True))
    network[0].weight.grad = torch.ones(4, 4)
    network[4].bias.requires_grad_(False)
    network[2].eval()
    loader = DataLoader(TensorDataset(*joined(data)), batch_size=5, shuffle=True)

    def state():
        tensors = {name: tensor.clone().numpy().tobytes() for name, tensor in network.state_dict().items()}
        gradients = {n: None if p.grad is None else p.grad.tolist() for n, p in network.named_parameters()}
        flags = [p.requires_grad for p in network.parameters()], [part.training for part in network.modules()]
        kernels = torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()
        return tensors, gradients, flags, kernels, global_rng()

    torch.backends.mha.set_fastpath_enabled(True)  # as it is by default
    before = state()
    for kind in ("hessian", "ggn"):
        operator = Curvature(network, loader, kind=kind)
        vector = torch.ones(operator.shape[0])
        with torch.no_grad():
            product = operator @ vector
        assert torch.equal(product, operator @ vector)  # the data are the same, though the loader shuffles
        assert not product.requires_grad
        assert torch.equal(vector, torch.ones(operator.shape[0]))
    assert state() == before


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs):
        return F.dropout(self.linear(inputs).sin(), 0.5, training=True)


def test_a_network_that_draws_in_eval_mode_is_one_matrix():
    found = matrix_of(operator := Curvature(Drawing().double(), batches()))
    assert torch.equal(found, matrix_of(operator))
    torch.testing.assert_close(found, found.T)
    assert found.any()


def test_a_named_number_of_batches_is_read_of_a_loader():
    network, pairs = mlp(), batches()
    read = []

    def loader():
        for pair in pairs:
            read.append(len(pair[1]))
            yield pair

    operator = Curvature(network, loader(), count=2)
    assert (operator.examples, read) == (11, [7, 4])
    torch.testing.assert_close(matrix_of(operator), dense(network, pairs[:2]), rtol=1e-10, atol=1e-12)


def test_vectors_become_tensors_of_the_parameters():
    network = mlp()
    masks = some_masks(network)
    operator = Curvature(network, batches(), masks=masks)
    named = operator.unflatten(torch.arange(1.0, operator.shape[0] + 1), math.inf)
    assert [tuple(tensor.shape) for tensor in named.values()] == [tuple(p.shape) for p in network.parameters()]
    assert all(torch.equal(named[name].isfinite(), mask) for name, mask in masks.items())
    flat = torch.cat([tensor.reshape(-1) for tensor in named.values()])
    assert flat[flat.isfinite()].tolist() == list(range(1, operator.shape[0] + 1))
    assert operator.unflatten(torch.ones(operator.shape[0]))["0.weight"].sum() == masks["0.weight"].sum()


def wrong(**options):
    network = options.pop("network", None) or mlp()
    return Curvature(network, **{"batches": batches()} | options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wrong(kind="fisher"), "kind='fisher' is not known: choose hessian or ggn"),
        (lambda: wrong(batches=[]), "there is no example to differentiate on: give a loader"),
        (lambda: wrong(batches=[torch.ones(2, 4)]), r"a batch is a Tensor, not \(inputs, targets\)"),
        (lambda: wrong(batches=[(torch.ones(1), 3)]), r"a batch is a tuple, not \(inputs, targets\)"),
        (lambda: wrong(loss=nn.MSELoss(reduction="sum")), r"MSELoss\(\) is no mean over a batch: give it reduction"),
        (lambda: wrong(network=mlp().half()), "0.weight is torch.float16, too coarse for second derivatives"),
        (lambda: wrong(network=nn.Sequential(mlp(), nn.Linear(3, 3))), "1.weight is torch.float32 on cpu, and others"),
        (lambda: wrong(masks={"0.weight": torch.ones(4) > 0}), r"the mask of 0.weight is \(4,\), and it is \(4, 4\)"),
        (lambda: wrong(masks={"net.0.weight": torch.ones(4, 4) > 0}), "the mask net.0.weight is of no parameter"),
        (lambda: wrong(parameters={"a": nn.Parameter(torch.ones(1))}), "a is no parameter of the network"),
        (lambda: wrong(parameters={}), "there is no parameter to differentiate by"),
        (lambda: wrong(masks={n: p < -99 for n, p in mlp().named_parameters()}), "the masks keep no coordinate"),
    ],
)  # fmt: skip
def test_what_fits_not_is_named_with_its_mend(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_curvlinops_one_line_says_what_to_install_and_the_hessian_needs_none(monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "curvlinops":
            raise ModuleNotFoundError("No module named 'curvlinops'", name="curvlinops")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ModuleNotFoundError, match=r'needs curvlinops: pip install "lottery-lightning\[curvature\]"'):
        wrong(kind="ggn")
    assert matrix_of(wrong()).shape == (43, 43)
