"""Lines of fits that are on a device, resumed, without an early validation; and where lines are reported."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from stranger import Blobs, Interrupted, Net, bits, quiet, seeded
from torch.nn import functional as F

from lottery_callbacks import LinearModeConnectivity
from lottery_callbacks.functional.evaluation import evaluate_on

STEPS = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}


def lmc(**options):
    return LinearModeConnectivity(**({"points": 4, "network": "net"} | options))


class Elsewhere(SingleDeviceStrategy):
    """A device of which nothing is known but that the module is on it from `to(device)` until `cpu()`."""

    def __init__(self, moves):
        super().__init__(device="cpu")
        self.moves = moves

    def model_to_device(self):
        self.moves.append("to")

    def batch_to_device(self, batch, device=None, dataloader_idx=0):
        assert self.moves[-1] == "to"
        return super().batch_to_device(batch, device, dataloader_idx)


@pytest.mark.parametrize("fails", [False, True])
def test_lines_are_evaluated_on_the_fits_device_and_the_module_is_left_on_the_cpu(tmp_path, fails):
    moves = []

    class Moving(Net):
        def to(self, device):
            moves.append("to")
            assert device == torch.device("cpu")
            return super().to(device)

        def cpu(self):
            moves.append("cpu")
            return super().cpu()

    def loss(module, batch):
        assert moves[-1] == "to"
        if fails and len(moves) > 2:
            raise Interrupted
        return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")

    torch.save(seeded(9, Net).state_dict(), tmp_path / "other.pt")
    callback = lmc(to=[tmp_path / "other.pt"], norms="reestimate", loss=loss)
    trainer = quiet(tmp_path, [callback], strategy=Elsewhere(moves), **STEPS)
    try:
        trainer.fit(seeded(0, Moving), Blobs())
    except Interrupted:
        assert fails
    assert moves[:4] == ["to", "cpu", "to", "cpu"]
    assert bool(callback.results) != fails


@pytest.mark.parametrize("norms", ["average", "reestimate"])
def test_a_fit_that_was_torn_after_its_last_step_is_finished_with_the_same_lines(tmp_path, norms):
    torch.save(seeded(9, Net).state_dict(), tmp_path / "other.pt")
    results = []
    for path in (None, tmp_path / "last.ckpt"):
        callback, saving = (
            lmc(to=[tmp_path / "other.pt"], norms=norms, norm_batches=2),
            ModelCheckpoint(tmp_path, "last"),
        )
        trainer = quiet(tmp_path, [callback, saving], **STEPS | {"enable_checkpointing": True})
        trainer.fit(seeded(1 if path else 0, Net), Blobs(), ckpt_path=path)
        assert trainer.global_step == 6
        results.append(callback.results)
    assert list(results[0]) == ["other"]
    assert results[0] == results[1]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_fit_that_begins_in_an_epoch_without_validation_has_its_lines_and_is_unchanged(tmp_path, resumed):
    saving = ModelCheckpoint(tmp_path, "first")
    options = {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}
    if resumed:
        trainer = quiet(tmp_path, [saving], max_epochs=2, **options | {"enable_checkpointing": True})
        trainer.fit(seeded(3, Net), Blobs())
    torch.save(seeded(9, Net).state_dict(), tmp_path / "other.pt")
    ends = []
    for callbacks in ([], [lmc(to=[tmp_path / "other.pt"])]):
        module, data = seeded(0, Net), Blobs()
        path = tmp_path / "first.ckpt" if resumed else None
        quiet(tmp_path, callbacks, max_epochs=4 if resumed else 2, **options).fit(module, data, ckpt_path=path)
        ends.append(bits(module))
    assert ends[0] == ends[1]
    assert callbacks[0].results["other"].losses[0] == evaluate_on([data.splits["val"]])(module.net).loss


def test_lines_are_reported_once_on_the_first_process_after_they_are_logged(tmp_path):
    told, logger = [], CSVLogger(tmp_path)

    def report(trainer, lines):
        assert any("lmc/previous/barrier" in row for row in logger.experiment.metrics)
        told.append((trainer.global_step, dict(lines)))

    callback = lmc(report=report)
    quiet(tmp_path, [callback], **STEPS).fit(seeded(0, Net), Blobs())
    assert told == []  # there is none
    quiet(tmp_path, [callback], logger=logger, **STEPS).fit(seeded(1, Net), Blobs())
    assert told == [(6, callback.results)]
    second = lmc(report=report)
    second._last = callback.state_dict()
    trainer = quiet(tmp_path, [second], **STEPS)
    trainer.strategy.__class__ = type("Second", (type(trainer.strategy),), {"is_global_zero": False})
    trainer.fit(seeded(2, Net), Blobs())
    assert second.results
    assert len(told) == 1


def test_two_of_them_with_other_checkpoints_keep_states_of_their_own():
    assert lmc(to=["a.pt"]).state_key != lmc(to=["b.pt"]).state_key
    assert lmc(to=["b.pt", "a.pt"]).state_key == lmc(to=["x/a.pt", "b.pt"]).state_key
