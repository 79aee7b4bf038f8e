"""Lines from what a fit has trained: right at their ends, of the right networks, and without a trace in any run."""

import gc
import logging
import math
import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from stranger import Blobs, Interrupted, Lottery, Net, StopAt, bits, quiet, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, LinearModeConnectivity, Ticket
from lottery_callbacks.functional.evaluation import evaluate_on
from lottery_callbacks.functional.interpolation import along, interpolate
from lottery_lightning.tasks import ImageClassifier

STEPS = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}


def lmc(**options):
    return LinearModeConnectivity(**({"points": 4, "network": "net"} | options))


class Recorder(L.Callback):
    """Everything of the process that a monitor may not change, at each batch and after the fit's last hook."""

    def __init__(self, global_rng):
        self.global_rng, self.rows = global_rng, []

    def record(self, module, batch=()):
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        modes = [part.training for part in module.modules()]
        labels = batch[1].tolist() if isinstance(batch, list | tuple) and batch else None  # a visit is no list
        self.rows.append((bits(module), bits(gradients), modes, self.global_rng(), labels))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.record(pl_module, batch)

    def on_fit_end(self, trainer, pl_module):
        self.record(pl_module)
        loader = trainer.train_dataloader
        self.rows.append((getattr(loader, "state_dict", dict)(), getattr(loader, "visits", None) is None))

    def visit_ends(self, per_epoch, last):
        return ()

    def teardown(self, trainer, pl_module, stage):
        self.record(pl_module)
        self.rows.append((trainer.state.stage, trainer.training, trainer.global_step))


def loaders(kind):
    """A function that gives each level its data: a new data module, or the same loaders with draws of their own."""
    data = Blobs()
    if kind == "data module":
        return Blobs
    data.setup("fit")
    train, val = (TensorDataset(*data.splits[name]) for name in ("train", "val"))
    own = torch.Generator().manual_seed(5)
    if kind == "generator":
        sampler = RandomSampler(train, generator=torch.Generator().manual_seed(6))
        made = DataLoader(train, 7, sampler=sampler, generator=own), DataLoader(val, 8, shuffle=True, generator=own)
    else:
        made = DataLoader(train, 7, shuffle=True), DataLoader(val, 8, shuffle=True)
    return lambda: made


@pytest.mark.parametrize(
    ("kind", "norms"),
    [("data module", "average"), ("data module", "reestimate"), ("shuffled", "average"), ("generator", "reestimate")],
)
def test_three_levels_are_bit_for_bit_those_without_it(tmp_path, global_rng, kind, norms):
    found = []
    for name, callbacks in (("without", []), ("with", [lmc(norms=norms)])):
        module, recorder, get = seeded(0, Net), Recorder(global_rng), loaders(kind)
        imp = IterativeMagnitudePruning(rate=0.3, rewind="2it", run_dir=tmp_path / name)
        L.seed_everything(3, verbose=False)  # once: a draw too many at the end of a level shifts the next one
        for level in imp.levels(2):
            data = get()
            data = {"datamodule": data} if isinstance(data, Blobs) else dict(zip(LOADERS, data, strict=True))
            quiet(level.run_dir, [imp, *callbacks, recorder], **STEPS).fit(module, **data)
        found.append((recorder.rows, [imp.ticket_path(level).read_bytes() for level in range(4)]))
    assert len(callbacks[0].results["previous"].t) == 4
    assert found[0] == found[1]


LOADERS = ("train_dataloaders", "val_dataloaders")


def visiting(global_rng, folder, steps_per_visit, *callbacks):
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    module, recorder = ImageClassifier(network, num_classes=5, steps_per_visit=steps_per_visit), Recorder(global_rng)
    quiet(folder, [*callbacks, recorder], max_steps=12).fit(module, Blobs())
    return recorder.rows, module


def test_a_fit_in_visits_reestimates_over_the_same_batches_as_one_without(tmp_path, global_rng):
    lines, states = [], []
    with_save = tmp_path / "other.ckpt"
    other = seeded(9, lambda: visiting(global_rng, tmp_path, 1))[1]
    torch.save(other.state_dict(), with_save)
    for steps in (1, 4):
        for callbacks in ([], [LinearModeConnectivity([with_save], points=3, norms="reestimate", norm_batches=11)]):
            states.append(seeded(0, lambda: visiting(global_rng, tmp_path, steps, *callbacks))[0])  # noqa: B023
        lines.append(callbacks[0].results["other"])
    assert lines[0] == lines[1]
    assert states[0] == states[1]
    assert states[2] == states[3]
    assert len(states[2]) < len(states[0])  # there were visits
    assert states[0][-4][:2] == states[2][-4][:2]


