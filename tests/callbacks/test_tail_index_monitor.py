"""Tail indices during a fit: right, at the right steps, and without a trace in the run."""

import csv
import math

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from stranger import Blobs, Interrupted, Net, StopAt, bits, half_masks, make_plain, quiet, seeded, ticket_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning
from lottery_callbacks.functional.tail_index import centred, gradient_noise, hill, log_moment
from lottery_callbacks.tail_index_monitor import TailIndexMonitor
from lottery_lightning.tasks import ImageClassifier

FIRST, LAST = "net.1.weight", "net.5.weight"
KINDS = ("columns", "weights", "gradient_noise")


class Steps(L.Callback):
    """What the monitor had estimated last at each batch; it stands after it in the list of callbacks."""

    def __init__(self, monitor):
        self.monitor, self.rows = monitor, []

    def visit_ends(self, per_epoch, last):
        return ()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append((trainer.global_step, dict(self.monitor.estimates)))

    def on_fit_end(self, trainer, pl_module):
        self.rows.append((trainer.global_step, dict(self.monitor.estimates)))

    @property
    def changed(self):
        """The steps at which there were new estimates; the end of the fit counts by itself."""
        pairs = zip([(0, {}), *self.rows], self.rows, strict=False)
        return [new[0] for old, new in pairs if new[1] != old[1]]


class Recorder(L.Callback):
    """Everything that a monitor may not change, at each batch and at the fit's end."""

    def __init__(self, global_rng):
        self.global_rng, self.rows = global_rng, []

    def record(self, module, batch=()):
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        labels = batch[1].tolist() if isinstance(batch, list | tuple) and batch else None
        modes = [part.training for part in module.modules()]
        self.rows.append((bits(module), bits(gradients), modes, self.global_rng(), labels))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.record(pl_module, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.record(pl_module)

    def visit_ends(self, per_epoch, last):
        return ()

    def on_fit_end(self, trainer, pl_module):
        self.record(pl_module)
        self.rows.append(trainer.global_step)


def loaders(kind):
    data = Blobs()
    if kind == "data module":
        return {"datamodule": data}
    data.setup("fit")
    train, val = (TensorDataset(*data.splits[name]) for name in ("train", "val"))
    own = torch.Generator().manual_seed(5) if kind == "generator" else None
    made = DataLoader(train, 7, shuffle=True, generator=own), DataLoader(val, 8)
    return dict(zip(("train_dataloaders", "val_dataloaders"), made, strict=True))


@pytest.mark.parametrize("kind", ["data module", "shuffled", "generator"])
def test_a_fit_is_bit_for_bit_that_without_it(tmp_path, global_rng, kind):
    found = []
    for callbacks in ([], [TailIndexMonitor("2it", batches=12)]):  # more batches than an epoch has
        recorder, module = Recorder(global_rng), seeded(0, Net)
        L.seed_everything(3, verbose=False)
        quiet(tmp_path, [*callbacks, recorder], max_steps=11).fit(module, **loaders(kind))
        found.append(recorder.rows)
    assert found[0] == found[1]
    assert set(callbacks[0].estimates) >= {f"gradient_noise/{FIRST}", f"weights/{LAST}"}


def test_levels_of_a_lottery_are_bit_for_bit_those_without_it(tmp_path):
    found = []
    for name, callbacks in (("without", []), ("with", [TailIndexMonitor(None, batches=3)])):
        module, imp = seeded(0, Net), IterativeMagnitudePruning(rate=0.3, rewind="2it", run_dir=tmp_path / name)
        L.seed_everything(3, verbose=False)
        for level in imp.levels(2):
            quiet(level.run_dir, [*callbacks, imp], max_steps=5).fit(module, Blobs())
        found.append([imp.ticket_path(level).read_bytes() for level in range(4)])
    assert found[0] == found[1]


def visiting(steps):
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5))
    return ImageClassifier(network, num_classes=5, steps_per_visit=steps)


def test_visits_end_at_its_steps_and_change_neither_the_run_nor_the_estimates(tmp_path, global_rng):
    found = {}
    for steps in (1, 4):
        for every in (None, "6it"):
            monitor = TailIndexMonitor(every, batches=4)
            recorder, seen = Recorder(global_rng), Steps(monitor)
            module = seeded(0, lambda: visiting(steps))  # noqa: B023
            quiet(tmp_path, [monitor, recorder, seen], max_steps=12).fit(module, Blobs())
            found[steps, every] = [row for row in seen.rows if row[0] in (6, 12)], recorder.rows[-2:]
            if steps == 4:
                assert len(recorder.rows) < 2 * 12
    assert found[1, "6it"] == found[4, "6it"]
    assert found[1, None][1] == found[4, "6it"][1]
    assert found[1, None][0][-1] == found[1, "6it"][0][-1]
    assert len(found[4, "6it"][0][-1][1]) == 6


