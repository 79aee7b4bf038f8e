"""Curvature at the ends of fits: right under the masks, without a trace in any run, refused before the first step.

The test of two processes runs this file: Lightning starts the second rank so; both do everything in `main`.
"""

import csv
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from stranger import Blobs, Net, bits, fit_with, half_masks, quiet, seeded, ticket_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, curvature_monitor
from lottery_callbacks.curvature_monitor import CurvatureMonitor
from lottery_callbacks.functional.curvature import Curvature
from lottery_lightning.tasks import ImageClassifier

STEPS = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}
KEPT = 6 * 12 + 12 + 24 + 12 * 5 + 5  # of the whole Net


def monitor(**options):
    return CurvatureMonitor(**({"network": "net", "batches": 2, "draws": 5} | options))


# ---- without a trace


@pytest.mark.parametrize("options", [{}, {"data": "val", "kind": "ggn"}, {"per_layer": True}])
def test_the_fit_is_bit_for_bit_that_without_it(trace_fit, options):
    assert trace_fit(monitor(network="network", **options)) == trace_fit()


class Augmenting(Net):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 0.01 * torch.randn(batch[0].shape), batch[1]]


@pytest.mark.parametrize("data", ["train", "val"])
def test_three_levels_with_shuffling_loaders_are_bit_for_bit_those_without_it(tmp_path, global_rng, data):
    blobs, found = Blobs(), []
    blobs.setup("fit")
    for name, callbacks in (("without", []), ("with", [monitor(data=data)])):
        splits = [TensorDataset(*blobs.splits[split]) for split in ("train", "val")]
        generator = torch.Generator().manual_seed(5)
        loaders = DataLoader(splits[0], 7, shuffle=True), DataLoader(splits[1], 8, shuffle=True, generator=generator)
        module, rows = seeded(0, Augmenting), []
        imp = IterativeMagnitudePruning(rate=0.3, rewind="2it", run_dir=tmp_path / name)
        L.seed_everything(3, verbose=False)  # once: a draw too many in a level shifts the next one
        for level in imp.levels(2):
            quiet(level.run_dir, [imp, *callbacks], **STEPS).fit(module, *loaders)
            rows.append((bits(module), global_rng(), generator.get_state().tolist()))
            assert not callbacks or callbacks[0].results["network"].kept == KEPT - sum(
                int((~mask).sum()) for mask in imp.fit_masks.values()
            )
        found.append((rows, [imp.ticket_path(level).read_bytes() for level in range(4)]))
    assert found[0] == found[1]


def test_a_fit_in_visits_keeps_its_bits_and_its_visits_and_measures_the_same_batches(tmp_path):
    def fit(steps, *callbacks):
        network = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
        module = ImageClassifier(network, num_classes=5, steps_per_visit=steps)
        trainer = quiet(tmp_path, callbacks, max_steps=12)
        trainer.fit(module, Blobs())
        return bits(module), trainer.fit_loop.epoch_loop.batch_idx, trainer.train_dataloader.state_dict()

    callbacks = [monitor(network=None), monitor(network=None)]
    plain = seeded(0, lambda: fit(1, callbacks[0]))
    visits = seeded(0, lambda: fit(4, callbacks[1]))
    assert visits == seeded(0, lambda: fit(4))
    assert plain[0] == visits[0]
    assert plain[1] > visits[1]  # there were visits
    assert callbacks[0].results == callbacks[1].results


