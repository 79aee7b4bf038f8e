import pytest
import torch

from lottery_callbacks import Pruning
from lottery_lightning.networks import RedundantDense


@pytest.mark.parametrize("relu", [True, False])
def test_forward_is_the_formula_and_all_weights_are_prunable(relu):
    network = RedundantDense([6, 5, 3], redundancy=4, relu=relu)
    assert {name: tuple(p.shape) for name, p in Pruning().prunable(network).items()} == {
        "copies.0.weight": (24, 1),
        "copies.1.weight": (20, 1),
        "layers.0.weight": (5, 24),
        "layers.1.weight": (3, 20),
    }
    images = torch.randn(7, 1, 2, 3)
    values = images.flatten(1)
    for number, (width, outputs) in enumerate([(6, 5), (5, 3)]):
        u, v = network.copies[number].weight.view(width, 4), network.layers[number].weight.view(outputs, width, 4)
        values = values.clamp(min=0) if number else values
        hidden = torch.einsum("bj,jr->bjr", values, u)
        values = torch.einsum("bjr,ojr->bo", hidden.clamp(min=0) if relu else hidden, v)
    torch.testing.assert_close(network(images), values)


def test_without_the_relu_a_mask_of_products_makes_any_weight():
    network = RedundantDense([3, 2], redundancy=2, relu=False)
    with torch.no_grad():
        effective = (network.layers[0].weight.view(2, 3, 2) * network.copies[0].weight.view(1, 3, 2)).sum(2)
        values = torch.randn(4, 3)
        torch.testing.assert_close(network(values), values @ effective.T)


def test_variances_are_the_published_ones_and_the_seed_s():
    torch.manual_seed(0)
    network = RedundantDense([400, 300, 10], redundancy=5)
    assert network.copies[0].weight.var().item() == pytest.approx(2, rel=0.1)
    assert network.layers[0].weight.var().item() == pytest.approx(2 / 400, rel=0.02)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        network.reset_parameters()
        drawn.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).all()


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"widths=\[4\], redundancy=5 make no layer"):
        RedundantDense([4])
    with pytest.raises(ValueError, match="redundancy=0"):
        RedundantDense([4, 2], redundancy=0)