@pytest.mark.parametrize(
    ("every", "options", "steps"),
    [
        ("1ep", {"max_steps": 20}, [9, 18, 20]),
        ("1ep", {"max_steps": 18}, [9, 18]),
        ("4it", {"max_steps": 9}, [4, 8, 9]),
        (None, {"max_steps": 9}, [9]),
        ("2it", {"max_steps": 4, "accumulate_grad_batches": 3}, [2, 4]),
        ("1ep", {"max_steps": 6, "accumulate_grad_batches": 3}, [3, 6]),
        ("100it", {"max_epochs": 1}, [9]),
    ],
)
def test_it_measures_at_its_steps_and_at_the_end_and_once_each(tmp_path, every, options, steps):
    monitor, measured = TailIndexMonitor(every, batches=0), []
    monitor._measure, inner = lambda *args: (measured.append(args[0].global_step), inner(*args)), monitor._measure
    seen = Steps(monitor)
    quiet(tmp_path, [monitor, seen], **options).fit(seeded(0, Net), Blobs())
    assert measured == steps
    assert set(seen.changed) == set(steps)


def test_every_logger_gets_each_estimate_of_each_layer_at_its_step(tmp_path):
    made = [CSVLogger(tmp_path, name=name, flush_logs_every_n_steps=1) for name in ("one", "two")]
    monitor = TailIndexMonitor("4it", batches=3)
    seen = Steps(monitor)
    quiet(tmp_path, [monitor, seen], max_steps=8, logger=made).fit(seeded(0, Net), Blobs())
    wanted = dict(seen.rows)
    assert set(wanted[8]) == {f"{kind}/{name}" for kind in KINDS for name in (FIRST, LAST)}
    for logger in made:
        with next((tmp_path / logger.name).rglob("metrics.csv")).open() as file:
            rows = {int(row["step"]): row for row in csv.DictReader(file) if row.get(f"tail_index/columns/{FIRST}")}
        assert sorted(rows) == [4, 8]
        for step, row in rows.items():
            for name, estimate in wanted[step].items():
                assert float(row[f"tail_index/{name}"]) == pytest.approx(estimate.alpha)


