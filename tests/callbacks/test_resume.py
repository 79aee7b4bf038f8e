"""A level that is interrupted anywhere and taken up by new objects ends in the bits of an unbroken one."""

import shutil
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from stranger import Blobs, Interrupted, Lottery, Net, StopAt, bits, fit_with, quiet, seeded, ticket_of

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, ResumeCheckpoint, ValidationCurve

PLANS = {  # every 4 steps a validation and a checkpoint; the rewind point before, at and behind them
    "0it": {"rewind": "0it"},
    "4it": {"rewind": "4it"},
    "6it": {"rewind": "6it"},
    "1ep": {"rewind": "1ep", "trainer": {"max_epochs": 3}},  # validations and checkpoints at the ends of epochs
    "1ep and steps": {"rewind": "1ep"},
    "1ep and 30 steps": {"rewind": "1ep", "trainer": {"max_steps": 30, "check_val_every_n_epoch": 1}},
    "6it of epochs": {"rewind": "6it", "trainer": {"max_epochs": 3}},
    "1ep, accumulated": {"rewind": "1ep", "trainer": {"max_epochs": 3, "accumulate_grad_batches": 2}},
    "learning_rate": {"rewind": "6it", "retrain": "learning_rate"},
    "fine_tune": {"rewind": "6it", "retrain": "fine_tune"},
}
SCHEDULE = {"1ep": "multistep", "1ep and steps": "multistep", "6it of epochs": "multistep"}


