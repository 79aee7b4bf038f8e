"""A fit over ordinary DataLoaders that is torn goes on with the batches that are left, to the same bits."""

import pytest
from ordinary_loaders import LOADERS, fit, quick_or_slow, torn
from stranger import StopAt, bits


@pytest.mark.parametrize(
    ("keeper", "step"), [("resume, each 3", 13), ("resume, each 3", 17), ("model, each 3", 7), ("model, each 3", 23)]
)
@pytest.mark.parametrize("loader", [name for name in LOADERS if "workers" not in name])
def test_a_torn_fit_sees_the_batches_and_ends_in_the_bits_of_an_unbroken_one(tmp_path, loader, keeper, step):
    whole, resumed, data = torn(tmp_path, loader, keeper, step)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert bits(resumed) == bits(whole)
    assert data.read == [index for _, _, batch in resumed.seen for index in batch] or "two" in loader


@pytest.mark.parametrize(
    ("keeper", "step"),
    [("resume, each epoch", 9), ("resume, each epoch", 16), ("model, each epoch", 20), ("model, epoch ends", 16)],
)
@pytest.mark.parametrize(
    "loader", ["shuffled", "generator", "numpy generator", "an iterable of one's own", "two shuffled"]
)
def test_a_fit_torn_after_an_epoch_draws_the_next_order_as_an_unbroken_one(tmp_path, loader, keeper, step):
    whole, resumed, _ = torn(tmp_path, loader, keeper, step)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert bits(resumed) == bits(whole)


@pytest.mark.parametrize(
    ("keeper", "step"),
    [("resume, each 3", 13), ("model, each 3", 7), ("resume, each epoch", 18), ("model, epoch ends", 18)],
)
@pytest.mark.parametrize("loader", quick_or_slow(name for name in LOADERS if "workers" in name))
def test_workers_go_on_too(tmp_path, loader, keeper, step):
    whole, resumed, _ = torn(tmp_path, loader, keeper, step)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert bits(resumed) == bits(whole)


def test_resume_checkpoint_alone_keeps_the_order_and_the_random_state(tmp_path):
    whole, resumed, data = torn(tmp_path, "shuffled", "resume, each 3", 13, masked=False)
    assert resumed.seen == whole.seen[12:]
    assert bits(resumed) == bits(whole)
    assert len(data.read) == 5 * len(resumed.seen)


def test_a_fit_torn_twice_in_one_epoch_goes_on_twice(tmp_path):
    whole, _ = fit(tmp_path / "whole", "shuffled", "model, each 3")
    for step, seed in ((11, 0), (14, 55)):
        fit(tmp_path / "torn", "shuffled", "model, each 3", StopAt(step), seed=seed)
    resumed, _data = fit(tmp_path / "torn", "shuffled", "model, each 3", seed=99)
    assert resumed.seen == whole.seen[12:]
    assert bits(resumed) == bits(whole)


@pytest.mark.parametrize("loader", ["shuffled", "generator", "two shuffled", "workers"])
@pytest.mark.parametrize("step", [0, 8, 11])
def test_a_fit_that_failed_in_a_batch_repeats_that_batch(tmp_path, loader, step):
    whole, resumed, _ = torn(tmp_path, loader, "on exception", step, "on_train_batch_start")
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert len(resumed.seen) == len(whole.seen) * (32 - step) // 32
    assert bits(resumed) == bits(whole)


# ---- validation at the step of a checkpoint


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_end"])
def test_a_fit_torn_inside_a_validation_repeats_or_finishes_it(tmp_path, hook):
    whole, resumed, _ = torn(tmp_path, "shuffled", "model, with validations", 12, hook)
    assert resumed.seen == whole.seen[12:]
    assert bits(resumed) == bits(whole)


@pytest.mark.parametrize(
    ("keeper", "step", "hook", "left_out"),
    [
        ("model, with validations", 12, "on_validation_start", "the validation of that step"),
        ("model, each 8", 9, "on_train_batch_end", "the end of its epoch"),
    ],
)
def test_what_a_checkpoint_leaves_out_is_said(tmp_path, keeper, step, hook, left_out):
    with pytest.warns(UserWarning, match=f"was written before {left_out}.*or use ResumeCheckpoint"):
        torn(tmp_path, "shuffled", keeper, step, hook)


def test_a_checkpoint_between_the_batches_of_one_step_is_said(tmp_path):
    with pytest.warns(UserWarning, match="between the batches of one optimizer step"):
        fit(tmp_path, "shuffled", "resume, accumulated")
