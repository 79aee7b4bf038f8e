"""A fit over ordinary DataLoaders that is torn, or rewound, inside an epoch goes on with the batches that are left."""

import contextlib
import random
import warnings

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stranger import Interrupted, StopAt, bits, quiet
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, ResumeCheckpoint, newest_checkpoint


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


@pytest.mark.parametrize("step", [5, 7, 13, 16, 23])
@pytest.mark.parametrize("keeper", ["resume, each 3", "model, each 3"])
@pytest.mark.parametrize("loader", [name for name in LOADERS if "workers" not in name])
def test_a_torn_fit_sees_the_batches_and_ends_in_the_bits_of_an_unbroken_one(tmp_path, loader, keeper, step):
    whole, resumed, data = torn(tmp_path, loader, keeper, step)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert bits(resumed) == bits(whole)
    assert data.read == [index for _, _, batch in resumed.seen for index in batch] or loader == "two loaders"


@pytest.mark.parametrize("keeper", ["resume, each epoch", "model, each epoch", "model, epoch ends"])
@pytest.mark.parametrize("step", [9, 16, 20])
@pytest.mark.parametrize("loader", ["shuffled", "generator", "numpy generator", "two loaders"])
def test_a_fit_torn_after_an_epoch_draws_the_next_order_as_an_unbroken_one(tmp_path, loader, keeper, step):
    whole, resumed, _ = torn(tmp_path, loader, keeper, step)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert bits(resumed) == bits(whole)


@pytest.mark.parametrize(
    ("keeper", "step"),
    [("resume, each 3", 13), ("model, each 3", 7), ("resume, each epoch", 18), ("model, epoch ends", 18)],
)
@pytest.mark.parametrize("loader", [name for name in LOADERS if "workers" in name])
def test_workers_go_on_too(tmp_path, loader, keeper, step):
    whole, resumed, _ = torn(tmp_path, loader, keeper, step)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert bits(resumed) == bits(whole)


def test_resume_checkpoint_alone_keeps_the_order_and_the_random_state(tmp_path):
    whole, resumed, data = torn(tmp_path, "shuffled", "resume, each 3", 13, masked=False)
    assert resumed.seen == whole.seen[12:]
    assert bits(resumed) == bits(whole)
    assert len(data.read) == 5 * len(resumed.seen)


def test_a_fit_torn_twice_in_one_epoch_goes_on_twice(tmp_path):
    whole, _ = fit(tmp_path / "whole", "shuffled", "model, each 3")
    for step, seed in ((11, 0), (14, 55)):
        fit(tmp_path / "torn", "shuffled", "model, each 3", StopAt(step), seed=seed)
    resumed, _data = fit(tmp_path / "torn", "shuffled", "model, each 3", seed=99)
    assert resumed.seen == whole.seen[12:]
    assert bits(resumed) == bits(whole)


# ---- validation at the step of a checkpoint

KEEPERS["model, with validations"] = (
    lambda f: ModelCheckpoint(f, every_n_train_steps=3, save_top_k=-1),
    {"max_epochs": 4, "val_check_interval": 3, "check_val_every_n_epoch": None},
)


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_end"])
def test_a_fit_torn_inside_a_validation_repeats_or_finishes_it(tmp_path, hook):
    whole, resumed, _ = torn(tmp_path, "shuffled", "model, with validations", 12, hook)
    assert resumed.seen == whole.seen[12:]
    assert bits(resumed) == bits(whole)


# ---- rewinding


def levels(folder, loader, rewind, last=1, **options):
    """The modules of levels 0 to `last`, with the data that each read; the data are the same object at all levels."""
    L.seed_everything(0, verbose=False)
    module, done = Module(), []
    data = Points()
    batches = LOADERS[loader](data)
    imp = IterativeMagnitudePruning(rewind=rewind, run_dir=folder)
    for level in imp.levels(last):
        L.seed_everything(10 + level.number, verbose=False)
        module.seen, data.read[:] = [], []
        quiet(level.run_dir, [imp], **({"max_epochs": 3} | options)).fit(module, batches)
        done.append((list(module.seen), list(data.read), bits(module)))
    return imp, done


