import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks import ResumeCheckpoint, newest_checkpoint
from lottery_lightning.data import Digits
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier, WarmupMultiStepLR


def made(milestones, warmup=0, gamma=0.1, rates=(1.0,)):
    """An optimizer with one weight a rate, and its schedule."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    return optimizer, WarmupMultiStepLR(optimizer, milestones, warmup, gamma)


def rates(optimizer, schedule, steps):
    """The rate of the first group at each step of a training."""
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("milestones", "warmup", "gamma", "expected"),
    [
        ([6, 8], 4, 0.1, [0, 0.5, 1, 1.5, 2, 2, 0.2, 0.2, 0.02, 0.02]),
        ([4, 6], 4, 0.1, [0, 0.5, 1, 1.5, 0.2, 0.2, 0.02]),  # ResNet-20 of 1803.03635: a drop where the warmup ends
        ([2], 4, 0.5, [0, 0.5, 0.5, 0.75, 1, 1]),
        ([2, 3], 0, 0.2, [2, 2, 0.4, 0.08]),
        ([], 2, 0.1, [0, 1, 2, 2]),
    ],
)
def test_rates_are_those_computed_by_hand(milestones, warmup, gamma, expected):
    assert rates(*made(milestones, warmup, gamma, (2.0,)), len(expected)) == pytest.approx(expected, rel=1e-12)


def test_without_warmup_it_is_torchs_multi_step_schedule():
    optimizer, own = made([3, 5])
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.MultiStepLR(other, [3, 5])
    assert rates(optimizer, own, 8) == pytest.approx(rates(other, torchs, 8), rel=1e-12)


def test_each_parameter_group_keeps_its_proportion():
    optimizer, schedule = made([3], 2, rates=(1.0, 0.25))
    for _ in range(5):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == first / 4
        assert schedule.get_last_lr() == [first, second]
        optimizer.step()
        schedule.step()


schedules = st.tuples(
    st.lists(st.integers(1, 30), unique=True, max_size=4).map(sorted), st.integers(0, 20), st.floats(0.05, 1)
)


@given(schedules, st.integers(0, 30), st.integers(1, 10))
def test_a_schedule_restored_at_any_step_goes_on_bit_for_bit(arguments, done, more):
    optimizer, schedule = made(*arguments)
    unbroken = rates(optimizer, schedule, done + more)
    optimizer, schedule = made(*arguments)
    rates(optimizer, schedule, done)
    state = json.loads(json.dumps([optimizer.state_dict(), schedule.state_dict()]))
    fresh, resumed = made(*arguments)
    resumed.load_state_dict(state[1])
    fresh.load_state_dict(state[0])
    assert rates(fresh, resumed, more) == unbroken[done:]


@given(schedules, st.integers(0, 40))
def test_rates_are_the_closed_formula(arguments, step):
    milestones, warmup, gamma = arguments
    ramp = min(1, step / warmup) if warmup else 1
    expected = ramp * gamma ** sum(milestone <= step for milestone in milestones)
    assert rates(*made(*arguments), step + 1)[-1] == pytest.approx(expected, rel=1e-12)


def test_its_state_is_primitives_that_torch_loads_safely():
    optimizer, schedule = made([3, 5], 2, 0.2)
    optimizer.step()
    schedule.step()
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state == schedule.state_dict()
    assert state["last_epoch"] == 1
    assert (state["milestones"], state["warmup"], state["gamma"]) == ([3, 5], 2, 0.2)
    assert state["base_lrs"] == [1.0]


def classifier():
    torch.manual_seed(0)
    return ImageClassifier(
        Dense([64, 20, 10]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4),
        scheduler=lambda optimizer: WarmupMultiStepLR(optimizer, [6, 10], warmup=4),
    )


def test_the_first_step_of_a_warmup_changes_no_weight_and_the_second_all(make_trainer):
    start = [parameter.clone() for parameter in classifier().parameters()]
    for steps, same in ((1, True), (2, False)):
        model = classifier()
        trainer = make_trainer(max_steps=steps)
        trainer.fit(model, Digits())
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * steps / 4)
        for first, now in zip(start, model.parameters(), strict=True):
            assert torch.equal(first, now) == same


def test_a_fit_resumed_after_a_drop_ends_with_the_bits_of_an_unbroken_one(make_trainer, tmp_path):
    unbroken, begun, resumed = classifier(), classifier(), classifier()
    make_trainer(max_steps=12).fit(unbroken, Digits())
    make_trainer(max_steps=8, enable_checkpointing=True, callbacks=[ResumeCheckpoint(tmp_path, seconds=0)]).fit(
        begun, Digits()
    )
    last = make_trainer(max_steps=12)
    last.fit(resumed, Digits(), ckpt_path=newest_checkpoint(tmp_path))
    assert last.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)
    for early, a, b in zip(begun.parameters(), unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(early, b)


@pytest.mark.parametrize("milestones", [[5, 3], [3, 3]])
def test_milestones_that_do_not_ascend_are_refused(milestones):
    with pytest.raises(ValueError, match=r"^milestones=\[\d, 3\] must ascend, each of them once$"):
        made(milestones)


def test_a_negative_warmup_is_refused():
    with pytest.raises(ValueError, match=r"^warmup=-1 is negative: give the steps of the warmup, 0 for none$"):
        made([3], -1)