# ---- what is measured


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_what_it_finds_is_that_of_the_dense_matrix_under_the_mask(tmp_path, kind):
    module = seeded(0, Net)
    masks = half_masks(module)
    callback = monitor(kind=kind, data="val", batches=99, draws=999, per_layer=True)
    fit_with(tmp_path, module, Blobs(), ApplyTicket(ticket_of(module, masks)), callback, **STEPS)
    data = Blobs()
    data.setup("fit")
    matrix = Curvature(
        module.net, [data.splits["val"]], kind=kind, masks={name.removeprefix("net."): m for name, m in masks.items()}
    )
    dense = (matrix @ torch.eye(matrix.shape[0])).double()
    names = [f"net.{name}" for name in matrix.sizes]
    assert list(callback.results) == ["network", *names]
    assert 0 < int(masks["net.1.weight"].sum()) == callback.results["net.1.weight"].kept < 72
    starts = [0, *torch.tensor(list(matrix.sizes.values())).cumsum(0).tolist()]
    blocks = {"network": slice(None)} | {name: slice(*starts[i : i + 2]) for i, name in enumerate(names)}
    for name, place in blocks.items():
        block, found = dense[place, place], callback.results[name]
        values, diagonal = torch.linalg.eigvalsh(block), block.diagonal().sort().values
        assert found.kept == len(block)
        assert found.trace == pytest.approx(float(block.trace()), rel=1e-4)
        assert found.mean == pytest.approx(float(diagonal.mean()), rel=1e-4)
        assert (found.trace_error, found.error) == (0, 0)
        spread = float(values.abs().max())
        assert found.largest == pytest.approx(float(values[-1]), abs=1e-3 * spread)
        assert found.smallest == pytest.approx(float(values[0]), abs=1e-3 * spread)
        ranks = [round(q * (len(block) - 1)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
        assert found.quantiles == pytest.approx(diagonal[ranks].tolist(), rel=1e-3, abs=1e-6)


def test_the_training_batches_are_those_that_would_come_next_and_draws_are_the_seeds(tmp_path):
    class Sized(nn.Module):
        """A loss that notes the sizes of the batches it is given."""

        def __init__(self):
            super().__init__()
            self.loss, self.seen = nn.CrossEntropyLoss(), []

        def forward(self, outputs, labels):
            self.seen.append(labels.tolist())
            return self.loss(outputs, labels)

    callbacks = [monitor(seed=seed, loss=loss) for seed, loss in ((0, Sized()), (0, None), (1, None))]
    module, data = seeded(0, Net), Blobs()
    fit_with(tmp_path, module, data, *callbacks, **STEPS)
    expected = data.train_dataloader()
    expected.load_state_dict({"epoch": 0, "batch": 6})
    assert callbacks[0].loss.seen[-2:] == [batch[1].tolist() for batch in expected][:2]
    first, second, third = (callback.results["network"] for callback in callbacks)
    assert first == second
    assert first.trace != third.trace
    assert first.trace_error > 0
    assert first.error > 0
    assert first.largest == pytest.approx(third.largest, rel=1e-3)


def test_every_logger_gets_every_metric_at_the_last_step(tmp_path):
    loggers = [CSVLogger(tmp_path, name) for name in ("one", "other")]
    callbacks = monitor(per_layer=True), monitor(kind="ggn", draws=1)
    fit_with(tmp_path, seeded(0, Net), Blobs(), *callbacks, **STEPS, logger=loggers)
    keys = {"trace", "trace_error", "largest", "smallest", "diagonal/mean", "diagonal/error"}
    keys |= {f"diagonal/q{q}" for q in ("05", "25", "50", "75", "95")}
    names = ["", *(f"net.{name}/" for name in dict(Net().net.named_parameters()))]
    for logger in loggers:
        text = (Path(logger.log_dir) / "metrics.csv").read_text()
        rows = [row for row in csv.DictReader(text.splitlines()) if row["curvature/hessian/trace"]]
        assert [row["step"] for row in rows] == ["6"]
        found = {key: float(value) for key, value in rows[0].items() if key.startswith("curvature/hessian/")}
        assert found.keys() == {f"curvature/hessian/{name}{key}" for name in names for key in keys}
        summary = callbacks[0].results["net.5.weight"]
        assert found["curvature/hessian/net.5.weight/largest"] == summary.largest
        assert found["curvature/hessian/net.5.weight/diagonal/q95"] == summary.quantiles[4]
        assert found["curvature/hessian/net.5.weight/diagonal/mean"] == summary.trace / 60
        assert callbacks[1].results["network"].smallest == pytest.approx(0, abs=1e-3)
        assert math.isnan(callbacks[1].results["network"].trace_error)


def test_a_layer_that_has_collapsed_is_passed_over(tmp_path):
    module = seeded(0, Net)
    masks = half_masks(module) | {"net.5.weight": torch.zeros(5, 12, dtype=torch.bool)}
    callback = monitor(per_layer=True)
    fit_with(tmp_path, module, Blobs(), ApplyTicket(ticket_of(module, masks)), callback, **STEPS)
    assert "net.5.weight" not in callback.results
    assert list(callback.results)[-1] == "net.5.bias"


def test_a_plan_of_more_than_ten_seconds_is_said_before_and_a_shorter_one_is_not(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(curvature_monitor, "seconds", lambda matrix, products: products / 31)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        for per_layer in (False, True):
            fit_with(tmp_path, seeded(0, Net), Blobs(), monitor(draws=9, per_layer=per_layer), **STEPS)
    plans = [record.message for record in caplog.records if "products" in record.message]
    assert plans == ["curvature (hessian): up to 2109 products, up to 68 s"]  # 9 + 300 (1 + 6), after 309 in 9.97 s
    assert sum("eigenvalues from" in record.message for record in caplog.records) == 2


def test_eigenvalues_that_do_not_converge_end_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(curvature_monitor, "MOST", 21)
    callback = monitor()
    with pytest.warns(UserWarning, match="the eigenvalues have not converged in 21 products"):
        fit_with(tmp_path, seeded(0, Net), Blobs(), callback, **STEPS)
    found = callback.results["network"]
    assert math.isnan(found.largest)
    assert math.isnan(found.smallest)
    assert math.isfinite(found.trace)


def test_a_run_that_has_diverged_is_measured_as_nan(tmp_path):
    class Diverging(L.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.net[5].bias.data.fill_(math.nan)

    callback = monitor()
    fit_with(tmp_path, seeded(0, Net), Blobs(), callback, Diverging(), **STEPS)
    assert all(math.isnan(v) for v in (callback.results["network"].largest, callback.results["network"].trace))


# ---- before the first step


class NoForward(Net):
    forward = L.LightningModule.forward


def fit_refused(folder, callback, module=None, data=None, **options):
    module = seeded(0, Net) if module is None else module
    trainer = quiet(folder, [callback], **STEPS | options)
    try:
        trainer.fit(module, Blobs() if data is None else data)
    finally:
        assert trainer.global_step == 0


def squares(outputs, labels):
    return (outputs - labels).square().mean()  # of shapes that do not go together


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (monitor(network=None), {}, "Net has no forward: name the submodule that has one in network"),
        (monitor(data="val"), {"limit_val_batches": 0}, "data='val' needs validation data, and there are none"),
        (monitor(), {"precision": "bf16-true"}, "net.1.weight is torch.bfloat16, too coarse for second derivatives"),
        (monitor(loss=nn.CrossEntropyLoss(reduction="sum")), {}, "is no mean over a batch"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(tmp_path, callback, options, message):
    with pytest.raises(ValueError, match=message):
        fit_refused(tmp_path, callback, **options)


def test_several_training_loaders_and_a_loss_of_other_shapes_are_refused_before_the_first_step(tmp_path):
    data = Blobs()
    data.setup("fit")
    loader = DataLoader(TensorDataset(*data.splits["train"]), 7)
    with pytest.raises(ValueError, match="data='train' needs one training loader, and there are several: choose 'val'"):
        fit_refused(tmp_path, monitor(), data=[loader, loader], limit_val_batches=0)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fit_refused(tmp_path, monitor(loss=squares))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fisher"}, "kind='fisher' is not known: choose one of hessian, ggn"),
        ({"data": "test"}, "data='test' is not known: choose one of train, val"),
        ({"draws": 0}, "batches=2, draws=0: choose 1 or more of either"),
    ],
)
def test_options_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        monitor(**options)


# ---- two processes


def main(folder):
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    callback, after = monitor(batches=2, draws=999), []
    for callbacks in ([callback], []):
        module = seeded(0, Net)
        L.seed_everything(7 * rank, verbose=False)  # dropout differs between the ranks
        quiet(folder, callbacks, **STEPS, strategy="ddp", devices=2).fit(module, Blobs(batch_size=6))
        after.append(bits(module))
    tensors = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
    found = {"trace": callback.results["network"].trace, "as without it": after[0] == after[1], "tensors": tensors}
    (folder / f"rank_{rank}.json").write_text(json.dumps(found))


def test_the_first_of_two_processes_measures_and_both_know(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "MASTER_PORT")}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert first["trace"] == second["trace"]
    assert first["as without it"]
    assert second["as without it"]
    module, data = Net(), Blobs(batch_size=6)
    module.load_state_dict(
        {n: torch.tensor(v, dtype=module.state_dict()[n].dtype) for n, v in first["tensors"].items()}
    )
    data.setup("fit")
    data._place = lambda: (0, 2)
    loader = data.train_dataloader()
    loader.load_state_dict({"epoch": 1, "batch": 1})  # 6 steps of 5 an epoch
    matrix = Curvature(module.net, loader, count=2)
    assert first["trace"] == pytest.approx(float((matrix @ torch.eye(KEPT)).trace()), rel=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