class Plainly(L.LightningModule):
    """Nothing random and no norm: gradients can be computed again by hand."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))

    def training_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fixed_batches(count=6):
    draws = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(8 * count, 6, generator=draws), torch.randint(0, 5, (8 * count,), generator=draws))
    return DataLoader(data, 8)


def noise_by_hand(module, batches, name, mask=None):
    gradients = []
    for images, labels in batches:
        loss = F.cross_entropy(module.net(images), labels)
        gradients.append(torch.autograd.grad(loss, module.get_parameter(name))[0])
    rows = gradient_noise(gradients)
    return log_moment(rows if mask is None else rows[:, mask.flatten()])


@pytest.mark.parametrize("masked", [False, True])
def test_estimates_are_those_of_the_weights_and_of_gradients_computed_by_hand(tmp_path, masked):
    module, batches, name = seeded(1, Plainly), fixed_batches(), "net.0.weight"
    mask = half_masks(module)[name] if masked else None
    ticket = [ApplyTicket(ticket_of(module))] if masked else []
    monitor = TailIndexMonitor(None, batches=4)
    quiet(tmp_path, [*ticket, monitor], max_epochs=2).fit(module, batches)
    weight = module.net[0].weight.detach().double()
    assert bool(weight.eq(0).any()) == masked
    assert monitor.estimates[f"columns/{name}"] == hill(weight.norm(dim=1))
    assert monitor.estimates[f"weights/{name}"] == log_moment(centred(weight))
    assert monitor.estimates[f"gradient_noise/{name}"] == pytest.approx(
        noise_by_hand(module, list(batches)[:4], name, mask), rel=1e-3
    )


def test_heavier_noise_is_told_from_lighter(tmp_path):
    class Noisy(Plainly):
        """Its gradient is a draw: of a Cauchy law at the first layer, of a normal one at the last."""

        def training_step(self, batch, batch_idx):
            first, last = self.net[0].weight, self.net[2].weight
            draws = torch.tan(math.pi * (torch.rand_like(first) - 0.5))
            return (first * draws).sum() + (last * torch.randn_like(last)).sum()

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 40))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    monitor = TailIndexMonitor(None, batches=8)
    quiet(tmp_path, [monitor], max_steps=3).fit(seeded(0, Noisy), fixed_batches())
    assert monitor.estimates["gradient_noise/net.0.weight"].alpha == pytest.approx(1, abs=0.15)
    assert monitor.estimates["gradient_noise/net.2.weight"].alpha == pytest.approx(2, abs=0.35)


def test_a_strangers_module_with_tied_and_frozen_weights(tmp_path, global_rng):
    found = []
    for callbacks in ([], [TailIndexMonitor("3it", batches=4, exclude=["head*"])]):
        module, recorder = seeded(0, make_plain), Recorder(global_rng)
        train = loaders("shuffled")["train_dataloaders"]
        quiet(tmp_path, [*callbacks, recorder], max_steps=7).fit(module, train)
        found.append(recorder.rows)
    assert found[0] == found[1]
    layers = {"encoder.weight", "decoder.weight"}  # decoder is tied under a second name, fixed is frozen
    assert set(callbacks[0].estimates) == {f"{kind}/{layer}" for kind in KINDS for layer in layers}


def test_a_batch_without_a_loss_and_a_layer_without_a_gradient(tmp_path):
    class Skips(Plainly):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(30, 30)

        def training_step(self, batch, batch_idx):
            return None if int(batch[1][0]) % 2 else super().training_step(batch, batch_idx)

    module, monitor = seeded(1, Skips), TailIndexMonitor(None, batches=6)
    batches = fixed_batches()
    quiet(tmp_path, [monitor], max_epochs=1).fit(module, batches)
    used = [batch for batch in batches if not int(batch[1][0]) % 2]
    assert 2 <= len(used) < 6
    assert monitor.estimates["gradient_noise/net.0.weight"] == pytest.approx(
        noise_by_hand(module, used, "net.0.weight"), rel=1e-3
    )
    assert "weights/idle.weight" in monitor.estimates
    assert "gradient_noise/idle.weight" not in monitor.estimates


def test_a_diverged_run_is_not_ended_by_it(tmp_path):
    module = seeded(0, Plainly)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=math.inf)
    monitor = TailIndexMonitor("2it", batches=3)
    quiet(tmp_path, [monitor], max_steps=4).fit(module, fixed_batches())
    assert not module.net[0].weight.isfinite().all()
    assert monitor.estimates == {}


def test_a_resumed_fit_measures_what_the_unbroken_one_does(tmp_path):
    def run(folder, *callbacks, path=None):
        monitor = TailIndexMonitor("4it", batches=3)
        seen = Steps(monitor)
        save = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        trainer = quiet(folder, [monitor, seen, *callbacks, save], max_steps=9, enable_checkpointing=True)
        trainer.fit(seeded(0, Plainly), Blobs(), ckpt_path=path, weights_only=True)
        return seen

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "torn", StopAt(7))
    resumed = run(tmp_path / "torn", path=tmp_path / "torn" / "step=5.ckpt")
    assert (whole.changed, resumed.changed) == ([4, 8, 9], [8, 9])
    assert [dict(resumed.rows)[step] for step in (8, 9)] == [dict(whole.rows)[step] for step in (8, 9)]


class ByHand(Plainly):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx)["loss"])
        self.optimizers().step()


def test_what_it_cannot_measure_is_refused_before_the_first_step(tmp_path):
    def fit(module, monitor, data):
        quiet(tmp_path, [monitor], max_steps=2).fit(module, data)

    for module, options, data, message in (
        (ByHand(), {"every": None}, fixed_batches(), "ByHand optimizes manually: leave the noise out with batches=0"),
        (Plainly(), {}, {"a": fixed_batches(), "b": fixed_batches()}, "and there are several: leave the noise out"),
        (Plainly(), {"exclude": ["other*"]}, fixed_batches(), r"exclude names 'other\*', which is no parameter"),
        (ByHand(), {"batches": 0}, fixed_batches(), "1ep needs automatic optimization"),
    ):
        before = bits(module)
        with pytest.raises(ValueError, match=message) as caught:
            fit(module, TailIndexMonitor(**options), data)
        assert "\n" not in str(caught.value)
        assert bits(module) == before
    monitor = TailIndexMonitor("2it", batches=0)
    fit(ByHand(), monitor, fixed_batches())
    assert set(monitor.estimates) == {f"{kind}/net.{i}.weight" for kind in KINDS[:2] for i in (0, 2)}


def test_workers_that_live_on_serve_the_fit_as_before(tmp_path, global_rng):
    found = []
    for callbacks in ([], [TailIndexMonitor("3it", batches=3)]):
        recorder, module = Recorder(global_rng), seeded(0, Plainly)
        data = DataLoader(fixed_batches().dataset, 8, shuffle=True, num_workers=1, persistent_workers=True)
        quiet(tmp_path, [*callbacks, recorder], max_steps=5).fit(module, data)
        found.append(recorder.rows)
    assert found[0] == found[1]


def test_sharded_weights_are_refused(tmp_path):
    trainer = quiet(tmp_path, [monitor := TailIndexMonitor()])
    monkey = type("Sharding", (type(trainer.strategy),), {"restore_checkpoint_after_setup": True})
    trainer.strategy.__class__ = monkey
    with pytest.raises(ValueError, match="Sharding shards parameters: measure tails with ddp"):
        monitor.setup(trainer, Plainly(), "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": "0it"}, "every=0it: give one step"),
        ({"every": "5"}, "'5'"),
        ({"batches": 1}, "batches=1: noise is seen between two"),
        ({"batches": -1}, "batches=-1"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TailIndexMonitor(**options)
