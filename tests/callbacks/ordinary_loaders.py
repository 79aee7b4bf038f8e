"""Ordinary DataLoaders, a module that draws at random, and fits over them that are torn and resumed."""

import contextlib
import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from stranger import Interrupted, StopAt, quiet
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lottery_callbacks import IterativeMagnitudePruning, ResumeCheckpoint, newest_checkpoint


class Points(Dataset):
    """40 points; counts those that are read in this process."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.points = torch.randn(40, 6, generator=generator)
        self.labels = torch.arange(40) % 5
        self.read = []

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        self.read.append(int(index))
        return self.points[index], self.labels[index], int(index)


class Module(L.LightningModule):
    """Dropout and momentum: global draws between the batches, and a state that remembers all of them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 5))
        self.seen = []

    def training_step(self, batch, index):
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        self.seen += [(self.trainer.current_epoch, index, part[2].tolist()) for part in parts]
        return sum(nn.functional.cross_entropy(self.net(part[0]), part[1]) for part in parts)

    def on_train_epoch_start(self):
        torch.rand(1)  # drawn between the loader's iterator and its first batch in epoch 0, before both later

    def validation_step(self, batch, index):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Shuffled(Sampler):
    """Of one's own, with a generator of Python's or NumPy's."""

    def __init__(self, rng):
        self.rng = rng

    def __iter__(self):
        order = list(range(40))
        self.rng.shuffle(order)
        return iter(order)

    def __len__(self):
        return 40


class Drawn:
    """An iterable of indices that is no Sampler and holds its generator."""

    def __init__(self):
        self.numpy = np.random.RandomState(7)

    def __iter__(self):
        return iter(self.numpy.permutation(40).tolist())

    def __len__(self):
        return 40


class Buckets(BatchSampler):
    """Batches of one's own, drawn from the global state of Python as they are asked for."""

    def __init__(self):
        pass

    def __iter__(self):
        for _ in range(8):
            yield [random.randrange(40) for _ in range(5)]

    def __len__(self):
        return 8


def seeded_generator():
    return torch.Generator().manual_seed(9)


LOADERS = {  # 8 batches an epoch
    "shuffled": lambda data: DataLoader(data, 5, shuffle=True),
    "in order": lambda data: DataLoader(data, 5),
    "generator": lambda data: DataLoader(data, 5, shuffle=True, generator=seeded_generator()),
    "sampler with a generator": lambda data: DataLoader(
        data, 5, sampler=RandomSampler(data, replacement=True, generator=seeded_generator())
    ),
    "subset": lambda data: DataLoader(data, 5, sampler=SubsetRandomSampler(range(40))),
    "weighted": lambda data: DataLoader(data, 5, sampler=WeightedRandomSampler(torch.arange(40.0), 40)),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 5, False)),
    "python generator": lambda data: DataLoader(data, 5, sampler=Shuffled(random.Random(4))),
    "numpy generator": lambda data: DataLoader(data, 5, sampler=Shuffled(np.random.default_rng(4))),
    "global python state": lambda data: DataLoader(data, batch_sampler=Buckets()),
    "workers": lambda data: DataLoader(data, 5, shuffle=True, num_workers=2),
    "workers and a generator": lambda data: DataLoader(
        data, 5, shuffle=True, num_workers=2, generator=seeded_generator()
    ),
    "persistent workers": lambda data: DataLoader(data, 5, shuffle=True, num_workers=2, persistent_workers=True),
    "two shuffled": lambda data: {"a": DataLoader(data, 5, shuffle=True), "b": DataLoader(data, 5, shuffle=True)},
    "two with persistent workers": lambda data: {
        "a": DataLoader(data, 5, shuffle=True, num_workers=1, persistent_workers=True),
        "b": DataLoader(data, 5, shuffle=True, num_workers=1, persistent_workers=True),
    },
    "two generators": lambda data: {
        "a": DataLoader(data, 5, sampler=RandomSampler(data, replacement=True, generator=seeded_generator())),
        "b": DataLoader(data, 5, sampler=RandomSampler(data, replacement=True, generator=seeded_generator())),
    },
    "an iterable of one's own": lambda data: DataLoader(data, 5, sampler=Drawn()),
    "two loaders": lambda data: {
        "a": DataLoader(data, 5, shuffle=True),
        "b": DataLoader(data, 5, shuffle=True, generator=seeded_generator()),
    },
}
KEEPERS = {
    "resume, each epoch": (lambda f: ResumeCheckpoint(f, 0), {"max_epochs": 4}),
    "resume, each 3": (
        lambda f: ResumeCheckpoint(f, 0),
        {"max_epochs": 4, "val_check_interval": 3, "check_val_every_n_epoch": None},
    ),
    "model, each 3": (lambda f: ModelCheckpoint(f, every_n_train_steps=3, save_top_k=-1), {"max_epochs": 4}),
    "model, each epoch": (lambda f: ModelCheckpoint(f, save_top_k=-1), {"max_epochs": 4}),
    "model, epoch ends": (
        lambda f: ModelCheckpoint(f, save_top_k=-1, save_on_train_epoch_end=True),
        {"max_steps": 30, "max_epochs": 9},
    ),
    "model, each 8": (lambda f: ModelCheckpoint(f, every_n_train_steps=8, save_top_k=-1), {"max_epochs": 4}),
    "on exception": (lambda f: OnExceptionCheckpoint(f), {"max_epochs": 4}),
    "resume, accumulated": (
        lambda f: ResumeCheckpoint(f, 0),
        {"max_epochs": 1, "val_check_interval": 3, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2},
    ),
    "model, with validations": (
        lambda f: ModelCheckpoint(f, every_n_train_steps=3, save_top_k=-1),
        {"max_epochs": 4, "val_check_interval": 3, "check_val_every_n_epoch": None},
    ),
}


def fit(folder, loader, keeper, *callbacks, masked=True, seed=0):
    """One fit of level 0; resumed from the newest checkpoint in `folder`, by objects of its own."""
    data = Points()
    L.seed_everything(seed, verbose=False)
    module = Module()
    make, options = KEEPERS[keeper]
    imp = IterativeMagnitudePruning(run_dir=folder)
    imp.select(0)
    trainer = quiet(
        folder,
        [*([imp] if masked else []), *callbacks, make(folder / "level_00")],
        enable_checkpointing=True,
        **options,
    )
    with contextlib.suppress(Interrupted):
        trainer.fit(
            module, LOADERS[loader](data), DataLoader(Points(), 10, shuffle=False), ckpt_path=newest_checkpoint(folder)
        )
    return module, data


def torn(folder, loader, keeper, step, hook="on_train_batch_end", masked=True):
    """The module of an unbroken fit, and of one that was interrupted and taken up by other objects."""
    whole, _ = fit(folder / "whole", loader, keeper, masked=masked)
    fit(folder / "torn", loader, keeper, StopAt(step, hook), masked=masked)
    assert newest_checkpoint(folder / "torn")
    return whole, *fit(folder / "torn", loader, keeper, masked=masked, seed=123)


def quick_or_slow(names):
    """Parameters of tests: loaders that start worker processes are slow, but for one."""
    return [pytest.param(n, marks=pytest.mark.slow) if "workers" in n and n != "workers" else n for n in names]
