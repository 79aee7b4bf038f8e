"""The data of a fit are read once more, and neither their draws nor their workers show it."""

import lightning.pytorch as L
import pytest
import torch
from stranger import Blobs, Net, bits, quiet, seeded
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lottery_callbacks.fit_data import load_validation_data, training_batches, validation_batches

STEPS = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}


class Reading(L.Callback):
    """Reads a validation batch and a training batch at the start of a fit, and all and two after it."""

    def __init__(self):
        self.labels = []

    def on_train_start(self, trainer, pl_module):
        self.read(trainer, pl_module, 1)

    def on_fit_end(self, trainer, pl_module):
        self.read(trainer, pl_module, 9)

    def read(self, trainer, module, count):
        with validation_batches(trainer, module) as batches:
            first = [labels.tolist() for (_, labels), _ in zip(batches, range(count), strict=False)]
        self.labels.append((first, [labels.tolist() for _, labels in training_batches(trainer, count)]))


def datasets():
    data = Blobs()
    data.setup("fit")
    return [TensorDataset(*data.splits[name]) for name in ("train", "val")]


def with_sampler(dataset, size, generator):
    return DataLoader(dataset, size, sampler=RandomSampler(dataset, generator=generator))


def with_batch_sampler(dataset, size, generator):
    return DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset, generator=generator), size, False))


def with_generator(dataset, size, generator):
    return DataLoader(dataset, size, shuffle=True, generator=generator)


@pytest.mark.parametrize("make", [with_sampler, with_batch_sampler, with_generator])
@pytest.mark.parametrize("place", [0, 1])
def test_two_fits_draw_their_batches_as_if_nobody_read_between(tmp_path, make, place):
    found = []
    for callbacks in ([], [Reading()]):
        generator, (train, val) = torch.Generator().manual_seed(1), datasets()
        loaders = [DataLoader(train, 7), DataLoader(val, 8)]
        loaders[place] = make([train, val][place], 7, generator)
        module = seeded(0, Net)
        for _ in range(2):
            quiet(tmp_path, callbacks, **STEPS).fit(module, *loaders)
        found.append((bits(module), generator.get_state().tolist()))
    assert found[0] == found[1]
    assert len(callbacks[0].labels) == 4
    assert callbacks[0].labels[0][1 - place] != callbacks[0].labels[2][1 - place]


class Drawing(Net):
    """Draws from the global random state at each validation batch."""

    def validation_step(self, batch, batch_idx):
        self.drawn.append(float(torch.rand(())))


def test_persistent_workers_begin_when_they_would_have(tmp_path):
    found = []
    for callbacks in ([], [Reading()]):
        train, val = datasets()
        module = seeded(0, Drawing)
        module.drawn = []
        loader = DataLoader(val, 10, num_workers=1, persistent_workers=True)
        quiet(tmp_path, callbacks, **STEPS).fit(module, DataLoader(train, 7, shuffle=True), loader)
        found.append((bits(module), module.drawn))
    assert len(found[0][1]) == 4
    assert found[0] == found[1]


def test_an_epoch_that_persistent_workers_are_in_goes_on(tmp_path):
    class Between(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                labels.append(training_batches(trainer, 1)[0][1].tolist())

    ends, labels = [], []
    for callbacks in ([], [Between()]):
        train, _ = datasets()
        loader = DataLoader(train, 7, num_workers=1, persistent_workers=True)
        quiet(tmp_path, callbacks, max_epochs=2, limit_val_batches=0).fit(module := seeded(0, Net), loader)
        ends.append(bits(module))
    assert ends[0] == ends[1]
    assert labels == [[0, 1, 2, 3, 4, 0, 1]] * 2  # the first batch


def test_validation_data_are_loaded_once_and_without_a_trace(tmp_path, global_rng):
    seen = []

    class Loading(L.Callback):
        def on_train_start(self, trainer, pl_module):
            before = trainer.state.stage, global_rng()
            assert trainer.val_dataloaders is None
            load_validation_data(trainer)
            loader = trainer.val_dataloaders
            load_validation_data(trainer)
            assert trainer.val_dataloaders is loader is not None
            assert (trainer.state.stage, global_rng()) == before
            seen.append(loader)

        def on_validation_end(self, trainer, pl_module):
            assert trainer.val_dataloaders is seen[1]

    class Data(Blobs):
        def val_dataloader(self):
            torch.rand(3)
            seen.append(self.trainer.validating)
            return super().val_dataloader()

    trainer = quiet(tmp_path, [Loading()], max_epochs=2, check_val_every_n_epoch=2)
    trainer.fit(seeded(0, Net), Data())
    assert [one is True for one in seen] == [True, False]  # asked for once, while validating


def test_after_an_error_of_the_data_the_stage_is_as_before(tmp_path):
    seen = []

    class Loading(L.Callback):
        def on_train_start(self, trainer, pl_module):
            with pytest.raises(ZeroDivisionError):
                load_validation_data(trainer)
            seen.append(trainer.training)
            trainer.should_stop = True

    class Data(Blobs):
        def val_dataloader(self):
            return 1 / 0

    quiet(tmp_path, [Loading()], max_epochs=2, check_val_every_n_epoch=9).fit(seeded(0, Net), Data())
    assert seen == [True]
