import threading

import pytest
import torch
import torch.nn.functional as F
from stranger import Functional
from torch import Tensor, nn

from lottery_callbacks.chain_of import chain_of
from lottery_callbacks.strong_network import strong_network
from lottery_lightning.networks import Conv


class Viewed(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.layer, self.way = nn.Linear(8, 2), way

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(self.way(images))


def test_calls_are_the_modules_that_do_the_same():
    names = [(name, type(module)) for name, module in chain_of(Functional())]
    kinds = [nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert [kind for _, kind in names] == kinds
    assert [name for name, _ in names if "." in name or name == "head"] == ["body.a", "body.b", "head"]
    ways = [lambda x: x.view(x.size(0), -1), lambda x: x.reshape(-1, 8), lambda x: torch.flatten(x, 1)]
    ways += [lambda x: x.view((x.shape[0], 8)), lambda x: x.flatten(start_dim=1)]
    for way in ways:
        network = Viewed(way)
        ticket = strong_network(network, seed=0, n=20, size=3)
        assert (ticket(torch.ones(3, 2, 4)) - network(torch.ones(3, 2, 4))).abs().max() < 0.1
    assert len(chain_of(Conv(2))) == 11


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        return self.outer(values + self.inner(values))


class Branch(Residual):
    def forward(self, values: Tensor) -> Tensor:
        self.inner(values)
        return self.outer(values)


class Conditional(Residual):
    def forward(self, values: Tensor) -> Tensor:
        return self.inner(values) if values.sum() > 0 else values


class Scaled(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        return F.linear(values, 2 * self.weight, self.bias)


REFUSED = {
    "1 .BatchNorm1d. cannot be folded": nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)),
    "2 .BatchNorm1d. cannot be folded": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)),
    "1 .BatchNorm2d. .* have running statistics": nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "1 .AdaptiveMaxPool2d. cannot": nn.Sequential(nn.Conv2d(4, 4, 3), nn.AdaptiveMaxPool2d(3)),
    "1 .BatchNorm1d. .* of 3 outputs": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3)),
    "1 .BatchNorm2d. cannot be folded": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(4)),
    "1 .BatchNorm1d. cannot be folded: ": nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm1d(4)),
    "0 .Conv2d. cannot": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    "0 .ParametrizedLinear. has parametrizations": nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    ),
    "view.* cannot be treated": Viewed(lambda x: x.view(x.size(1), -1)),
    "view.-1, 5. is followed by no Linear": Viewed(lambda x: x.view(-1, 5)),
    "layer .Scaled. uses its weights in its own way": Viewed(lambda x: x),
    "amax .amax. cannot be treated": Viewed(lambda x: x.amax(1)),
    "1.0 .LeakyReLU. cannot be treated": nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LeakyReLU())),
    "0 .Conv2d. cannot be treated": nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)),
    "0 .Flatten. cannot be treated": nn.Sequential(nn.Flatten(0), nn.Linear(4, 4)),
    "sigmoid .sigmoid. cannot be treated": Viewed(torch.sigmoid),
    "mean .mean. cannot be treated": Viewed(lambda x: x.mean(1)),
    "view .view. cannot be treated": Viewed(lambda x: x.view(2, -1)),
    "reshape .reshape. cannot be treated": Viewed(lambda x: x.reshape(-1, 2, 4)),
    "max_pool2d.* cannot be treated": Viewed(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "dropout .dropout. cannot be treated": Viewed(lambda x: F.dropout(x)),
    "add does not take": Residual(),
    "outer does not take": Branch(),
    "Conditional cannot be traced": Conditional(),
    "Sequential has no layer": nn.Sequential(nn.ReLU()),
}


REFUSED["layer .Scaled. uses its weights in its own way"].layer = Scaled(8, 2)


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_treated_is_named(message):
    with pytest.raises(ValueError, match=message):
        strong_network(REFUSED[message], seed=0, n=4, size=1)


def test_tracing_leaves_nothing_in_the_target():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls, self.last, self.seen = nn.Linear(4, 3), 0, None, []
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, values):
            self.calls += 1
            self.passes += 1
            self.last = self.layer(values)
            self.seen.append(values)
            return self.last

    network = Counts()
    strong_network(network, seed=0, n=8, size=2)
    assert (network.calls, network.last, network.seen, float(network.passes)) == (0, None, [], 0.0)


