"""Nothing that a lottery found is overwritten or misread: other rules, finished, stopped and torn levels."""

import logging

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from stranger import Interrupted, Net, StopAt, bits, quiet, seeded
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import IterativeMagnitudePruning, Pruning, ResumeCheckpoint
from lottery_callbacks.level_checkpoints import NOTE

EPOCHS = {"max_epochs": 2, "limit_val_batches": 0}


def loader(shuffle=False):
    labels = torch.arange(60) % 5
    images = torch.randn(60, 6, generator=torch.Generator().manual_seed(1)) + labels.unsqueeze(1)
    return DataLoader(TensorDataset(images, labels), 10, shuffle)


def fit(folder, imp, *callbacks, checkpoint=None, **options):
    L.seed_everything(3, verbose=False)
    module = Net()
    keeps = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint | ResumeCheckpoint) for c in callbacks)}
    quiet(folder, [imp, *callbacks], **(EPOCHS | keeps | options)).fit(module, loader(), loader(), ckpt_path=checkpoint)
    return module


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


# ---- other rules and finished levels

OTHERS = {
    "rate": ({"rate": 0.5}, "rate is 0.2 there and 0.5 now"),
    "rewind": ({"rewind": "2it"}, "rewind is '0it' there and '2it' now"),
    "pruning": ({"pruning": Pruning(scope="global")}, "pruning is"),
    "seed": ({"seed": 7}, "seed is 0 there and 7 now"),
    "the same": ({}, "level 0 of .* is finished, .*level_01.safetensors is there; go on by imp.levels"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_fit_without_levels_replaces_nothing_that_was_found(tmp_path, other):
    options, message = OTHERS[other]
    fit(tmp_path, IterativeMagnitudePruning(run_dir=tmp_path))
    found, trained = contents(tmp_path), []

    class Count(L.Callback):
        def on_train_batch_start(self, *args):
            trained.append(args)

    with pytest.raises(ValueError, match=message) as e:
        fit(tmp_path, IterativeMagnitudePruning(run_dir=tmp_path, **options), Count())
    assert "\n" not in str(e.value)
    assert (trained, contents(tmp_path)) == ([], found)


def test_one_object_goes_on_from_level_to_level_without_levels(tmp_path):
    imp, loop = IterativeMagnitudePruning(run_dir=tmp_path / "a"), IterativeMagnitudePruning(run_dir=tmp_path / "b")
    modules = [fit(tmp_path, imp) for _ in range(3)]
    for level, module in zip(loop.levels(2), modules, strict=True):
        assert bits(fit(tmp_path, loop)) == bits(module), level.number
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_finished_level_is_trained_again_where_levels_was_told_that_it_is_not(tmp_path):
    imp = IterativeMagnitudePruning(run_dir=tmp_path)
    fit(tmp_path, imp)
    found = contents(tmp_path)
    again = IterativeMagnitudePruning(run_dir=tmp_path)
    for _ in again.levels(0, finished=lambda level: False):
        fit(tmp_path, again)
    assert contents(tmp_path) == found
    imp.select(0)
    with pytest.raises(ValueError, match=r"level 0 of .* is finished"):
        fit(tmp_path, imp)


# ---- stopped and torn


class Told(L.Callback):
    """A callback of the user's that stops the fit in mid-epoch."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.should_stop or trainer.global_step == 15


class Dies(L.Callback):
    def on_train_end(self, trainer, pl_module):
        raise Interrupted


class Diverging(Net):
    """Its validation loss rises, from the third epoch on."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(abs(self.current_epoch - 1.5)))


KEEPERS = {
    "model": lambda folder: ModelCheckpoint(folder, save_last=True),
    "validation": lambda folder: ModelCheckpoint(folder, save_on_train_epoch_end=False),
    "resume": lambda folder: ResumeCheckpoint(folder, 0),
}
STOPS = {"early": lambda: EarlyStopping("val/loss", patience=1), "told": Told}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}, {"min_epochs": 5}], ids=["", "half", "min"])
def test_a_stopped_level_that_was_torn_before_its_ticket_is_finished(tmp_path, keeper, stop, options):
    def lottery(folder, *dies):
        imp, weights = IterativeMagnitudePruning(run_dir=folder), {}
        for level in imp.levels(1):
            module = seeded(level.number, Diverging)
            callbacks = [imp, KEEPERS[keeper](level.run_dir), STOPS[stop](), *(dies if level.number else ())]
            trainer = quiet(level.run_dir, callbacks, max_epochs=8, enable_checkpointing=True, **options)
            trainer.fit(module, loader(), loader(), ckpt_path=level.checkpoint)
            weights[level.number] = bits(module), trainer.global_step
        return weights

    whole = lottery(tmp_path / "whole")
    assert whole[1][1] < 48
    with pytest.raises(Interrupted):
        lottery(tmp_path / "torn", Dies())
    assert lottery(tmp_path / "torn") == {1: whole[1]}
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


