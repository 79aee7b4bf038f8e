"""Tiny data, networks and fits for the methods of distillation."""

import pytest
import torch
from torch import nn

from lottery_callbacks import ValidateEvery
from lottery_lightning.distillation import Distiller, RealBatches


@pytest.fixture
def real_images():
    """(48 images of 3 classes (1, 4, 4) in float64, their labels)."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(48) % 3
    images = torch.randn(48, 1, 4, 4, generator=generator, dtype=torch.float64)
    return images + torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)[labels], labels


@pytest.fixture
def smooth():
    """Makes a small network without kinks, in float64, with norms of a kind."""

    def make(norm=nn.Identity):
        layers = [nn.Conv2d(1, 3, 3, padding=1), norm(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(5, 3)).double()

    return make


@pytest.fixture
def distil(real_images, make_trainer):
    """Fits a distiller of 6 random images for so many steps and returns it, with the losses that it logged."""

    def fit(method, network, steps, batches_seed=3, **options):
        images = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        module = Distiller(method, network, images, torch.tensor([2, 0, 1, 1, 0, 2]), **options)
        data = RealBatches(*real_images, method.real_batch, batches_seed, steps=4)
        make_trainer(max_steps=steps, max_epochs=-1, callbacks=[ValidateEvery("100it")]).fit(module, data)
        return module

    return fit