def lottery(folder, plan):
    return Lottery(folder, partial(Net, schedule=SCHEDULE.get(plan, "onecycle")), **PLANS[plan])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Unbroken lotteries of levels 0 and 1 by plan, each run once."""
    done = {}

    def get(plan):
        if plan not in done:
            done[plan] = lottery(tmp_path_factory.mktemp(plan), plan).run(1)
        return done[plan]

    return get


def break_off(folder, plan, level, step, hook, keep=None):
    """Fit `level` until it is interrupted; the levels before it are copied from an unbroken lottery."""
    if keep:
        (folder / "tickets").mkdir(parents=True)
        for number in range(level + 1):
            if level or number:
                shutil.copy(keep.imp.ticket_path(number), folder / "tickets")
    broken = lottery(folder, plan)
    chosen = broken.imp.select(level)
    with pytest.raises(Interrupted):
        broken.fit(chosen, StopAt(step, hook), ResumeCheckpoint(chosen.run_dir, 0))
    return broken


def take_up(folder, plan, level, seed=None):
    """A new process: other objects, another initialisation, and another random state unless `seed` says so."""
    resumed = lottery(folder, plan)
    resumed.module = seeded(31, resumed.make) if seed is None else resumed.module
    chosen = resumed.imp.select(level)
    resumed.fit(chosen, ResumeCheckpoint(chosen.run_dir, 0), seed=977 if seed is None else seed)
    return resumed, chosen


def assert_same(resumed, whole, level):
    assert bits(resumed.finals[0]) == bits(whole.finals[level])
    assert resumed.curves[0] == whole.curves[level]
    for number in range(level + 2):
        assert resumed.imp.ticket_path(number).read_bytes() == whole.imp.ticket_path(number).read_bytes(), number


CUTS = [  # plan, level, where it is interrupted, the step of the checkpoint that it is taken up from
    ("0it", 0, 3, "on_train_batch_end", None),
    ("0it", 0, 5, "on_train_batch_end", 4),
    ("0it", 0, 8, "on_train_batch_end", 4),
    ("0it", 0, 8, "on_validation_batch_end", 4),
    ("0it", 0, 23, "on_train_batch_end", 20),
    ("0it", 1, 2, "on_train_batch_end", None),
    ("0it", 1, 4, "on_train_batch_start", 4),
    ("0it", 1, 24, "on_validation_start", 20),
    ("0it", 1, 24, "on_train_end", 24),
    ("4it", 0, 4, "on_train_batch_end", None),
    ("4it", 0, 5, "on_train_batch_end", 4),
    ("4it", 0, 9, "on_train_batch_end", 8),
    ("4it", 1, 9, "on_train_batch_end", 8),
    ("6it", 0, 5, "on_train_batch_end", 4),
    ("6it", 0, 6, "on_train_batch_end", 4),
    ("6it", 0, 7, "on_train_batch_end", 4),
    ("6it", 0, 8, "on_validation_end", 4),
    ("6it", 0, 9, "on_train_batch_end", 8),
    ("6it", 1, 7, "on_train_batch_end", None),
    ("6it", 1, 9, "on_train_batch_end", 8),
    ("6it", 1, 18, "on_train_epoch_end", 16),
    ("6it", 1, 18, "on_train_epoch_start", 16),
    ("1ep", 0, 9, "on_validation_start", None),
    ("1ep", 0, 9, "on_train_epoch_end", 9),
    ("1ep", 0, 9, "on_train_epoch_start", 9),
    ("1ep", 0, 10, "on_train_batch_end", 9),
    ("1ep", 0, 19, "on_train_batch_end", 18),
    ("1ep", 1, 17, "on_train_batch_end", None),
    ("1ep", 1, 18, "on_train_epoch_end", 18),
    ("1ep", 1, 20, "on_train_batch_end", 18),
    ("1ep and steps", 1, 13, "on_train_batch_end", 12),
    ("1ep and steps", 1, 18, "on_train_epoch_end", 16),
    ("1ep and steps", 1, 21, "on_train_batch_end", 20),
    ("1ep and 30 steps", 1, 20, "on_train_batch_end", 18),
    ("6it of epochs", 1, 10, "on_train_batch_end", 9),
    ("6it of epochs", 1, 20, "on_train_batch_end", 18),
    ("1ep, accumulated", 0, 7, "on_train_batch_end", 5),
    ("1ep, accumulated", 1, 12, "on_train_batch_end", 10),
    ("learning_rate", 1, 9, "on_train_batch_end", 8),
    ("fine_tune", 1, 2, "on_train_batch_end", None),
    ("fine_tune", 1, 9, "on_train_batch_end", 8),
    ("fine_tune", 1, 20, "on_validation_end", 16),
]


@pytest.mark.parametrize(("plan", "level", "step", "hook", "newest"), CUTS)
def test_an_interrupted_level_ends_in_the_bits_of_an_unbroken_one(tmp_path, unbroken, plan, level, step, hook, newest):
    whole = unbroken(plan)
    break_off(tmp_path, plan, level, step, hook, whole)
    resumed, chosen = take_up(tmp_path, plan, level, seed=None if newest else 100 + level)
    assert (chosen.checkpoint.name if newest else chosen.checkpoint) == (
        f"resume-step={newest}.ckpt" if newest else None
    )
    assert resumed.probes[0].steps == [step for step in whole.probes[level].steps if step[0] >= (newest or 0)]
    assert_same(resumed, whole, level)


def test_the_level_after_a_resumed_one_is_unbroken_too(tmp_path, unbroken):
    whole = unbroken("6it")
    break_off(tmp_path, "6it", 0, 9, "on_train_batch_end")
    resumed = lottery(tmp_path, "6it").run(1)
    assert [bits(final) for final in resumed.finals] == [bits(final) for final in whole.finals]
    assert resumed.curves == whole.curves


def test_a_level_may_be_interrupted_again_and_again(tmp_path, unbroken):
    whole = unbroken("6it")
    break_off(tmp_path, "6it", 0, 5, "on_train_batch_end")
    for step, seed in ((7, 1), (9, 2), (9, 3), (14, 4), (21, 5)):
        again = lottery(tmp_path, "6it")
        chosen = again.imp.select(0)
        with pytest.raises(Interrupted):
            again.fit(chosen, StopAt(step), ResumeCheckpoint(chosen.run_dir, 0), seed=seed)
    resumed, _ = take_up(tmp_path, "6it", 0)
    assert_same(resumed, whole, 0)
    assert sorted(path.name for path in tmp_path.rglob("*.ckpt")) == ["resume-step=20.ckpt", "resume-step=24.ckpt"]


def test_a_ticket_is_taken_up_as_a_level_is(tmp_path, unbroken):
    whole = unbroken("6it")
    ticket = whole.imp.ticket_path(1)
    with pytest.raises(Interrupted):
        fit_with(
            tmp_path, seeded(8, whole.make), Blobs(), ApplyTicket(ticket), ResumeCheckpoint(tmp_path, 0), StopAt(13),
            seed=101, enable_checkpointing=True,
        )  # fmt: skip
    module, curve = seeded(9, whole.make), ValidationCurve(metrics=())
    L.seed_everything(977, verbose=False)
    path = tmp_path / "resume-step=12.ckpt"
    quiet(tmp_path, [ApplyTicket(ticket), curve]).fit(module, Blobs(), ckpt_path=path)
    assert bits(module) == bits(whole.finals[1])
    assert curve.rows == whole.curves[1]


@pytest.mark.parametrize("weights", ["rewind", "reinit"])
@pytest.mark.parametrize("mask", ["ticket", "layerwise_random", "global_random"])
def test_a_control_is_taken_up_as_a_ticket_is(tmp_path, unbroken, weights, mask):
    whole = unbroken("6it")

    def control():
        return ApplyTicket(whole.imp.ticket_path(1), weights, mask, seed=4)

    through, curve, _ = fit_with(tmp_path, seeded(8, whole.make), Blobs(), control(), seed=101)
    with pytest.raises(Interrupted):
        fit_with(
            tmp_path, seeded(8, whole.make), Blobs(), control(), ResumeCheckpoint(tmp_path, 0), StopAt(13),
            seed=101, enable_checkpointing=True,
        )  # fmt: skip
    module, again = seeded(9, whole.make), ValidationCurve(metrics=())
    L.seed_everything(977, verbose=False)
    quiet(tmp_path, [control(), again]).fit(module, Blobs(), ckpt_path=tmp_path / "resume-step=12.ckpt")
    assert bits(module) == bits(through)
    assert again.rows == curve.rows


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_a_torn_newest_checkpoint_falls_back_to_the_other_and_says_so(tmp_path, unbroken):
    broken = break_off(tmp_path, "6it", 1, 14, "on_train_batch_end", unbroken("6it"))
    truncate(broken.imp.select(1).run_dir / "resume-step=12.ckpt")
    with pytest.warns(UserWarning, match="resume-step=12.ckpt is torn"):
        resumed, chosen = take_up(tmp_path, "6it", 1)
    assert chosen.checkpoint.name == "resume-step=8.ckpt"
    assert_same(resumed, unbroken("6it"), 1)


@pytest.mark.parametrize("level", [0, 1])
def test_where_both_checkpoints_are_torn_the_level_begins_anew(tmp_path, unbroken, level):
    broken = break_off(tmp_path, "6it", level, 14, "on_train_batch_end", unbroken("6it"))
    for name in ("resume-step=8.ckpt", "resume-step=12.ckpt"):
        truncate(broken.imp.select(0 if level == 0 else 1).run_dir / name)
    with pytest.warns(UserWarning, match="is torn") as warned:
        resumed, chosen = take_up(tmp_path, "6it", level, seed=100 + level)
    assert chosen.checkpoint is None
    assert len({str(w.message) for w in warned if "is torn" in str(w.message)}) == 2
    assert_same(resumed, unbroken("6it"), level)


def checkpoint_of(folder, *callbacks):
    """A checkpoint at step 4 of a fit of `Net` with these callbacks."""
    trainer = quiet(folder, callbacks, max_steps=4, limit_val_batches=0)
    trainer.fit(seeded(0, Net), Blobs())
    trainer.save_checkpoint(folder / "some.ckpt")
    return folder / "some.ckpt"


@pytest.mark.parametrize("kind", ["lottery", "ticket"])
@pytest.mark.parametrize("other", ["plain", "another mask"])
def test_a_checkpoint_of_another_run_is_refused_in_one_line(tmp_path, kind, other):
    ticket = ticket_of(seeded(0, Net))
    if kind == "lottery":
        make = partial(IterativeMagnitudePruning, run_dir=tmp_path)
        another = IterativeMagnitudePruning(run_dir=tmp_path / "other")  # its checkpoint is one of level 1
        fit_with(tmp_path, seeded(0, Net), Blobs(), another)
    else:
        make = partial(ApplyTicket, ticket)
        another = ApplyTicket(ticket, mask="layerwise_random")
    path = checkpoint_of(tmp_path, *([] if other == "plain" else [another]))
    expected = "holds no mask" if other == "plain" else "holds another mask"
    module = seeded(5, Net)
    trainer = quiet(tmp_path, [make()])
    with pytest.raises(ValueError, match=expected) as refusal:
        trainer.fit(module, Blobs(), ckpt_path=path)
    assert "\n" not in str(refusal.value)
    assert path.name in str(refusal.value)


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_level_without_a_whole_ticket_is_refused_in_one_line(tmp_path, unbroken, damage):
    shutil.copytree(unbroken("0it").folder / "tickets", tmp_path / "tickets")
    path = tmp_path / "tickets" / "level_01.safetensors"
    truncate(path) if damage == "torn" else path.unlink()
    with pytest.raises(ValueError, match=r"level_01\.safetensors is missing or torn") as refusal:
        lottery(tmp_path, "0it").imp.select(1)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("damage", ["missing", "torn"])
@pytest.mark.parametrize("plan", ["0it", "4it"])
def test_a_resumed_level_0_without_its_rewind_point_is_refused_before_it_trains(tmp_path, plan, damage):
    broken = break_off(tmp_path, plan, 0, 9, "on_train_batch_end")
    path = broken.imp.ticket_path(0)
    truncate(path) if damage == "torn" else path.unlink()
    resumed, trained = lottery(tmp_path, plan), []
    chosen = resumed.imp.select(0)

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trained.append(trainer.global_step)

    with pytest.raises(ValueError, match=r"level_00\.safetensors is missing or torn"):
        resumed.fit(chosen, Count())
    assert trained == []


def test_an_aborted_resume_leaves_nothing_behind(tmp_path):
    ticket = ticket_of(seeded(0, Net))
    path = checkpoint_of(tmp_path, ApplyTicket(ticket))
    expected, _, _ = fit_with(tmp_path, seeded(2, Net), Blobs(), ApplyTicket(ticket), seed=1)
    callback, module = ApplyTicket(ticket), seeded(2, Net)
    with pytest.raises(Interrupted):
        quiet(tmp_path, [StopAt(0, "on_fit_start"), callback]).fit(module, Blobs(), ckpt_path=path)
    fit_with(tmp_path, module, Blobs(), callback, seed=1)
    assert bits(module) == bits(expected)


def test_a_smoke_test_leaves_no_checkpoint_that_a_run_would_go_on_from(tmp_path):
    smoke = lottery(tmp_path, "6it")
    smoke.trainer = {"fast_dev_run": True}
    smoke.fit(smoke.imp.select(0), ResumeCheckpoint(smoke.imp.select(0).run_dir, 0))
    assert [len(probe.steps) for probe in smoke.probes] == [1]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_resuming_goes_on_with_the_random_state_of_the_checkpoint(tmp_path):
    ticket, draws = ticket_of(seeded(0, Net)), {}

    class Draw(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            draws.setdefault(trainer.global_step, []).append(torch.get_rng_state().numpy().tobytes())

    keep = ResumeCheckpoint(tmp_path, 0)
    fit_with(tmp_path, seeded(0, Net), Blobs(), ApplyTicket(ticket), keep, Draw(), enable_checkpointing=True)
    L.seed_everything(977, verbose=False)
    path = tmp_path / "resume-step=20.ckpt"
    quiet(tmp_path, [ApplyTicket(ticket), Draw()]).fit(seeded(3, Net), Blobs(), ckpt_path=path)
    assert [len(states) for states in draws.values()] == [1] * 20 + [2] * 4
    assert all(len(set(draws[step])) == 1 for step in range(20, 24))
    assert len({states[0] for states in draws.values()}) == 24  # dropout draws at every step
