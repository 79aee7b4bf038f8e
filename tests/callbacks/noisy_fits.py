"""What the tests of heavy-tailed noise share: modules, fits, and the noise as the docstrings say it is drawn."""

import math
from functools import partial

import lightning.pytorch as L
import torch
from stranger import Blobs, Net, quiet
from torch import nn

from lottery_callbacks.functional.alpha_stable import factors
from lottery_callbacks.functional.noise_stream import NoiseStream
from lottery_callbacks.functional.stable_table import StableTable
from lottery_callbacks.heavy_tailed_noise import HeavyTailedNoise

KINDS = ["neuron", "weight", "rotation"]
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
PLAIN = partial(torch.optim.SGD, lr=0.1)
Heavy = partial(HeavyTailedNoise, 1.6, 0.02)


class Wide(Net):
    """Two hidden layers, any optimizer, and a choice of loss."""

    def __init__(self, optimizer=SGD, schedule=None):
        super().__init__(schedule=schedule)
        self.net = nn.Sequential(
            nn.Linear(6, 12),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(12, 9),
            nn.ReLU(),
            nn.Linear(9, 5),
        )
        self.make_optimizer = optimizer

    def configure_optimizers(self):
        return super().configure_optimizers() if self.schedule else self.make_optimizer(self.parameters())


class Still(Wide):
    """Gradients that are exactly 0: plain SGD moves nothing, so that what moves is noise."""

    def __init__(self, optimizer=PLAIN):
        super().__init__(optimizer)

    def training_step(self, batch, batch_idx):
        return 0.0 * super().training_step(batch, batch_idx)


class Noise:
    """The noise of one weight, as the docstrings say it is drawn."""

    def __init__(self, parameter, name, kind="neuron", alpha=1.6, seed=0, level=0):
        table = StableTable(alpha).draw
        self.factors = [
            NoiseStream(draw, shape, "cpu", f"{seed} {level} {name} {part}")
            for part, (shape, draw) in enumerate(factors(kind, alpha, tuple(parameter.shape), draw=table))
        ]

    def next(self):
        return math.prod(factor.next().clone() for factor in self.factors)


def used(callback):
    """How many steps each weight has had noise in, where all are of one block."""
    return {stream["used"] for streams in callback.state_dict()["streams"].values() for stream in streams}


LAYERS = ["net.0.weight", "net.4.weight"]  # not net.6.weight, the output


def fit(folder, module, *callbacks, seed=5, data=None, checkpoint=None, **options):
    trainer = quiet(folder, callbacks, **({"max_steps": 12, "limit_val_batches": 0} | options))
    L.seed_everything(seed, verbose=False)
    trainer.fit(module, Blobs() if data is None else data, ckpt_path=checkpoint)
    return trainer


def moved(module, start):
    return [name for name, weight in module.named_parameters() if not torch.equal(weight, start[name])]
