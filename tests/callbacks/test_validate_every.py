import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lottery_callbacks import ValidateEvery, ValidationCurve


@pytest.fixture
def validated(make_module, make_trainer, loaders):
    """The optimizer steps after which a fit validates; its epoch has 4 batches."""

    def run(every, loaders=loaders, **options):
        curve = ValidationCurve(metrics=())
        make_trainer(**{"callbacks": [ValidateEvery(every), curve], "max_steps": 10} | options).fit(
            make_module(), *loaders
        )
        return [row["iteration"] for row in curve.rows]

    return run


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ("3it", [3, 6, 9, 10]),
        ("5it", [5, 10]),
        ("1ep", [4, 8, 10]),
        ("2ep", [8, 10]),
        ("100it", [10]),
        ("1it", list(range(1, 11))),
    ],
)
def test_it_counts_steps_of_the_whole_fit_and_the_last_is_one(validated, every, steps):
    assert validated(every) == steps
    assert validated(every, check_val_every_n_epoch=None) == steps


def test_it_counts_steps_under_accumulation(validated):
    """Two batches a step: an epoch has 2 steps."""
    assert validated("3it", accumulate_grad_batches=2, max_steps=7) == [3, 6, 7]
    assert validated("1ep", accumulate_grad_batches=2, max_steps=7) == [2, 4, 6, 7]


def test_the_last_step_of_epochs_is_one(validated):
    assert validated("3it", max_steps=-1, max_epochs=2) == [3, 6, 8]


def test_the_interval_of_the_trainer_is_set_aside(validated):
    assert validated("5it", val_check_interval=1.0) == [5, 10]
    assert validated("5it", val_check_interval=0.25) == [5, 10]


@pytest.mark.parametrize("saved_at", [4, 6, 8])
def test_a_resumed_fit_validates_at_the_same_steps(validated, make_module, make_trainer, loaders, tmp_path, saved_at):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=saved_at, filename="{step}", save_top_k=-1)
    options = {"enable_checkpointing": True, "max_steps": 10}
    make_trainer(callbacks=[ValidateEvery("3it"), saver], **options).fit(make_module(), *loaders)
    curve = ValidationCurve(metrics=())
    trainer = make_trainer(callbacks=[ValidateEvery("3it"), curve], **options)
    trainer.fit(make_module(), *loaders, ckpt_path=tmp_path / f"step={saved_at}.ckpt")
    assert [row["iteration"] for row in curve.rows] == [step for step in (3, 6, 9, 10) if step > saved_at]


@pytest.mark.parametrize(
    ("every", "options", "said"),
    [
        ("3it", {"check_val_every_n_epoch": 2}, "check_val_every_n_epoch and ValidateEvery both say"),
        ("3it", {"val_check_interval": "00:00:00:05", "check_val_every_n_epoch": None}, "a time as val_check_interval"),
        ("1ep", {"loaders": "no length"}, "1ep needs automatic optimization and a loader with a length"),
    ],
)
def test_what_cannot_be_counted_is_refused(validated, loaders, every, options, said):
    if "loaders" in options:
        options = {
            "loaders": (iter(list(loaders[0])), loaders[1]),
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
        }
    with pytest.raises(ValueError, match=said):
        validated(every, **options)


@pytest.mark.parametrize("every", ["0it", "0ep", "soon", "10"])
def test_a_distance_of_nothing_is_refused(every):
    with pytest.raises(ValueError, match=r"every=0|no step string"):
        ValidateEvery(every)
