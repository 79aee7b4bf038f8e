"""A rewind to a step inside an epoch goes on with the next batch of it; where that cannot be, one warning says so."""

import warnings

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ordinary_loaders import LOADERS, Module, Points, fit, quick_or_slow, torn
from stranger import Interrupted, StopAt, bits, quiet
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, newest_checkpoint


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


@pytest.mark.parametrize(
    "loader", quick_or_slow(name for name in LOADERS if name not in ("two loaders", "global python state"))
)
@pytest.mark.parametrize("rewind", ["3it", "13it"])
def test_a_rewound_level_goes_on_with_the_batch_after_step_k(tmp_path, loader, rewind):
    _, ((dense, _, _), (seen, read, _), (third, _, _)) = levels(tmp_path, loader, rewind, last=2)
    k = int(rewind.removesuffix("it"))
    left = (8 - k % 8) * (2 if "two" in loader else 1)
    k *= 2 if "two" in loader else 1
    assert seen[:left] == dense[k : k + left] == third[:left]
    assert [place[:2] for place in seen] == [place[:2] for place in dense[k:]]
    if not any(part in loader for part in ("generator", "in order", "one's own")):
        assert seen[left:] != dense[k + left :]  # later epochs are drawn from the level's own random state
    if "workers" not in loader and "two" not in loader:
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
        imp.ticket_path(2).unlink(missing_ok=True)
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


class Counting(Sampler):
    """Takes its seed from how often it was asked."""

    def __init__(self):
        self.asked = 0

    def __iter__(self):
        self.asked += 1
        return iter(np.random.default_rng(self.asked).permutation(40).tolist())

    def __len__(self):
        return 40


INEXACT = {
    "counts": (lambda data: DataLoader(data, 5, sampler=Counting()), "Counting draws another order"),
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
