import pytest
import torch

from lottery_lightning.networks import MeanField


def test_the_output_is_the_mean_over_signed_units():
    torch.manual_seed(0)
    network = MeanField(6, 5, classes=3)
    images = torch.randn(4, 2, 3)
    units = [network.signs[:, i] * torch.relu(images.flatten(1) @ network.hidden.weight[i])[:, None] for i in range(5)]
    torch.testing.assert_close(network(images), torch.stack(units).mean(0))
    assert set(network.signs.unique().tolist()) == {-1.0, 1.0}
    assert [name for name, _ in network.named_parameters()] == ["hidden.weight"]


def test_the_gradient_is_width_times_that_of_the_output():
    torch.manual_seed(0)
    network = MeanField(6, 8).double()
    images, towards = torch.randn(4, 6).double(), torch.randn(4, 10).double()
    (network(images) * towards).sum().backward()
    weight = network.hidden.weight.detach().requires_grad_()
    plain = (images @ weight.T).relu() @ network.signs.T / 8
    (plain * towards).sum().backward()
    torch.testing.assert_close(network.hidden.weight.grad, 8 * weight.grad)


def test_wider_networks_have_equal_units_and_smaller_outputs():
    torch.manual_seed(0)
    images = torch.randn(50, 100)
    narrow, wide = MeanField(100, 100), MeanField(100, 10_000)
    for network in (narrow, wide):
        assert network.hidden.weight.std().item() == pytest.approx(0.1, rel=0.05)
        assert abs(network.signs.mean()) < 0.1
    assert wide(images).std().item() == pytest.approx(narrow(images).std().item() / 10, rel=0.3)


def test_a_reset_redraws_weights_and_signs_from_the_global_state():
    network = MeanField(6, 5)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        network.reset_parameters()
        states.append([tensor.clone() for tensor in network.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(states[0], states[1], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(states[0], states[2], strict=True))


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="inputs=6, width=0, classes=10: all must be positive"):
        MeanField(6, 0)