@pytest.mark.parametrize("loader", [name for name in LOADERS if name not in ("two loaders", "global python state")])
@pytest.mark.parametrize("rewind", ["3it", "13it"])
def test_a_rewound_level_goes_on_with_the_batch_after_step_k(tmp_path, loader, rewind):
    _, ((dense, _, _), (seen, read, _), (third, _, _)) = levels(tmp_path, loader, rewind, last=2)
    k = int(rewind.removesuffix("it"))
    left = 8 - k % 8
    assert seen[:left] == dense[k : k + left] == third[:left]
    assert [place[:2] for place in seen] == [place[:2] for place in dense[k:]]
    if "generator" not in loader and loader != "in order":
        assert seen[left:] != dense[k + left :]  # later epochs are drawn from the level's own random state
    if "workers" not in loader:
        assert read == [index for _, _, batch in seen for index in batch]


def test_apply_ticket_goes_on_with_the_same_batches_as_the_level(tmp_path):
    imp, done = levels(tmp_path, "shuffled", "13it")
    module, data = Module(), Points()
    L.seed_everything(11, verbose=False)
    quiet(tmp_path, [ApplyTicket(imp.ticket_path(1))], max_epochs=3).fit(module, LOADERS["shuffled"](data))
    assert (module.seen, bits(module)) == (done[1][0], done[1][2])


def test_a_rewound_level_that_is_torn_in_the_epoch_of_step_k_goes_on_there(tmp_path):
    def level_one(folder, *callbacks):
        L.seed_everything(11, verbose=False)
        module, imp = Module(), IterativeMagnitudePruning(rewind="3it", run_dir=tmp_path)
        level = imp.select(1)
        keeper = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
        trainer = quiet(folder, [imp, *callbacks, keeper], enable_checkpointing=True, max_epochs=3)
        trainer.fit(module, LOADERS["shuffled"](Points()), ckpt_path=newest_checkpoint(folder))
        return module, level

    levels(tmp_path, "shuffled", "3it")
    whole, _ = level_one(tmp_path / "whole")
    with pytest.raises(Interrupted):
        level_one(tmp_path / "torn", StopAt(7))
    torch.rand(5)
    resumed, _ = level_one(tmp_path / "torn")
    assert resumed.seen == whole.seen[3:]
    assert bits(resumed) == bits(whole)


# ---- where it cannot be exact


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[i] for i in range(40))

    def __len__(self):
        return 40


class Unseeded(Sampler):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(np.random.default_rng().permutation(40).tolist())

    def __len__(self):
        return 40


INEXACT = {
    "a stream": (lambda data: DataLoader(Stream(data), 5), "data set Stream is iterable"),
    "no seed": (lambda data: DataLoader(data, 5, sampler=Unseeded(data)), "Unseeded draws another order"),
    "no DataLoader": (lambda data: [data.__getitem__(0)] and Plain(data), "Plain is not a DataLoader"),
    "a short one beside": (
        lambda data: {"a": DataLoader(data, 5), "b": DataLoader(data, 20)},
        "a shorter loader beside it has begun again",
    ),
}


class Plain:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(DataLoader(self.data, 5))


def said(caught):
    return [str(warning.message) for warning in caught if "batch" in str(warning.message)]


@pytest.mark.parametrize("name", INEXACT)
def test_one_warning_says_what_a_loader_cannot_repeat(tmp_path, monkeypatch, name):
    make, reason = INEXACT[name]
    monkeypatch.setitem(LOADERS, name, make)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        levels(tmp_path / "levels", name, "5it")
    assert len(said(caught)) == 1
    assert reason in said(caught)[0]
    assert 'rewind="1ep"' in said(caught)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, name, "model, each 3", StopAt(7))
        fit(tmp_path, name, "model, each 3")
    assert len(said(caught)) == 1
    assert reason in said(caught)[0]


@pytest.mark.parametrize("name", ["shuffled", "in order", "batch sampler"])
def test_an_exact_continuation_warns_of_nothing(tmp_path, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        levels(tmp_path / "levels", name, "5it")
        torn(tmp_path, name, "model, each 3", 7)
    assert not said(caught)


@pytest.mark.parametrize("name", INEXACT)
def test_a_rewind_to_an_epochs_end_is_exact_with_any_loader(tmp_path, monkeypatch, name):
    monkeypatch.setitem(LOADERS, name, INEXACT[name][0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        levels(tmp_path, name, "1ep")
    assert not said(caught)
