import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from stranger import Functional
from torch import nn

from lottery_callbacks import strong_modules
from lottery_callbacks.functional.strong_certificate import Approximated
from lottery_callbacks.strong_network import strong_network
from lottery_lightning.networks import Dense, LeNet5


def drawn(network, seed=0):
    """The network with weights and biases of its own seed."""
    g = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        bound = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.data = bound * (2 * torch.rand(parameter.shape, generator=g) - 1)
    return network


def conv_chain():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, (3, 2), padding=(1, 1), dilation=(1, 2)), nn.ReLU(inplace=True)),
        nn.AvgPool2d(2, stride=1),
        nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(1, 2)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Identity(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


NETWORKS = {
    "dense": (lambda: Dense([6, 5, 4, 3]), (6,)),
    "lone": (lambda: nn.Linear(5, 3), (5,)),
    "lenet5": (lambda: LeNet5(), (1, 28, 28)),
    "functional": (lambda: Functional(), (2, 11, 11)),
    "chain": (conv_chain, (2, 7, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("known", ["any", "nonnegative"])
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_is_that_of_the_effective_network_and_near_the_target(name, known, monkeypatch):
    make, shape = NETWORKS[name]
    network = drawn(make()).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    ticket = strong_network(network, seed=5, n=16, size=3, inputs=known)
    ticket.verify()
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not list(ticket.parameters())
    values = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    values = values.abs() if known == "nonnegative" else values
    with torch.no_grad():
        single, wanted = ticket(values), network.eval()(values)
        assert (single - wanted).abs().max() < 0.1 * wanted.abs().max()
        double, exact = ticket.double()(values.double()), network.double()(values.double())
        target = approximation = values.double()
        for step in ticket._steps():
            layer = isinstance(step, Approximated)
            target = step.target(target) if layer else step(target)
            approximation = step.approximation(approximation) if layer else step(approximation)
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(approximation * math.prod(ticket.scales), double, rtol=0, atol=1e-12)
        torch.testing.assert_close(target * math.prod(ticket.scales), exact, rtol=0, atol=1e-12)
        monkeypatch.setattr(strong_modules, "HIDDEN", 1)  # one by one
        torch.testing.assert_close(ticket(values.double()), double, rtol=0, atol=1e-12)
    ticket.verify()  # float64 holds float32's values


@pytest.mark.parametrize("known", ["any", "nonnegative"])
def test_counts_density_and_records(known):
    network = drawn(Dense([12, 9, 7, 4]))
    ticket = strong_network(network, seed=0, n=21, size=3, inputs=known)
    weights, biases, signs = 12 * 9 + 9 * 7 + 7 * 4, 9 + 7 + 4, 2 if known == "any" else 1
    assert ticket.counts.second == 3 * (signs * weights + biases)
    assert ticket.random_parameters == sum(42 * (i + 1) * (i + 1 + o) for i, o in ((12, 9), (9, 7), (7, 4)))
    assert ticket.density == sum(ticket.counts) / ticket.random_parameters
    assert sum(ticket.counts) <= sum(layer.random.survivors_bound(3) for layer in ticket.strong)
    assert [layer.name for layer in ticket.strong] == ["hidden.0", "hidden.1", "output"]
    assert [layer.random.layer for layer in ticket.strong] == [0, 1, 2]
    assert {layer.random.inputs for layer in ticket.strong} == {known}
    for layer, scale, so_far in zip(
        (*network.hidden, network.output), ticket.scales, running(ticket.scales), strict=True
    ):
        largest = max(layer.weight.detach().abs().max() / scale, layer.bias.detach().abs().max() / so_far)
        assert float(largest) == pytest.approx(0.5)
    assert f"scale={ticket.scales[0]:.4g}" in repr(ticket)


def running(scales):
    return [math.prod(scales[: i + 1]) for i in range(len(scales))]


def test_values_are_known_to_be_nonnegative_only_behind_a_relu():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))
    known = [
        layer.random.inputs for layer in strong_network(network, seed=0, n=12, size=2, inputs="nonnegative").strong
    ]
    assert known == ["nonnegative", "any", "nonnegative"]


def test_gradients_flow_to_the_input():
    network = drawn(Dense([6, 5, 3]))
    ticket, values = strong_network(network, seed=0, n=30, size=4), torch.randn(2, 6, requires_grad=True)
    (slope,) = torch.autograd.grad(ticket(values).sum(), values)
    (wanted,) = torch.autograd.grad(network(values).sum(), values)
    torch.testing.assert_close(slope, wanted, rtol=0, atol=0.02)


def test_linear_on_more_dimensions():
    network = drawn(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2)))
    ticket, values = strong_network(network, seed=0, n=20, size=3), torch.randn(5, 2, 4)
    assert (ticket(values) - network(values)).abs().max() < 0.02
    found = ticket.searched_error(30, 2, shape=(2, 4)).value
    assert 0 < found <= ticket.certificate(shape=(2, 4)).value


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.integers(0, 1000),
    st.integers(4, 12),
    st.sampled_from([1, 2, None]),
    st.sampled_from(["any", "nonnegative"]),
    st.booleans(),
)
def test_found_is_at_most_certified(widths, seed, n, size, known, biased):
    network = drawn(Dense(widths, bias=biased), seed)
    ticket = strong_network(network, seed=seed, n=n, size=size, inputs=known)
    radius = 1.0 if seed % 3 else 7.0
    found = ticket.searched_error(20, 3, seed=seed, radius=radius)
    certified = ticket.certificate(behind_relu=seed % 2 == 1, radius=radius)
    assert found.value <= certified.value * (1 + 1e-9) + 1e-14
    assert (found.norms, found.radius) == (certified.norms, certified.radius)
    assert found.normalised <= certified.normalised * (1 + 1e-9) + 1e-14
    values = torch.randn(50, widths[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = radius * F.normalize(values.abs() if known == "nonnegative" else values)
    with torch.no_grad():
        away = (ticket.double()(values) - network.double()(values)).norm(dim=1).max() / math.prod(ticket.scales)
    assert away <= certified.value * (1 + 1e-9) + 1e-13


@pytest.mark.parametrize("name", ["functional", "chain"])
@pytest.mark.parametrize("seed", range(3))
def test_found_is_at_most_certified_with_convolutions(name, seed):
    make, shape = NETWORKS[name]
    ticket = strong_network(drawn(make(), seed), seed=seed, n=8, size=2)
    found, certified = ticket.searched_error(30, 3, shape, seed), ticket.certificate(shape)
    assert 0 < found.value <= certified.value
    assert found.norms == certified.norms
    with pytest.raises(ValueError, match=r"is a convolution.*`shape`"):
        ticket.certificate()


def test_the_certificate_without_biases_is_the_formula():
    ticket = strong_network(drawn(Dense([7, 6, 5, 4], bias=False)), seed=0, n=12, size=3)
    norms, deltas = [], []
    for layer, (weight, _) in zip(ticket.strong, ticket._targets, strict=True):
        positive, negative, _ = layer.edges.effective(layer.random.shape)
        norms.append(float(torch.linalg.matrix_norm(weight, 2)))
        deltas.append(float(torch.linalg.matrix_norm(torch.cat([positive - weight, negative + weight], 1), 2)))
    terms = [
        delta * math.prod(norm + d for norm, d in zip(norms[:i], deltas[:i], strict=True)) * math.prod(norms[i + 1 :])
        for i, delta in enumerate(deltas)
    ]
    assert ticket.certificate().value == pytest.approx(sum(terms), rel=1e-9)
    assert ticket.certificate().normalised == pytest.approx(sum(terms) / math.prod(norms), rel=1e-9)
    assert ticket.searched_error().value <= ticket.certificate(behind_relu=True).value < ticket.certificate().value


def test_ascent_finds_the_worst_input_of_a_layer():
    ticket = strong_network(drawn(nn.Linear(6, 5, bias=False)), seed=0, n=8, size=2)
    worst = ticket.certificate().value  # exact only if the singular vector splits by sign
    positive, negative, _ = ticket.strong[0].edges.effective((5, 6))
    weight = ticket._targets[0][0]
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 6)
    errors = torch.stack([(positive - weight) * c - (negative + weight) * (1 - c) for c in corners])
    exact = max(signed_norm(error, c) for error, c in zip(errors, corners, strict=True))
    found = ticket.searched_error(400, 64).value
    assert found == pytest.approx(exact, rel=1e-3)
    assert exact <= worst


def signed_norm(error, corner):
    """The most of |error x| over unit x in the orthant of the corner, by projected power iteration."""
    sign = 2 * corner - 1
    x = F.normalize(torch.rand(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    matrix = error * 1.0
    for _ in range(300):
        x = F.normalize((x * 1.0 + 20 * (x * sign) @ matrix.T @ matrix * sign).clamp(min=0), dim=1)
    return float(((x * sign) @ matrix.T).norm(dim=1).max())


def test_any_changed_weight_is_found_and_its_layer_named():
    ticket = strong_network(drawn(Dense([6, 5, 3])), seed=0, n=12, size=2)
    ticket.strong[1].second[3] = torch.nextafter(ticket.strong[1].second[3], torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="output: second-layer weights are not the random ones"):
        ticket.verify()


def test_progress_counts_all_layers():
    calls = []
    strong_network(Dense([6, 5, 3]), seed=0, n=6, size=2, progress=lambda *call: calls.append(call))
    total = 2 * (30 + 15) + 8
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    assert {whole for _, whole in calls} == {total}


def test_weights_that_are_not_finite_are_named():
    network = Dense([4, 3, 2])
    network.hidden[0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"hidden.0 has weights that are not finite"):
        strong_network(network, seed=0, n=4, size=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    network, values = drawn(LeNet5()), torch.randn(3, 1, 28, 28)
    ticket, there = (strong_network(net, seed=0, n=12, size=2) for net in (network, drawn(LeNet5()).cuda()))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(ticket.buffers(), there.buffers(), strict=True))
    there.verify()
    torch.testing.assert_close(there(values.cuda()).cpu(), ticket(values), rtol=1e-3, atol=1e-3)
    assert there.certificate((1, 28, 28)).value == pytest.approx(ticket.certificate((1, 28, 28)).value)


def test_inputs_of_another_width_are_refused():
    ticket = strong_network(drawn(nn.Sequential(nn.Linear(4, 3))), seed=0, n=8, size=2)
    with pytest.raises(ValueError, match=r"0 takes values of 4 inputs or channels, not \[3, 7\]"):
        ticket(torch.rand(3, 7))
    ticket = strong_network(drawn(nn.Sequential(nn.Conv2d(1, 3, 3))), seed=0, n=8, size=2)
    with pytest.raises(
        ValueError, match=r"0 takes values of 4 dimensions and 1 inputs or channels, not \[2, 3, 8, 8\]"
    ):
        ticket(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"0 takes values of 4 dimensions and 1 inputs .* not \[1, 8, 8\]"):
        ticket(torch.rand(1, 8, 8))


def test_a_ticket_that_relies_on_inputs_above_0_refuses_others():
    ticket = strong_network(drawn(Dense([4, 3, 2])), seed=0, n=12, size=2, inputs="nonnegative")
    ticket(torch.rand(5, 4))
    with pytest.raises(ValueError, match="build it with inputs='any'"):
        ticket(torch.rand(5, 4) - 0.5)


def test_the_ticket_has_no_hook_of_the_target_and_changes_no_input():
    network = drawn(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3), nn.ReLU()))
    calls = []
    network[2].register_forward_hook(lambda *_: calls.append(1))
    ticket, values = strong_network(network, seed=0, n=8, size=2), torch.rand(5, 4) - 0.5
    before = values.clone()
    ticket(values)
    assert values.equal(before)
    assert calls == []
    assert ticket.searched_error(steps=3, restarts=2).value <= ticket.certificate().value


def test_float64_and_bf16_values_are_answered_in_their_own_type():
    for dtype in (torch.float64, torch.bfloat16):
        network = drawn(Dense([4, 3, 2])).to(dtype)
        ticket, values = strong_network(network, seed=0, n=30, size=3), torch.rand(5, 4).to(dtype)
        assert ticket(values).dtype == dtype
        torch.testing.assert_close(ticket(values), network(values), atol=0.05, rtol=0)


def test_one_input_and_integers_are_answered_too():
    network = drawn(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    ticket, values = strong_network(network, seed=0, n=30, size=3), torch.tensor([[3, 1, 0, 2]])
    assert ticket(values).dtype == torch.float32
    assert ticket(values[0].float()).equal(ticket(values.float())[0])
    torch.testing.assert_close(ticket(values), network(values.float()), atol=0.05, rtol=0)


def test_a_convolution_of_which_nothing_is_kept_gives_zeros_of_the_right_shape():
    network = drawn(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(3, 1, 1)))
    ticket = strong_network(network, seed=0, n=10, tolerance=0.6)
    assert ticket(torch.rand(1, 2, 5, 5)).shape == (1, 1, 5, 5)
    assert ticket.strong[0](torch.rand(1, 2, 5, 5)).equal(torch.zeros(1, 3, 5, 5))


def test_an_error_beside_a_target_of_zeros_is_infinite_or_none():
    network = nn.Sequential(nn.Linear(3, 2, bias=False))
    nn.init.zeros_(network[0].weight)
    assert strong_network(network, seed=0, n=6).certificate().normalised == 0.0
    assert strong_network(network, seed=0, n=6, size=1).certificate().normalised == math.inf