def test_what_an_evaluation_draws_is_the_same_at_every_point_and_put_back(tmp_path, global_rng):
    def loss(module, batch):
        module.net(batch[0])
        return torch.tensor([random.random() + float(np.random.rand()) + float(torch.rand(()))])  # noqa: NPY002

    after = []
    for callbacks in ([], [lmc(loss=loss, norms="reestimate")]):
        for seed in range(2):
            quiet(tmp_path, callbacks, **STEPS).fit(seeded(seed, Net), Blobs())
        after.append(global_rng())
    assert after[0] == after[1]
    line = callbacks[0].results["previous"]
    assert len(set(line.losses)) == 1
    assert line.norms == "reestimate"


def test_one_copy_of_the_network_stays_in_memory_after_each_fit(tmp_path):
    def copies():
        gc.collect()
        return sum(isinstance(one, torch.Tensor) and one.shape == (12, 6) for one in gc.get_objects())

    module, data, before = seeded(0, Net), Blobs(), None
    for callbacks, more in (([], 0), ([callback := lmc()], 1), ([callback], 1), ([callback], 1)):
        quiet(tmp_path, callbacks, **STEPS).fit(module, data)
        before = copies() if before is None else before
        assert copies() == before + more


# ---- what is measured


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """Three levels of a lottery with the callback: it, the last weights of each, what it found, and the lottery."""
    folder = tmp_path_factory.mktemp("levels")
    callback, found = lmc(points=5), []
    lottery = Lottery(folder, Net, rewind="2it", trainer=STEPS)
    for level in lottery.imp.levels(2):
        lottery.fit(level, callback, ModelCheckpoint(level.run_dir, "last"))
        found.append(callback.results)
    return callback, lottery, found


def test_each_level_is_compared_with_the_one_before(levels):
    _, lottery, found = levels
    data, net = Blobs(), Net()
    data.setup("fit")
    evaluate = evaluate_on([data.splits["val"]])
    assert found[0] == {}
    for level in (1, 2):
        ends = lottery.finals[level], lottery.finals[level - 1]
        expected = along(net, *ends, lambda module: evaluate(module.net), 5)
        assert found[level] == {"previous": expected}
        assert expected.norms == "average"
        assert len(set(expected.losses)) == 5


def test_the_ends_are_the_ordinary_validation_of_the_fit(tmp_path):
    first = tmp_path / "first.ckpt"
    losses = []
    for path in ([], [first]):
        callback = lmc(to=path, previous=False)
        module = seeded(len(path), Net)
        trainer = quiet(tmp_path, [callback], **STEPS)
        trainer.fit(module, Blobs())
        losses.append(float(trainer.callback_metrics["val/loss"]))
        trainer.save_checkpoint(first)
    line = callback.results["first"]
    assert (line.losses[-1], line.losses[0]) == pytest.approx(losses, rel=1e-6)


def test_the_line_stays_inside_the_mask_of_the_level_before(levels):
    _, lottery, _ = levels
    masks = Ticket.load(lottery.imp.ticket_path(1)).masks
    for t in (0.25, 0.5):
        state = interpolate(lottery.finals[2], lottery.finals[1], t)
        assert not any(state[name][~mask].any() for name, mask in masks.items())
    assert not all(mask.all() for mask in masks.values())


def test_a_level_that_is_resumed_by_a_new_process_knows_the_one_before(levels, tmp_path):
    *_, found = levels
    callbacks = [lmc(points=5) for _ in range(2)]
    imp = IterativeMagnitudePruning(rate=0.3, rewind="2it", run_dir=tmp_path)
    module = seeded(0, Net)
    for level in imp.levels(2):
        L.seed_everything(100 + level.number, verbose=False)
        saving = ModelCheckpoint(level.run_dir, "{step}", every_n_train_steps=1, save_top_k=-1)
        stop = [StopAt(5)] if level.number == 2 else []
        trainer = quiet(level.run_dir, [imp, callbacks[0], saving, *stop], **STEPS | {"enable_checkpointing": True})
        try:
            trainer.fit(module, Blobs())
        except Interrupted:
            break
    again = IterativeMagnitudePruning(rate=0.3, rewind="2it", run_dir=tmp_path)
    path = again.select(2).run_dir / "step=4.ckpt"
    quiet(tmp_path, [again, callbacks[1]], **STEPS).fit(seeded(8, Net), Blobs(), ckpt_path=path)
    assert callbacks[1].results == found[2]