def test_what_is_returned_shares_no_hook_buffer_or_mode_with_the_target():
    class Pool(nn.Module):
        lipschitz = 1.0

        def __init__(self):
            super().__init__()
            self.pool = nn.MaxPool2d(2)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, values: Tensor) -> Tensor:
            return self.pool(values)

    network, calls, lock = (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), Pool(), nn.MaxPool2d(1)),
        [],
        threading.Lock(),
    )
    network[0].register_forward_hook(lambda *_: calls.append(lock))  # a lock cannot be copied
    network[4].register_forward_hook(lambda *_: calls.append(lock))
    network[4].register_full_backward_hook(lambda *_: calls.append(lock))
    ticket = strong_network(network, seed=0, n=8, size=2).double()
    ticket(torch.rand(1, 1, 6, 6))
    ticket.searched_error(1, 1, shape=(1, 6, 6))
    assert calls == []
    assert network[3].pool.training
    assert network[3].scale.dtype == torch.float32
    assert [parameter.requires_grad for parameter in network.parameters()] == [True] * 4


def test_a_compiled_network_is_the_one_inside():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    assert chain_of(torch.compile(network))[0][1] is network[0]


def test_a_weight_that_a_hook_sets_is_refused_and_a_permanent_one_is_not():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    torch.nn.utils.prune.l1_unstructured(network[0], "weight", 0.3)
    with pytest.raises(ValueError, match=r"0 \(Linear\) has a weight that a hook sets"):
        strong_network(network, seed=0, n=8, size=2)
    torch.nn.utils.prune.remove(network[0], "weight")
    strong_network(network, seed=0, n=8, size=2).verify()


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm1d, (4,)), (nn.BatchNorm2d, (4, 6, 6))])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_is_folded_into_the_layer_before(norm, shape, affine):
    layer = nn.Linear(4, 3, bias=False) if len(shape) == 1 else nn.Conv2d(4, 3, 3)
    network = nn.Sequential(layer, norm(3, affine=affine, eps=0.1), nn.ReLU())
    for _ in range(3):
        network(torch.randn(8, *shape) * 3 + 1)
    if affine:
        nn.init.normal_(network[1].weight)
        nn.init.normal_(network[1].bias)
    chain = chain_of(network)
    assert [name for name, _ in chain] == ["0", "2"]
    values, before = torch.randn(5, *shape).double(), layer.weight.clone()
    torch.testing.assert_close(
        nn.Sequential(*(module for _, module in chain))(values), network.eval().double()(values), rtol=0, atol=1e-12
    )
    assert layer.weight.equal(before.double())
    ticket = strong_network(network, seed=0, n=30, size=3)
    assert ticket.weights == layer.weight.numel() + 3
    with torch.no_grad():
        assert (ticket(values) - network(values)).abs().max() < 0.02 * network(values).abs().max()


@pytest.mark.parametrize("way", [lambda x: x.amax((2, 3)), lambda x: torch.amax(x, [-1, -2], keepdim=True).flatten(1)])
def test_the_maximum_over_places_is_a_pooling(way):
    network = nn.Sequential(nn.Conv2d(2, 3, 3), Maximum(way))
    values = torch.randn(4, 2, 6, 5)
    assert nn.Sequential(*(module for _, module in chain_of(network)))(values).equal(network(values))


class Maximum(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, values: Tensor) -> Tensor:
        return self.way(values)


def test_a_layer_of_another_package_takes_part_by_what_it_declares():
    class Magnitude(nn.Module):
        lipschitz = 1.0

        def forward(self, values: Tensor) -> Tensor:
            return values.abs()

    network = nn.Sequential(nn.Linear(3, 3), Magnitude(), nn.ReLU(), nn.Linear(3, 2))
    nn.init.uniform_(network[0].weight, -4, 4)
    assert isinstance(chain_of(network)[1][1], Magnitude)
    ticket, values = strong_network(network, seed=0, n=30, size=3), torch.randn(50, 3)
    assert (ticket(values) - network(values)).abs().max() < 0.02 * network(values).abs().max()
    assert 0 < ticket.searched_error(50, 4).value <= ticket.certificate().value
    del Magnitude.lipschitz
    with pytest.raises(ValueError, match=r"abs.* cannot be treated"):
        chain_of(network)


def test_a_constant_says_nothing_of_a_module_with_weights():
    class Block(nn.Module):
        lipschitz = 1.0

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, values: Tensor) -> Tensor:
            return self.inner(values).relu()

    ticket = strong_network(nn.Sequential(Block(), nn.Linear(3, 2)), seed=0, n=8, size=2)
    assert [layer.name for layer in ticket.strong] == ["0.inner", "1"]
    assert not list(ticket.parameters())


def test_a_norm_after_a_linear_is_one_of_its_outputs_for_flat_values_alone():
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    ticket = strong_network(network, seed=0, n=8, size=2)
    assert ticket(torch.rand(2, 4)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"0 takes values of 2 dimensions and 4 inputs or channels, not \[2, 3, 4\]"):
        ticket(torch.rand(2, 3, 4))
