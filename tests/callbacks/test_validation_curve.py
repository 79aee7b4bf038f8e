import lightning.pytorch as L
import pytest
import torch

from lottery_callbacks import ResumeCheckpoint, ValidationCurve, newest_checkpoint


class Validations(L.Callback):
    """An independent record of what Lightning had logged at the end of each validation."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.seen.append((trainer.global_step, metrics["val/loss"], metrics["val/acc"]))


def as_tuples(curve):
    return [(row["iteration"], row["val/loss"], row["val/acc"]) for row in curve.rows]


def test_every_validation_of_a_fit_is_a_row_with_its_optimizer_step(make_module, loaders, make_trainer):
    curve, seen = ValidationCurve(), Validations()
    make_trainer(callbacks=[curve, seen]).fit(make_module(), *loaders)
    assert [row["iteration"] for row in curve.rows] == [2, 4, 6, 8]
    assert as_tuples(curve) == seen.seen
    assert len({row["val/loss"] for row in curve.rows}) == 4
    assert all(type(value) in (int, float) for row in curve.rows for value in row.values())
    best = min(curve.rows, key=lambda row: row["val/loss"])
    assert curve.minimum == best["val/loss"]
    assert curve.early_stop_iteration == best["iteration"]
    assert curve.first_iteration_reaching(curve.rows[0]["val/loss"]) == 2
    assert curve.first_iteration_reaching(best["val/loss"]) == best["iteration"]
    assert curve.first_iteration_reaching(best["val/loss"] - 1) is None


def test_accumulated_batches_count_once(make_module, loaders, make_trainer):
    curve = ValidationCurve()
    make_trainer(callbacks=[curve], accumulate_grad_batches=2, max_steps=4, val_check_interval=4).fit(
        make_module(), *loaders
    )
    assert [row["iteration"] for row in curve.rows] == [2, 4]


def test_the_sanity_check_and_a_validation_of_its_own_are_not_recorded(make_module, loaders, make_trainer):
    curve, module = ValidationCurve(), make_module()
    trainer = make_trainer(callbacks=[curve], num_sanity_val_steps=2, max_steps=4)
    trainer.fit(module, *loaders)
    rows = [dict(row) for row in curve.rows]
    assert [row["iteration"] for row in rows] == [2, 4]
    trainer.validate(module, loaders[1], verbose=False)
    assert curve.rows == rows


def test_a_new_fit_begins_a_new_curve(make_module, loaders, make_trainer):
    curve = ValidationCurve()
    make_trainer(callbacks=[curve], max_steps=6).fit(make_module(), *loaders)
    make_trainer(callbacks=[curve], max_steps=2).fit(make_module(), *loaders)
    assert [row["iteration"] for row in curve.rows] == [2]


def test_a_resumed_run_has_the_curve_of_an_unbroken_one(make_module, loaders, make_trainer, tmp_path):
    def fit(folder, max_steps):
        curve, saver = ValidationCurve(), ResumeCheckpoint(tmp_path / folder, seconds=0)
        module = make_module()
        module.network[3].p = 0.0  # nothing is drawn, and the break is at the end of an epoch
        trainer = make_trainer(callbacks=[curve, saver], max_steps=max_steps, enable_checkpointing=True)
        trainer.fit(module, *loaders, ckpt_path=newest_checkpoint(tmp_path / folder))
        return curve.rows

    whole = fit("whole", 8)
    assert [row["iteration"] for row in whole] == [2, 4, 6, 8]
    assert fit("torn", 4) == whole[:2]
    assert fit("torn", 8) == whole


def test_a_validation_of_a_checkpoint_leaves_the_curve_as_it_is(make_module, loaders, make_trainer, tmp_path):
    curve, module = ValidationCurve(), make_module()
    trainer = make_trainer(callbacks=[curve, ResumeCheckpoint(tmp_path, seconds=0)], enable_checkpointing=True)
    trainer.fit(module, *loaders)
    earlier = min(tmp_path.glob("*.ckpt"), key=lambda path: path.name)
    assert torch.load(earlier, weights_only=True)["global_step"] == 6
    trainer.validate(module, loaders[1], ckpt_path=earlier, verbose=False)
    assert [row["iteration"] for row in curve.rows] == [2, 4, 6, 8]


def test_curves_of_different_metrics_live_side_by_side_in_a_checkpoint(make_module, loaders, make_trainer, tmp_path):
    by_loss, by_accuracy = ValidationCurve(), ValidationCurve("val/acc", metrics=())
    trainer = make_trainer(callbacks=[by_loss, by_accuracy], max_steps=4)
    trainer.fit(make_module(), *loaders)
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    states = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert by_loss.state_key != by_accuracy.state_key
    assert states[by_loss.state_key]["rows"] == by_loss.rows
    assert states[by_accuracy.state_key]["rows"] == by_accuracy.rows
    assert set(by_accuracy.rows[0]) == {"iteration", "val/acc"}


def test_the_state_is_a_copy():
    curve, other = ValidationCurve(), ValidationCurve()
    curve.rows = [{"iteration": 2, "val/loss": 0.5}]
    state = curve.state_dict()
    other.setup(None, None, "fit")
    other.load_state_dict(state)
    curve.rows[0]["val/loss"] = 9.0
    assert state == {"rows": [{"iteration": 2, "val/loss": 0.5}]}
    state["rows"][0]["val/loss"] = 8.0
    assert other.rows == [{"iteration": 2, "val/loss": 0.5}]


def test_a_loss_that_is_not_logged_is_named_with_what_is(make_module, loaders, make_trainer):
    trainer = make_trainer(callbacks=[ValidationCurve("valid_loss")])
    with pytest.raises(ValueError, match=r"^'valid_loss' was not logged: there are val/loss, val/acc$"):
        trainer.fit(make_module(), *loaders)


def test_further_metrics_that_are_not_logged_are_left_out(make_module, loaders, make_trainer):
    curve = ValidationCurve(metrics=("val/f1", "val/acc"))
    make_trainer(callbacks=[curve], max_steps=2).fit(make_module(), *loaders)
    assert set(curve.rows[0]) == {"iteration", "val/loss", "val/acc"}


def test_a_run_without_validation_has_no_minimum(make_module, loaders, make_trainer):
    curve = ValidationCurve()
    make_trainer(callbacks=[curve], limit_val_batches=0).fit(make_module(), *loaders)
    assert curve.rows == []
    with pytest.raises(ValueError, match="no validation was recorded"):
        _ = curve.early_stop_iteration


@pytest.mark.parametrize("place", [0, 1])
def test_a_diverged_validation_is_not_the_minimum(place):
    curve = ValidationCurve()
    losses = [0.5, 0.6, 0.4]
    losses[place] = float("nan")
    curve.rows = [{"iteration": 2 * i, "val/loss": loss} for i, loss in enumerate(losses)]
    assert (curve.early_stop_iteration, curve.minimum) == (4, 0.4)


def test_it_leaves_the_run_bitwise_unchanged(trace_fit):
    plain = trace_fit()
    assert len(plain) == 8 * 2 + 4 * 3 + 1
    assert trace_fit(ValidationCurve()) == plain
    assert trace_fit(max_steps=7) != plain
