import json

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lottery_lightning.data import Digits, EpochOrder, ShuffledTensorLoader
from lottery_lightning.experiments import Lottery, Rule, Training
from lottery_lightning.networks import Dense
from lottery_lightning.progress import ExperimentProgress
from lottery_lightning.tasks import ImageClassifier


@pytest.mark.parametrize(("size", "batch", "world"), [(10, 4, 1), (8, 4, 1), (3, 60, 1), (11, 2, 2)])
def test_examples_are_those_of_the_batches(size, batch, world):
    loader = ShuffledTensorLoader(torch.zeros(size, 1), torch.zeros(size).long(), batch, EpochOrder(0), 0, world)
    sizes = []
    for _ in range(3):
        sizes += [len(labels) for _, labels in loader]
    assert [loader.examples(steps) for steps in range(len(sizes))] == [
        sum(sizes[:steps]) for steps in range(len(sizes))
    ]


def run(folder, monkeypatch=None, torn=None):
    class Watch(ExperimentProgress):
        def visit_ends(self, per_epoch, last):
            return (torn or 1,)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if torn and trainer.global_step == torn and "level_01" in trainer.default_root_dir:
                raise RuntimeError("torn")

    if monkeypatch:
        monkeypatch.setattr("lottery_lightning.experiments.lottery.ExperimentProgress", Watch)
    training = Training(max_steps=50, val_every="5it", threads=1, checkpoint_seconds=0)
    model = ImageClassifier(Dense([64, 10, 10]), steps_per_visit=5)
    Lottery(model, Digits(batch_size=100), folder, 1, controls={}, rule=Rule(rewind="7it"), training=training).run()


def test_a_run_tells_its_points_and_seconds_also_after_it_was_torn(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="torn"):
        run(tmp_path / "torn", monkeypatch, torn=31)
    monkeypatch.undo()
    run(tmp_path / "torn")
    for folder in ("whole", "torn"):
        dense, ticket = (
            json.loads((tmp_path / folder / "trial_0" / level / "cost.json").read_text())
            for level in ("level_00", "level_01")
        )
        epoch = 1197  # 12 batches, the last of 97
        assert dense["points"] == 4 * epoch + 2 * 100
        assert ticket["points"] == dense["points"] - 7 * 100
        assert dense["seconds"] > ticket["seconds"] * 0.1 > 0


def test_a_data_module_with_a_loader_of_its_own_has_no_points(tmp_path):
    class Own(Digits):
        def train_dataloader(self):
            return DataLoader(TensorDataset(*self.splits["train"]), batch_size=60)

    training = Training(max_steps=5, val_every="5it", threads=1)
    Lottery(ImageClassifier(Dense([64, 10, 10])), Own(), tmp_path, 1, controls={}, training=training).run()
    assert json.loads((tmp_path / "trial_0" / "level_00" / "cost.json").read_text())["points"] is None
