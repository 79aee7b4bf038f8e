import pytest
import torch

from lottery_callbacks import Pruning
from lottery_callbacks.functional.scopes import layerwise
from lottery_lightning.networks import Conv

# figure 2 and the densities quoted in arXiv 1803.03635 (papers.md 5(b)): level -> percent of the weights left
PAPER = {
    2: (4_300_992, 38_592, 0.1, {5: 33.0, 10: 11.0, 11: 8.8, 14: 4.6, 20: 1.3}),
    4: (2_425_024, 259_776, 0.1, {5: 35.6, 10: 13.3, 11: 11.1, 12: 9.2, 15: 5.4, 20: 2.3}),
    6: (2_261_184, 1_144_512, 0.15, {5: 38.7, 7: 26.6, 10: 15.3, 15: 6.2, 20: 2.5}),
}


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_counts_and_densities_are_the_papers(depth):
    total, convolutional, rate, densities = PAPER[depth]
    rule = Pruning(rates={"features*": rate, "output.weight": 0.1})
    weights = rule.prunable(network := Conv(depth))
    rule.check(network)
    assert list(weights)[-3:] == ["hidden.0.weight", "hidden.2.weight", "output.weight"]
    assert sum(p.numel() for p in weights.values()) == total
    assert sum(p.numel() for p in weights.values() if p.ndim == 4) == convolutional
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in weights.items()}
    rates = {name: rule.rate_of(name, 0.2) for name in masks}
    for level, density in densities.items():
        assert round(100 * sum(layerwise(masks, rates, level).values()) / total, 1) == density


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_images_give_logits_and_every_pixel_and_weight_matters(depth):
    torch.manual_seed(0)
    network = Conv(depth, classes=7)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    logits = network(images)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert (images.grad != 0).flatten(2).any(1).float().mean() > 0.9
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_weights_are_gaussian_glorot_and_biases_zero_and_reset_redraws_them():
    torch.manual_seed(0)
    network = Conv(4)
    for name, p in network.named_parameters():
        if p.ndim == 1:
            assert not p.any(), name
        elif p.numel() > 20_000:
            fans = (p.shape[0] + p.shape[1]) * p[0, 0].numel()
            assert abs(float(p.detach().std()) / (2 / fans) ** 0.5 - 1) < 0.02, name
    before = {name: p.clone() for name, p in network.named_parameters() if p.ndim > 1}
    network.reset_parameters()
    assert not any(torch.equal(before[name], network.get_parameter(name)) for name in before)


def test_another_depth_is_refused():
    with pytest.raises(ValueError, match=r"^depth=3 is none of the paper's networks: choose 2, 4 or 6$"):
        Conv(3)
