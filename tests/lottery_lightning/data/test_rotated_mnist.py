import math

import pytest
import torch

from lottery_lightning.data import MNIST, RotatedMNIST
from lottery_lightning.data.mnist import rotated


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarter_turns_move_pixels_exactly(quarters):
    images = torch.rand(3, 2, 28, 28)
    found = rotated(images, torch.full((3,), quarters * math.pi / 2))
    assert torch.allclose(found, torch.rot90(images, quarters, (2, 3)), atol=1e-4)


def test_a_turn_and_its_inverse_give_a_smooth_image_back():
    axis = torch.linspace(-1, 1, 28)
    blob = torch.exp(-8 * ((axis[:, None] - 0.2) ** 2 + (axis[None] + 0.1) ** 2))[None, None]
    angle = torch.tensor([0.7])
    assert (rotated(rotated(blob, angle), -angle) - blob).abs().max() < 0.05
    assert (rotated(blob, angle) - blob).abs().max() > 0.3


@pytest.mark.usefixtures("global_rng_untouched")
def test_each_image_has_an_angle_of_its_own_and_the_same_every_time():
    images = torch.zeros(2500, 1, 28, 28)
    images[:, :, 13:15, 20:24] = 1  # a mark to the right of the centre
    data = RotatedMNIST()
    train = data.change(images, train=True)
    assert torch.equal(train, data.change(images, train=True))
    assert not torch.equal(train, data.change(images, train=False))
    axis = torch.arange(28) - 13.5
    mass = train.sum((1, 2, 3))
    x, y = (train * axis).sum((1, 2, 3)) / mass, (train * axis[:, None]).sum((1, 2, 3)) / mass
    assert (torch.hypot(x, y) - 8).abs().max() < 0.5  # where it was: 8 pixels from the centre
    turned = torch.atan2(y, x)
    for start in (-math.pi, -math.pi / 2, 0, math.pi / 2):
        share = ((turned >= start) & (turned < start + math.pi / 2)).float().mean()
        assert abs(float(share) - 0.25) < 0.04
    assert math.isclose(float(mass.mean()), 8, rel_tol=0.01)


def test_the_real_set_keeps_labels_and_splits_of_mnist(data_dir):
    plain, turned = MNIST(data_dir, download=False), RotatedMNIST(data_dir, download=False)
    for data in (plain, turned):
        data.setup("fit")
    for name in ("train", "val", "test"):
        assert torch.equal(plain.splits[name][1], turned.splits[name][1])
        assert not torch.equal(plain.splits[name][0], turned.splits[name][0])
        assert abs(float(turned.splits[name][0].mean() - plain.splits[name][0].mean())) < 0.01