def test_a_level_whose_forerunner_is_unknown_says_so_and_an_older_one_is_no_forerunner(levels, tmp_path):
    _, lottery, _ = levels
    tickets = [lottery.imp.ticket_path(level) for level in range(3)]
    callback = lmc()

    def fit(number):
        quiet(tmp_path, [ApplyTicket(tickets[number]), callback], **STEPS).fit(Net(), Blobs())
        return list(callback.results)

    with pytest.warns(UserWarning, match="last weights of level 0 are not known here, and there will be no line to th"):
        assert fit(1) == []
    assert fit(2) == ["previous"]
    assert fit(0) == []
    with pytest.warns(UserWarning, match="last weights of level 1 are not known here"):
        assert fit(2) == []


def test_fits_without_a_ticket_go_by_their_order(tmp_path):
    callback, ends = lmc(), []
    for seed in range(2):
        module = seeded(seed, Net)
        quiet(tmp_path, [callback], **STEPS).fit(module, Blobs())
        ends.append(module)
    assert list(callback.results) == ["previous"]
    data = Blobs()
    data.setup("fit")
    assert callback.results["previous"].losses[3] == evaluate_on([data.splits["val"]])(ends[0].net).loss


def test_a_test_of_a_checkpoint_leaves_what_it_knows_alone(levels, tmp_path):
    callback, lottery, _ = levels
    before = bits(callback.state_dict()["tensors"])
    path = lottery.folder / "level_01" / "last.ckpt"
    quiet(tmp_path, [lmc(points=5), callback][1:], max_steps=1).test(Net(), Blobs(), ckpt_path=path, verbose=False)
    assert bits(callback.state_dict()["tensors"]) == before
    assert callback.state_dict()["level"] == 2


def test_checkpoints_are_compared_by_name_whoever_wrote_them(levels, tmp_path):
    _, lottery, _ = levels
    lightning = lottery.folder / "level_01" / "last.ckpt"
    tensors = torch.load(lightning, weights_only=True)["state_dict"]
    bare, compiled, pruned = (tmp_path / f"{name}.pt" for name in ("bare", "compiled", "pruned"))
    torch.save(tensors, bare)
    torch.save({name.replace("net.", "net._orig_mod."): tensor for name, tensor in tensors.items()}, compiled)
    weight = "net.1.weight"
    mask = (tensors[weight] != 0).float()
    rest = {name: tensor for name, tensor in tensors.items() if name != weight}
    torch.save(rest | {f"{weight}_orig": tensors[weight] + (1 - mask), f"{weight}_mask": mask}, pruned)
    paths = {"lightning": lightning, "bare": bare, "compiled": compiled, "pruned": str(pruned)}
    callback = lmc(to=paths, previous=False)
    quiet(tmp_path, [callback], **STEPS).fit(seeded(4, Net), Blobs())
    assert list(callback.results) == list(paths)
    assert len({line.losses for line in callback.results.values()}) == 1
    assert callback.state_dict() == {}


def test_every_logger_gets_barrier_instability_and_the_line(tmp_path, caplog):
    callback = lmc()
    for seed in range(2):
        trainer = quiet(tmp_path, [callback], logger=CSVLogger(tmp_path, name="logs"), **STEPS)
        with caplog.at_level(logging.INFO, "lightning.pytorch"):
            trainer.fit(seeded(seed, Net), Blobs())
    trainer.logger.save()
    header, *lines = (tmp_path / "logs" / "version_1" / "metrics.csv").read_text().splitlines()
    last = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    line = callback.results["previous"]
    expected = {"barrier": line.barrier, "instability": line.instability}
    places = ("0.000", "0.333", "0.667", "1.000")
    expected |= {f"loss@{t}": loss for t, loss in zip(places, line.losses, strict=True)}
    expected |= {f"error@{t}": error for t, error in zip(places, line.errors, strict=True)}
    assert {k: float(v) for k, v in last.items() if k.startswith("lmc/")} == pytest.approx(
        {f"lmc/previous/{key}": value for key, value in expected.items()}
    )
    assert last["step"] == "6"
    assert f"line to previous: barrier {line.barrier:.4g}, instability {line.instability:.4g}" in caplog.messages