# ---- checkpoints elsewhere


class Epochs(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(trainer.current_epoch)


@pytest.mark.parametrize("where", ["logger", "one folder for all"])
def test_checkpoints_outside_the_folder_of_their_level_are_found(tmp_path, where):
    def lottery(folder, *stops):
        imp = IterativeMagnitudePruning(run_dir=folder)
        for level in imp.levels(1):
            epochs, logger = Epochs(), CSVLogger(folder / "logs") if where == "logger" else False
            keep = ModelCheckpoint(None if where == "logger" else folder / "all", save_top_k=-1)
            callbacks = [epochs, keep, *(stops if level.number else ())]
            module = fit(level.run_dir, imp, *callbacks, checkpoint=level.checkpoint, max_epochs=4, logger=logger)
            yield bits(module), epochs.seen

    whole = list(lottery(tmp_path / "whole"))
    with pytest.raises(Interrupted):  # at the end of the third epoch's first batch
        list(lottery(tmp_path / "torn", StopAt(13)))
    assert (tmp_path / "torn" / "level_01" / NOTE).exists()
    assert list(lottery(tmp_path / "torn")) == [(whole[1][0], [2, 3])]


def test_checkpoints_of_the_level_before_are_not_taken_for_those_of_a_level(tmp_path):
    def lottery(*stops):
        imp, found = IterativeMagnitudePruning(run_dir=tmp_path), []
        for level in imp.levels(1):
            keep = ModelCheckpoint(tmp_path / "all", save_top_k=-1)
            found.append(level.checkpoint)
            fit(level.run_dir, imp, keep, *(stops if level.number else ()), checkpoint=level.checkpoint)
        return found

    with pytest.raises(Interrupted):
        lottery(StopAt(2))  # before the first checkpoint of level 1
    with pytest.warns(UserWarning, match=r"level 1 had begun and begins again: no whole checkpoint is below .*_01"):
        assert lottery() == [None]


@pytest.mark.parametrize("keeper", [[], [ModelCheckpoint]])
def test_a_level_that_begins_again_says_so_in_one_line(tmp_path, keeper):
    imp = IterativeMagnitudePruning(run_dir=tmp_path)
    (level,) = imp.levels(0)
    assert level.checkpoint is None
    with pytest.raises(Interrupted):
        fit(tmp_path, imp, StopAt(2), *(keep(tmp_path / "x") for keep in keeper))
    (again,) = IterativeMagnitudePruning(run_dir=tmp_path).levels(0)
    with pytest.warns(UserWarning, match="no whole checkpoint is below .*level_00; .*ModelCheckpoint") as warned:
        assert again.checkpoint is None
    assert len(warned) == 1


def test_a_lottery_that_keeps_its_checkpoints_in_its_folders_leaves_no_note(tmp_path, caplog):
    imp = IterativeMagnitudePruning(run_dir=tmp_path)
    with caplog.at_level(logging.WARNING):
        for level in imp.levels(1):
            fit(level.run_dir, imp, ResumeCheckpoint(level.run_dir, 0), checkpoint=level.checkpoint)
    assert list(tmp_path.rglob(NOTE)) == []
