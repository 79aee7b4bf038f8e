"""Rewinding where schedules, optimizers and loops are less simple, and what is refused instead of done wrongly."""

from functools import partial

import lightning.pytorch as L
import pytest
import torch
from stranger import Blobs, Interrupted, Lottery, Net, StopAt, bits, fit_with, quiet, seeded
from torch.nn import functional as F

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, Pruning, ResumeCheckpoint, Ticket

schedulers = torch.optim.lr_scheduler


class AsksForTheData(Net):
    """A schedule that needs the number of steps before the fit begins, and so the data."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = schedulers.OneCycleLR(optimizer, 0.2, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_schedule_that_asks_for_the_data_early_gets_the_order_of_its_own_level(tmp_path):
    lottery = Lottery(tmp_path, AsksForTheData, rewind="0it", trainer={"max_epochs": 2}).run(2)
    assert len({str(probe.labels) for probe in lottery.probes}) == 3
    for level in (1, 2):
        ticket = ApplyTicket(lottery.imp.ticket_path(level))
        module, _, probe = fit_with(
            tmp_path, seeded(9, AsksForTheData), Blobs(), ticket, seed=100 + level, max_epochs=2
        )
        assert probe.labels == lottery.probes[level].labels
        assert bits(module) == bits(lottery.finals[level])


class WarmUp(Net):
    """Linear warmup, then drops after the rewind point: the ResNet and VGG protocol."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        parts = [schedulers.LinearLR(optimizer, 0.1, 1, 8), schedulers.MultiStepLR(optimizer, [2, 2, 5])]
        schedule = schedulers.SequentialLR(optimizer, parts, milestones=[8])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_warmup_schedule_crosses_its_milestones_after_rewinding(tmp_path):
    lottery = Lottery(tmp_path, WarmUp, rewind="3it").run(1)
    rates = [[rate for *_, rate in probe.steps] for probe in lottery.probes]
    assert len(set(rates[0])) >= 10
    assert rates[1] == rates[0][3:]
    lottery.imp.select(0)
    ticket = Ticket.load(lottery.imp.ticket_path(1))  # through the file as well
    module, _, _ = fit_with(tmp_path, seeded(9, WarmUp), Blobs(), ApplyTicket(ticket), seed=101)
    assert bits(module) == bits(lottery.finals[1])


class TwoOptimizers(Net):
    """Manual optimization with two optimizers: two steps a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        early, late = self.net[1].parameters(), [*self.net[2].parameters(), *self.net[5].parameters()]
        return [torch.optim.SGD(early, 0.1, momentum=0.9), torch.optim.Adam(late, 0.01)]


@pytest.mark.parametrize("rewind", ["1ep", "6it"])
@pytest.mark.parametrize("killed_at", [4, 10, 24])
def test_two_optimizers_resume_before_and_after_the_rewind_step(tmp_path, rewind, killed_at):
    limits = {"max_epochs": 2, "val_check_interval": 2, "check_val_every_n_epoch": 1}
    whole = Lottery(tmp_path / "whole", TwoOptimizers, rewind=rewind, trainer=limits).run(1)
    torn = Lottery(tmp_path / "torn", TwoOptimizers, rewind=rewind, trainer=limits)
    level = torn.imp.select(0)
    with pytest.raises(Interrupted):
        torn.fit(level, StopAt(killed_at), ResumeCheckpoint(level.run_dir, 0))
    resumed = Lottery(tmp_path / "torn", TwoOptimizers, rewind=rewind, trainer=limits)
    level = resumed.imp.select(0)
    resumed.fit(level, ResumeCheckpoint(level.run_dir, 0))
    for number in (0, 1):
        own, expected = resumed.imp.ticket_path(number), whole.imp.ticket_path(number)
        assert own.read_bytes() == expected.read_bytes()
    assert bits(resumed.finals[0]) == bits(whole.finals[0])


def test_a_rewind_point_of_other_optimizers_is_refused(tmp_path):
    lottery = Lottery(tmp_path, Net, rewind="5it").run(0)

    class Other(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    ticket = ApplyTicket(lottery.imp.ticket_path(1))
    with pytest.raises(ValueError, match="state of other optimizers or schedulers") as refusal:
        quiet(tmp_path, [ticket]).fit(seeded(1, Other), Blobs())
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="state of other optimizers or schedulers"):
        quiet(tmp_path, [ApplyTicket(lottery.imp.ticket_path(1))]).fit(
            seeded(1, partial(Net, schedule="multistep")), Blobs()
        )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rate": 0.4}, "rate is 0.3 there and 0.4 now"),
        ({"rewind": "2it"}, "rewind is '0it' there and '2it' now"),
        ({"retrain": "fine_tune"}, "retrain is 'weights'"),
        ({"pruning": Pruning(scope="global")}, "pruning is 'magnitude, layerwise' there"),
        ({"pruning": Pruning(exclude=["net.5.weight"])}, r"exclude is \[\] there"),
        ({"pruning": Pruning(rates={"net.5.weight": 0.1})}, r"rates is \{\} there"),
    ],
)
def test_an_old_run_dir_of_another_rule_is_refused_by_its_key(tmp_path, changed, said):
    Lottery(tmp_path, Net).run(0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(ValueError, match=said) as refusal:
        list(IterativeMagnitudePruning(**({"rate": 0.3, "run_dir": tmp_path} | changed)).levels(2))
    assert "\n" not in str(refusal.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}


def test_an_unsuitable_optimizer_is_refused_in_the_dense_level_already(tmp_path):
    class Factored(Net):
        def configure_optimizers(self):
            return torch.optim.Adafactor(self.parameters())

    steps = []

    class Count(L.Callback):
        def on_train_batch_end(self, *args):
            steps.append(1)

    with pytest.raises(RuntimeError, match="Adafactor keeps state of another shape"):
        quiet(tmp_path, [IterativeMagnitudePruning(run_dir=tmp_path), Count()]).fit(seeded(1, Factored), Blobs())
    assert steps == []


def test_sharded_strategies_are_refused_at_setup(tmp_path):
    trainer = quiet(tmp_path, [IterativeMagnitudePruning(run_dir=tmp_path)])
    type(trainer.strategy).restore_checkpoint_after_setup = property(lambda self: True)
    try:
        with pytest.raises(ValueError, match="shards parameters: train tickets with ddp"):
            trainer.fit(seeded(1, Net), Blobs())
    finally:
        del type(trainer.strategy).restore_checkpoint_after_setup