def test_batch_norm_is_reestimated_on_training_batches(levels, tmp_path):
    _, lottery, _ = levels
    path = lottery.folder / "level_01" / "last.ckpt"
    callbacks = [lmc(to=[path], norms=norms, norm_batches=9) for norms in ("average", "reestimate")]
    module = seeded(4, Net)
    quiet(tmp_path, callbacks, max_epochs=1).fit(module, data := Blobs())
    average, again = (callback.results["last"] for callback in callbacks)
    assert (average.norms, again.norms) == ("average", "reestimate")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)  # the fit has ended with epoch 0
    batches = list(loader)
    assert len(batches) == 9

    def reestimate(one):
        for inputs, _ in batches:
            one.net(inputs)

    tensors = torch.load(path, weights_only=True)["state_dict"]
    evaluate = evaluate_on([data.splits["val"]])
    expected = along(module, module.state_dict(), tensors, lambda one: evaluate(one.net), 4, "reestimate", reestimate)
    assert again.losses == pytest.approx(expected.losses, rel=1e-5)
    assert again.losses[0] == average.losses[0]
    assert again.losses[1] != average.losses[1]


def test_a_loss_of_ones_own_and_hooks_of_batches_are_used(tmp_path):
    class Hooked(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch if self.trainer.training else {"x": batch[0], "y": batch[1]}

        def validation_step(self, batch, batch_idx):
            assert isinstance(batch, dict)

    def loss(module, batch):
        return F.cross_entropy(module.net(batch["x"]), batch["y"], reduction="none")

    callback = lmc(loss=loss, network=None)
    for seed in range(2):
        trainer = quiet(tmp_path, [callback], **STEPS)
        trainer.fit(module := seeded(seed, Hooked), data := Blobs())
    line = callback.results["previous"]
    inputs, labels = data.splits["val"]
    expected = F.cross_entropy(module.eval().net(inputs), labels).item()
    assert line.losses[0] == pytest.approx(expected, rel=1e-6)
    assert math.isnan(line.instability)


@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (1.0, None)])
def test_all_validation_loaders_are_read_as_far_as_the_fit_does(tmp_path, limit, batches):
    data, callback = Blobs(), lmc()
    data.setup("fit")
    train, val = (TensorDataset(*data.splits[name]) for name in ("train", "val"))

    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    both = [DataLoader(val, 8), DataLoader(train, 16)]
    for seed in range(2):
        module = seeded(seed, Two)
        quiet(tmp_path, [callback], **STEPS, limit_val_batches=limit).fit(module, DataLoader(train, 7), both)
    seen = [batch for loader in both for batch in list(loader)[:batches]]
    assert callback.results["previous"].losses[0] == evaluate_on(seen)(module.net).loss


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-true", 1e-2), ("bf16-mixed", 1e-6), ("64-true", 1e-6)])
def test_other_precisions_are_evaluated_as_they_are_trained(tmp_path, precision, tolerance):
    callback = lmc()
    for seed in range(2):
        trainer = quiet(tmp_path, [callback], precision=precision, **STEPS)
        trainer.fit(module := seeded(seed, Net), Blobs())
    line = callback.results["previous"]
    assert all(map(math.isfinite, line.losses))
    assert line.losses[0] == pytest.approx(float(trainer.callback_metrics["val/loss"]), rel=tolerance)
    assert next(module.parameters()).dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(
        precision, torch.float32
    )


def test_compiled_networks_have_the_lines_of_plain_ones(tmp_path):
    class Compiled(Net):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    results = []
    for make in (Net, Compiled):
        callback = lmc()
        for seed in range(2):
            module = seeded(seed, make)
            L.seed_everything(seed, verbose=False)
            quiet(tmp_path, [callback], **STEPS).fit(module, Blobs())
        results.append(callback.results)
    torch.compiler.reset()
    assert results[0] == results[1]
    assert results[0]
