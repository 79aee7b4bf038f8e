"""The proof of the one idea: a level of the lottery is an ordinary run that trains a ticket (DESIGN, wall 10)."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from stranger import (
    Blobs,
    Interrupted,
    Lottery,
    Net,
    Probe,
    StopAt,
    bits,
    fit_with,
    frozen_state,
    masked,
    quiet,
    raw,
    seeded,
)

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, Ticket
from lottery_lightning.data import Digits, EpochOrder

DIGITS = partial(Digits, batch_size=50)  # 24 batches an epoch, the last one of 47
LIMITS = {"max_steps": 60, "val_check_interval": 7, "check_val_every_n_epoch": None}
STEPS = {"0it": 0, "17it": 17, "1ep": 24}


@pytest.fixture(scope="module", params=[(s, k) for s in ("onecycle", "multistep") for k in STEPS], ids="-".join)
def case(request, tmp_path_factory):
    """Levels 0 to 2 of a lottery with BatchNorm, dropout and a schedule, and level 0 without any of our callbacks."""
    schedule, rewind = request.param
    folder = tmp_path_factory.mktemp("identity")
    make = partial(Net, (64, 20, 10), schedule)
    lottery = Lottery(folder, make, DIGITS, rewind=rewind, trainer=LIMITS)
    points = []
    for level in lottery.imp.levels(2):
        lottery.fit(level)
        points.append((lottery.imp.ticket_path(0).read_bytes(), frozen_state(lottery.imp.ticket.rewind)))
    probe = Probe(STEPS[rewind])
    plain, curve, trace = fit_with(folder, seeded(0, make), DIGITS(), probe, seed=100, **LIMITS)
    return SimpleNamespace(
        k=STEPS[rewind], folder=folder, make=make, lottery=lottery, imp=lottery.imp, points=points,
        plain=plain, plain_curve=curve, plain_trace=trace, at_k=probe.state,
    )  # fmt: skip


def masks_of(case, level):
    return Ticket.load(case.imp.ticket_path(level)).masks


@pytest.mark.parametrize("level", [1, 2])
def test_a_level_equals_a_fresh_fit_with_its_ticket(case, level):
    ticket = ApplyTicket(case.imp.ticket_path(level))
    module, curve, _ = fit_with(case.folder, seeded(5 + level, case.make), DIGITS(), ticket, seed=100 + level, **LIMITS)
    assert bits(module) == bits(case.lottery.finals[level])
    assert curve.rows == case.lottery.curves[level]
    assert [row["iteration"] for row in curve.rows] == [step for step in range(7, 61, 7) if step > case.k]


def test_level_0_equals_the_run_without_the_callback(case):
    assert bits(case.plain) == bits(case.lottery.finals[0])
    assert case.plain_curve.rows == case.lottery.curves[0]
    assert case.plain_trace.steps == case.lottery.probes[0].steps
    assert case.plain_trace.labels == case.lottery.probes[0].labels


@pytest.mark.parametrize("level", [1, 2])
def test_a_level_begins_with_the_masked_weights_and_the_other_state_of_step_k(case, level):
    start, masks = case.lottery.probes[level].state, masks_of(case, level)
    assert start["step"] == case.at_k["step"] == case.k
    assert masks.keys() == {"net.1.weight", "net.5.weight"}
    assert not any(mask.all() for mask in masks.values())
    for name, tensor in case.at_k["module"].items():
        expected = masked(tensor, masks[name]) if name in masks else tensor
        assert raw(start["module"][name]) == raw(expected), name
    for name, state in case.at_k["optimizer"].items():
        assert bool(state) == (case.k > 0)
        if name in masks and state:
            state = {"momentum_buffer": masked(state["momentum_buffer"], masks[name])}
        assert frozen_state(start["optimizer"][name]) == frozen_state(state), name
    assert start["groups"] == case.at_k["groups"]
    assert start["schedulers"] == case.at_k["schedulers"]


@pytest.mark.parametrize("level", [1, 2])
def test_a_level_goes_on_from_step_k_in_steps_epochs_batches_and_learning_rates(case, level):
    steps = case.lottery.probes[level].steps
    assert steps == case.plain_trace.steps[case.k :]
    assert len({rate for *_, rate in case.plain_trace.steps}) > 1  # the schedule moves


@pytest.mark.parametrize("level", [1, 2])
def test_a_level_sees_its_own_order_of_the_data_from_batch_k_on(case, level):
    digits = DIGITS()
    digits.setup("fit")
    labels = digits.splits["train"][1]
    expected = []
    for epoch in range(3):
        order = EpochOrder(0, level)
        order.set_epoch(epoch)
        expected += [batch.tolist() for batch in labels[order.permutation(len(labels))].split(50)]
    assert case.lottery.probes[level].labels == expected[case.k : 60]


def test_the_rewind_point_never_changes(case):
    assert len(case.points) == 3
    assert all(point == case.points[0] for point in case.points)
    first = Ticket.load(case.imp.ticket_path(0)).rewind
    assert first.step == case.k
    assert bits(first.tensors) == bits(case.at_k["module"])
    for level in (1, 2, 3):
        assert frozen_state(Ticket.load(case.imp.ticket_path(level)).rewind) == frozen_state(first)


def test_each_mask_keeps_the_largest_trained_weights_of_the_one_before(case):
    for level in (0, 1, 2):
        before, after = masks_of(case, level), masks_of(case, level + 1)
        for name, mask in before.items():
            weights = case.lottery.finals[level][name].abs()
            alive = int(mask.sum())
            keep = alive - round(0.3 * alive)
            threshold = weights[mask].sort(descending=True).values[keep - 1]
            assert int(after[name].sum()) == keep
            assert torch.equal(after[name], mask & (weights >= threshold)), name


@pytest.mark.parametrize("rewind", ["0it", "17it"])
@pytest.mark.parametrize("schedule", ["onecycle", "multistep"])
def test_learning_rate_rewinding_keeps_trained_weights_and_rewinds_the_rest(tmp_path, schedule, rewind):
    k, make = STEPS[rewind], partial(Net, (64, 20, 10), schedule)
    lottery = Lottery(tmp_path, make, DIGITS, rewind=rewind, trainer=LIMITS, retrain="learning_rate").run(2)
    at_k = Probe(k)
    fit_with(tmp_path, seeded(0, make), DIGITS(), at_k, seed=100, **LIMITS)
    for level in (1, 2):
        start, ticket = lottery.probes[level].state, Ticket.load(lottery.imp.ticket_path(level))
        trained = lottery.finals[level - 1]
        expected = {n: masked(t, ticket.masks[n]) if n in ticket.masks else t for n, t in trained.items()}
        assert bits(start["module"]) == bits(expected)
        momentum = at_k.state["optimizer"]["net.1.weight"].get("momentum_buffer")
        saved = {} if momentum is None else {"momentum_buffer": masked(momentum, ticket.masks["net.1.weight"])}
        assert frozen_state(start["optimizer"]["net.1.weight"]) == frozen_state(saved)
        assert start["schedulers"] == at_k.state["schedulers"]
        assert lottery.probes[level].steps == lottery.probes[0].steps[k:]
        module, curve, _ = fit_with(
            tmp_path, seeded(9, make), DIGITS(), ApplyTicket(ticket), seed=100 + level, **LIMITS
        )
        assert bits(module) == bits(lottery.finals[level])
        assert curve.rows == lottery.curves[level]


@pytest.mark.parametrize("rewind", ["0it", "17it"])
def test_a_partial_rewind_leaves_biases_norms_and_statistics_as_trained(tmp_path, rewind):
    make = partial(Net, (64, 20, 10), "multistep")
    lottery = Lottery(tmp_path, make, DIGITS, rewind=rewind, trainer=LIMITS, retrain="prunable_weights").run(2)
    first = Ticket.load(lottery.imp.ticket_path(0)).rewind
    for level in (1, 2):
        start, ticket = lottery.probes[level].state, Ticket.load(lottery.imp.ticket_path(level))
        trained = lottery.finals[level - 1]
        assert {"net.1.bias", "net.2.running_mean"} <= trained.keys() - ticket.masks.keys()
        rewound = {name: masked(first.tensors[name], mask) for name, mask in ticket.masks.items()}
        assert bits(start["module"]) == bits(trained | rewound)
        assert frozen_state(ticket.rewind.training) == frozen_state(first.training)
        assert lottery.probes[level].steps == lottery.probes[0].steps[STEPS[rewind] :]


@pytest.mark.parametrize("schedule", ["onecycle", "multistep"])
def test_fine_tuning_keeps_trained_weights_and_the_last_learning_rate(tmp_path, schedule):
    make = partial(Net, (64, 20, 10), schedule)
    lottery = Lottery(tmp_path, make, DIGITS, rewind="17it", trainer=LIMITS, retrain="fine_tune").run(2)
    (group,) = lottery.module.trainer.optimizers[0].param_groups
    last = Lottery(tmp_path / "dense", make, DIGITS, trainer=LIMITS).run(0).module.trainer.optimizers[0]
    assert group["lr"] == last.param_groups[0]["lr"]
    for level in (1, 2):
        probe, ticket = lottery.probes[level], Ticket.load(lottery.imp.ticket_path(level))
        trained = lottery.finals[level - 1]
        expected = {n: masked(t, ticket.masks[n]) if n in ticket.masks else t for n, t in trained.items()}
        assert bits(probe.state["module"]) == bits(expected)
        assert not any(probe.state["optimizer"].values())
        assert [step for step, *_ in probe.steps] == list(range(60))
        assert {rate for *_, rate in probe.steps} == {group["lr"]}
        module, curve, _ = fit_with(
            tmp_path, seeded(9, make), DIGITS(), ApplyTicket(ticket), seed=100 + level, **LIMITS
        )
        assert bits(module) == bits(lottery.finals[level])
        assert curve.rows == lottery.curves[level]


def test_one_data_order_for_all_levels_where_it_is_asked_for(tmp_path):
    repeat = Lottery(tmp_path, Net, partial(Blobs, data_order="repeat")).run(1)
    assert repeat.probes[0].labels == repeat.probes[1].labels


@pytest.mark.parametrize("rewind", ["0it", "3it"])
def test_a_level_0_that_is_begun_anew_by_the_same_object_takes_its_own_rewind_point(tmp_path, rewind):
    imp = IterativeMagnitudePruning(rewind=rewind, run_dir=tmp_path)
    with pytest.raises(Interrupted):
        fit_with(tmp_path, seeded(1, Net), Blobs(), imp, StopAt(5))
    at_k = Probe(imp.rewind.count)
    fit_with(tmp_path, seeded(2, Net), Blobs(), imp, at_k)
    assert bits(imp.ticket.rewind.tensors) == bits(at_k.state["module"])


@pytest.mark.parametrize("wrapped", ["sequential", "lambda"])
def test_other_schedules_go_on_from_step_k(tmp_path, wrapped):
    schedulers = torch.optim.lr_scheduler

    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
            if wrapped == "lambda":
                scheduler = schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            else:
                parts = [schedulers.LinearLR(optimizer, 0.1, 1, 4), schedulers.MultiStepLR(optimizer, [4, 4, 9])]
                scheduler = schedulers.SequentialLR(optimizer, parts, milestones=[4])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    lottery = Lottery(tmp_path, Scheduled, rewind="6it").run(1)
    rates = [[rate for *_, rate in probe.steps] for probe in lottery.probes]
    assert len(set(rates[0])) > 2
    assert rates[1] == rates[0][6:]
    module, curve, _ = fit_with(
        tmp_path, seeded(9, Scheduled), Blobs(), ApplyTicket(lottery.imp.ticket_path(1)), seed=101
    )
    assert bits(module) == bits(lottery.finals[1])
    assert curve.rows == lottery.curves[1]


def test_a_plateau_schedule_is_rewound_to_the_beginning_only(tmp_path):
    class Plateau(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)
            config = {"scheduler": plateau, "interval": "step", "frequency": 4, "monitor": "val/loss", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": config}

    lottery = Lottery(tmp_path / "0it", Plateau, rewind="0it").run(1)
    assert [len({rate for *_, rate in probe.steps}) > 1 for probe in lottery.probes] == [True, True]
    with pytest.raises(ValueError, match="ReduceLROnPlateau cannot be rewound to a step k > 0"):
        Lottery(tmp_path / "6it", Plateau, rewind="6it").run(0)


def test_precision_and_accumulation_are_part_of_the_identity(tmp_path):
    options = {"max_epochs": 3, "precision": "bf16-mixed", "accumulate_grad_batches": 2}
    lottery = Lottery(tmp_path, Net, rewind="1ep", trainer=options).run(1)
    assert lottery.imp.ticket.rewind.step == 5  # 9 batches, the last one steps by itself
    assert lottery.probes[1].steps == lottery.probes[0].steps[9:]
    plain, curve, _ = fit_with(tmp_path, seeded(0, Net), Blobs(), seed=100, **options)
    assert bits(plain) == bits(lottery.finals[0])
    assert curve.rows == lottery.curves[0]
    module, curve, _ = fit_with(
        tmp_path, seeded(9, Net), Blobs(), ApplyTicket(lottery.imp.ticket_path(1)), seed=101, **options
    )
    assert bits(module) == bits(lottery.finals[1])
    assert curve.rows == lottery.curves[1]


@pytest.mark.parametrize("rewind", ["0it", "6it", "1ep"])
def test_logged_steps_and_epoch_hooks_go_on_from_step_k(tmp_path, rewind):
    logged, epochs = {}, {}

    class Steps(DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.setdefault(level.number, []).extend((name, step) for name in metrics)

    class Logged(Net):
        def on_train_epoch_start(self):
            epochs.setdefault(level.number, []).append((self.trainer.global_step, self.current_epoch))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss)
            return loss

    lottery = Lottery(tmp_path, Logged, rewind=rewind, trainer={"max_epochs": 3, "log_every_n_steps": 1})
    for level in lottery.imp.levels(1):
        lottery.trainer["logger"] = Steps()
        lottery.fit(level)
    k = lottery.imp.ticket.rewind.step
    train, val = ([entry for entry in logged[0] if entry[0] == name] for name in ("train/loss", "val/loss"))
    assert [step for _, step in train] == list(range(27))
    assert [entry for entry in logged[1] if entry[0] == "train/loss"] == train[k:]
    assert [entry for entry in logged[1] if entry[0] == "val/loss"] == [entry for entry in val if entry[1] >= k]
    assert epochs[0] == [(0, 0), (9, 1), (18, 2)]
    assert epochs[1] == [entry for entry in epochs[0] if entry[0] >= k]


def test_the_trainer_of_one_level_is_not_taken_for_another(tmp_path):
    imp, module = IterativeMagnitudePruning(run_dir=tmp_path), seeded(0, Net)
    trainer = quiet(tmp_path, [imp])
    trainer.fit(module, Blobs())
    with pytest.raises(ValueError, match="Trainer"):  # its loops are at their end: it would train no step
        trainer.fit(module, Blobs())
