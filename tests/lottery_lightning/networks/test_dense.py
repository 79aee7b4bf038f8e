import pytest
import torch

from lottery_lightning.networks import Dense


def counts(network):
    """Numbers of weights and of biases."""
    sizes = [(name.endswith("bias"), p.numel()) for name, p in network.named_parameters()]
    return sum(n for bias, n in sizes if not bias), sum(n for bias, n in sizes if bias)


@pytest.mark.parametrize(
    ("widths", "bias", "expected"),
    [
        ([784, 300, 100, 10], True, (266_200, 410)),
        ([784, 500, 10], False, (397_000, 0)),
        ([64, 10], True, (640, 10)),
    ],
)
def test_the_papers_networks_have_their_parameter_counts(widths, bias, expected):
    assert counts(Dense(widths, bias=bias)) == expected


def test_layers_are_named_hidden_and_output():
    assert list(Dense([4, 3, 3, 2]).state_dict()) == [
        "hidden.0.weight", "hidden.0.bias", "hidden.1.weight", "hidden.1.bias", "output.weight", "output.bias",
    ]  # fmt: skip
    assert list(Dense([4, 2]).state_dict()) == ["output.weight", "output.bias"]


def test_images_of_any_shape_give_one_row_of_logits_each():
    network = Dense([12, 5, 7])
    flat = torch.randn(4, 12)
    assert network(flat).shape == (4, 7)
    assert torch.equal(network(flat.view(4, 3, 2, 2)), network(flat))


def test_hidden_layers_are_rectified_and_the_output_is_not():
    torch.manual_seed(0)
    network = Dense([3, 4, 4, 2])
    x = torch.randn(6, 3)
    (w0, b0), (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in [*network.hidden, network.output])
    expected = ((x @ w0.T + b0).clamp(min=0) @ w1.T + b1).clamp(min=0) @ w2.T + b2
    torch.testing.assert_close(network(x), expected)
    assert (expected < 0).any()


@pytest.mark.parametrize("widths", [[], [784]])
def test_widths_that_make_no_layer_are_refused(widths):
    with pytest.raises(ValueError, match=r"^widths=\[.*\] makes no layer: give input and output, as in \[784, 300"):
        Dense(widths)


def test_widths_may_be_a_tuple_and_are_not_changed():
    widths = [6, 5, 4]
    Dense(widths)
    assert widths == [6, 5, 4]
    assert counts(Dense((6, 5, 4))) == (50, 9)


def test_the_seed_decides_the_weights_and_reset_parameters_redraws_all_of_them():
    torch.manual_seed(0)
    one = Dense([20, 10, 5])
    torch.manual_seed(0)
    two = Dense([20, 10, 5])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    one.reset_parameters()
    for (name, redrawn), first in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(redrawn, first) == name.endswith("bias"), name
    with torch.no_grad():
        one.output.bias.fill_(3.0)
    one.reset_parameters()
    assert (one.output.bias == 0).all()
