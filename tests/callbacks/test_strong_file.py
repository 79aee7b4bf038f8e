import pytest
import safetensors.torch
import torch
from torch import nn

from lottery_callbacks import load_strong_ticket, save_strong_ticket, strong_network
from lottery_lightning.networks import Dense, LeNet5


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    network = Dense([12, 8, 5])
    with torch.no_grad():
        network.output.bias.uniform_(-0.3, 0.3)
    return network


@pytest.mark.parametrize("question", [{"size": 2}, {}, {"tolerance": 0.1}, {"size": 2, "inputs": "nonnegative"}])
def test_a_loaded_ticket_is_the_saved_one_bit_for_bit(tmp_path, dense, question):
    ticket = strong_network(dense, seed=3, n=10, **question)
    path = save_strong_ticket(ticket, tmp_path / "tickets" / "a.safetensors")
    again = load_strong_ticket(path, dense)
    inputs = torch.rand(6, 12)
    assert again(inputs).equal(ticket(inputs))
    assert again.counts == ticket.counts
    assert again.scales == ticket.scales
    assert again.density == ticket.density
    for one, other in zip(again.tickets, ticket.tickets, strict=True):
        torch.testing.assert_close(one.errors, other.errors, rtol=0, atol=1e-12)
        torch.testing.assert_close(one.bias_errors, other.bias_errors, rtol=0, atol=1e-12)
    assert again.certificate().value == pytest.approx(ticket.certificate().value, rel=1e-9)
    assert save_strong_ticket(again, tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_the_network_gives_the_architecture_alone(tmp_path, dense):
    ticket = strong_network(dense, seed=3, n=10, size=2)
    path = save_strong_ticket(ticket, tmp_path / "a.safetensors")
    inputs = torch.rand(6, 12)
    assert load_strong_ticket(path, Dense([12, 8, 5]))(inputs).equal(ticket(inputs))


def test_a_convolutional_ticket_comes_back(tmp_path):
    torch.manual_seed(1)
    network, images = LeNet5(), torch.rand(2, 1, 28, 28)
    ticket = strong_network(network, seed=1, n=4, size=1)
    again = load_strong_ticket(save_strong_ticket(ticket, tmp_path / "a.safetensors"), network)
    assert again(images).equal(ticket(images))


def test_no_weight_is_in_the_file(tmp_path, dense):
    ticket = strong_network(dense, seed=3, n=10, size=2)
    path = save_strong_ticket(ticket, tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32}
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * ticket.counts.second + (
        ticket.counts.first + ticket.counts.constant
    )


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, dense):
    path = save_strong_ticket(strong_network(dense, seed=3, n=10, size=2), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"hidden\.0 as a matrix \[8, 12\] with 8 biases: the network's is \[8, 13\]"):
        load_strong_ticket(path, Dense([13, 8, 5]))
    with pytest.raises(ValueError, match="is a ticket of hidden"):
        load_strong_ticket(path, nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)))
    with pytest.raises(ValueError, match=r"\[8, 12\] with 8 biases: the network's is \[8, 12\] with 0"):
        load_strong_ticket(path, Dense([12, 8, 5], bias=False))
    with pytest.raises(ValueError, match="is missing or torn"):
        load_strong_ticket(tmp_path / "absent.safetensors", dense)
    (tmp_path / "torn.safetensors").write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is missing or torn"):
        load_strong_ticket(tmp_path / "torn.safetensors", dense)
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no ticket of format strong-ticket/2"):
        load_strong_ticket(tmp_path / "other.safetensors", dense)


@pytest.mark.parametrize(("key", "change"), [("0.places", 1), ("1.units", 1), ("0.outputs", 1)])
def test_a_changed_edge_is_found(tmp_path, dense, key, change):
    path = save_strong_ticket(strong_network(dense, seed=3, n=10, size=2), tmp_path / "a.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    tensors[key][0] += change
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises((ValueError, RuntimeError), match=r"not those that were saved|output|hidden"):
        load_strong_ticket(path, dense)


def test_a_ticket_that_relies_on_a_relu_is_refused_where_there_is_none(tmp_path):
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    path = save_strong_ticket(strong_network(network, seed=0, n=12, size=2, inputs="nonnegative"), tmp_path / "t")
    load_strong_ticket(path, network)
    with pytest.raises(ValueError, match="relies on inputs >= 0 of 2: no ReLU is before it"):
        load_strong_ticket(path, nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 2)))
