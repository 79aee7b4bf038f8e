"""Several optimizer steps a visit: the bits of one step a visit, and everything at its exact step."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LambdaCallback,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from visiting_fits import EPOCH, Blobs, Noisy, Watch, bits, half, momentum, task

from lottery_callbacks import (
    ApplyTicket,
    GradualPruning,
    IterativeMagnitudePruning,
    Pruning,
    ResumeCheckpoint,
    SparsityMonitor,
    Ticket,
    ValidateEvery,
    ValidationCurve,
    newest_checkpoint,
)
from lottery_lightning.tasks import ImageClassifier, WarmupMultiStepLR

CASES = {
    "adam": {},
    "sgd with momentum": {"optimizer": momentum},
    "warmup and drops by step": {
        "scheduler": lambda o: WarmupMultiStepLR(o, [17, 30], warmup=5),
        "optimizer": momentum,
    },
    "one cycle": {"scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=41)},
    "drops by epoch": {
        "scheduler": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
        "scheduler_interval": "epoch",
    },
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("case", CASES)
def test_visits_give_the_bits_of_single_steps(fit, case, precision):
    found = {}
    for most in (1, 4, 100):
        curve = ValidationCurve()
        trainer, steps = fit(task(most, **CASES[case]), ValidateEvery("7it"), curve, data=Noisy, precision=precision)
        found[most] = bits(trainer), curve.rows, trainer.global_step, trainer.current_epoch
        assert len(steps) < 40 or most == 1
        assert max(after - before for before, after in zip([0, *steps], steps, strict=False)) <= min(most, 7)
    assert found[1] == found[4] == found[100]
    assert [row["iteration"] for row in found[1][1]] == [7, 14, 21, 28, 35, 40]


@pytest.mark.parametrize("limits", [{"max_steps": 40}, {"max_steps": -1, "max_epochs": 4}])
def test_every_epoch_has_one_number_of_visits_and_ends_with_one(fit, limits):
    trainer, steps = fit(task(4), **limits)
    assert {EPOCH, 2 * EPOCH, 3 * EPOCH, 4 * EPOCH, *range(4, 36, 4)} <= set(steps)
    assert [sum(EPOCH * e < s <= EPOCH * (e + 1) for s in steps) for e in range(4)] == [
        trainer.num_training_batches
    ] * 4
    assert trainer.global_step == steps[-1] == (40 if limits["max_steps"] == 40 else 36)
    assert trainer.current_epoch == (5 if limits["max_steps"] == 40 else 4)  # a torn epoch counts


def test_checkpoints_and_logs_come_at_their_own_steps(fit, tmp_path):
    names, rows = {}, {}
    for most in (1, 50):
        folder = tmp_path / str(most)
        saver = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=11, filename="{step}")
        options = {"enable_checkpointing": True, "log_every_n_steps": 5, "logger": CSVLogger(folder, "logs")}
        fit(task(most), saver, ValidateEvery("10it"), **options)
        names[most] = {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt")}
        rows[most] = (folder / "logs" / "version_0" / "metrics.csv").read_text()
    assert names[1] == names[50] == {f"step={step}.ckpt": step for step in (11, 22, 33)}
    assert rows[1] == rows[50]
    assert rows[1].splitlines()[0] == "epoch,step,train/loss,val/acc,val/loss"
    steps = [int(row.split(",")[1]) for row in rows[1].splitlines()[1:]]
    assert steps == [4, 9, 9, 14, 19, 19, 24, 29, 29, 34, 39, 39]


# ---- under a mask


@pytest.mark.parametrize("rewind", ["0it", "5it", "9it", "1ep", "13it"])
def test_the_lottery_finds_the_same_tickets_and_weights(fit, tmp_path, rewind):
    """Level 0 to 2; the rewind step ends a visit, an epoch or neither, and its ticket counts steps."""
    found = {}
    for most in (1, 6):
        folder = tmp_path / f"{most}-{rewind}"
        imp = IterativeMagnitudePruning(0.3, rewind, folder, Pruning(scope="global"))
        weights = []
        for level in imp.levels(2):
            schedule = lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=41)  # noqa: E731
            trainer, _ = fit(task(most, scheduler=schedule), imp, ValidateEvery("8it"), seed=level.number)
            weights.append(bits(trainer))
            assert trainer.global_step == 40
            assert trainer.made_visits is (most > 1)
        tickets = [Ticket.load(imp.ticket_path(number)) for number in range(4)]
        found[most] = weights, [ticket.masks for ticket in tickets], tickets
    assert found[1][0] == found[6][0]
    for one, six in zip(found[1][2], found[6][2], strict=True):
        assert all(torch.equal(one.masks[name], six.masks[name]) for name in one.masks)
        assert one.rewind.step == six.rewind.step
        assert all(torch.equal(one.rewind.tensors[name], six.rewind.tensors[name]) for name in one.rewind.tensors)
    # a ticket of either kind of fit begins both kinds
    ends = []
    for ticket in (found[1][2][2], found[6][2][2]):
        for most in (1, 3, 50):
            schedule = lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=41)  # noqa: E731
            trainer, _ = fit(task(most, scheduler=schedule), ApplyTicket(ticket), seed=2)
            assert (trainer.global_step, trainer.current_epoch) == (40, 5)
            ends.append(bits(trainer))
    assert all(end == found[1][0][2] for end in ends)


def test_pruned_weights_gradients_and_state_are_zero_at_every_step(fit, tmp_path):
    imp = IterativeMagnitudePruning(0.5, run_dir=tmp_path / "imp")
    for _ in imp.levels(1):
        trainer, _ = fit(task(5), imp)
    module, mask = trainer.lightning_module, imp.fit_masks["network.0.weight"]
    weight = module.network[0].weight
    state = trainer.optimizers[0].state[weight]
    for tensor in (weight.detach(), weight.grad, state["exp_avg"], state["exp_avg_sq"]):
        assert not tensor[~mask].any()
        assert tensor[mask].any()
    assert int(mask.sum()) == int(weight.count_nonzero()) == 36


def test_gradual_pruning_prunes_at_its_steps(fit):
    masks = {}
    for most in (1, 50):
        pruning = GradualPruning(0.8, begin="3it", end="2ep", every="5it")
        trainer, steps = fit(task(most), pruning, SparsityMonitor())
        assert pruning.updates == [3, 8, 13, 18]
        assert set(pruning.updates) <= set(steps)
        masks[most] = {name: mask.tolist() for name, mask in pruning.masks.items()}, bits(trainer)
    assert masks[1] == masks[50]


@pytest.mark.parametrize(("first", "then"), [(6, 6), (6, 1), (1, 6), (6, 4)])
@pytest.mark.parametrize("killed_at", [14, 18, 24])
def test_a_resumed_fit_ends_in_the_same_bits_whatever_the_visits(fit, tmp_path, first, then, killed_at):
    ticket = half(task(1))
    whole, _ = fit(task(6), ValidateEvery("7it"), ApplyTicket(ticket))
    folder = tmp_path / "resume"
    torn = [ValidateEvery("7it"), ApplyTicket(ticket), ResumeCheckpoint(folder, 0)]
    fit(task(first), *torn, max_steps=killed_at, enable_checkpointing=True)
    checkpoint = newest_checkpoint(folder)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == killed_at
    resumed, steps = fit(task(then), ValidateEvery("7it"), ApplyTicket(ticket), checkpoint=checkpoint, seed=99)
    assert (resumed.global_step, resumed.current_epoch) == (40, whole.current_epoch)
    assert steps[0] > killed_at
    assert bits(resumed) == bits(whole)


# ---- one step a visit


class Nosy(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert len(batch) == 2


class NosyWatch(Watch):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert len(batch) == 2


class MyTimer(Timer):
    def on_train_batch_end(self, *arguments):
        super().on_train_batch_end(*arguments)


class Hooked(ImageClassifier):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert len(batch) == 2


class Own(ImageClassifier):
    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class Moved(Blobs):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


class OwnLoader(Blobs):
    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.splits["train"]), batch_size=8)


class Counting(L.Callback):
    def setup(self, trainer, pl_module, stage):
        self.steps = trainer.estimated_stepping_batches


class Plateau(ImageClassifier):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "train/loss", "strict": False},
        }


EPOCHS = {"max_steps": -1, "max_epochs": 2}
WHY = {
    "callback": ({"callbacks": [Nosy()]}, {}, "Nosy must see every batch"),
    "a hook over Lightning's": ({"callbacks": [MyTimer("00:01:00:00")]}, {}, "MyTimer must see every batch"),
    "a hook over a declaring callback": ({"callbacks": [NosyWatch()]}, {}, "NosyWatch must see every batch"),
    "averaging": ({"callbacks": [WeightAveraging()]}, {}, "WeightAveraging must see every batch"),
    "snip": (
        {"callbacks": [GradualPruning(0.5, "3it", pruning=Pruning("snip"))]},
        {},
        "GradualPruning must see every batch",
    ),
    "hook": ({}, {"cls": Hooked}, "Hooked has its own on_train_batch_end"),
    "training_step": ({}, {"cls": Own}, "Own has its own training_step"),
    "transfer": ({"data": Moved}, {}, "Moved has its own on_after_batch_transfer"),
    "accumulation": ({"accumulate_grad_batches": 2}, {}, "gradients are accumulated over batches"),
    "scheduled accumulation": ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, {}, "gradients are accumulated"),
    "clipping": ({"gradient_clip_val": 1.0}, {}, "gradient_clip_val"),
    "bf16": ({"precision": "bf16-true"}, {}, "HalfPrecision converts every batch"),
    "limit of one batch": ({"limit_train_batches": 1}, {}, "limit_train_batches"),
    "limit": ({"limit_train_batches": 3}, {}, "limit_train_batches"),
    "swa": (EPOCHS | {"callbacks": [StochasticWeightAveraging(0.01, 1)]}, {}, "StochasticWeightAveraging changes the"),
    "lambda": ({"callbacks": [LambdaCallback(on_train_batch_end=print)]}, {}, "LambdaCallback must see every batch"),
    "closure": ({}, {"optimizer": torch.optim.LBFGS}, "LBFGS needs a closure"),
    "counted before": (EPOCHS | {"callbacks": [Counting()]}, {}, "the training batches were counted before the fit"),
    "own loader": ({"data": OwnLoader}, {}, "OwnLoader has its own train_dataloader"),
    "plateau": ({}, {"cls": Plateau}, "a schedule follows a metric"),
    "no end": ({"max_steps": -1, "max_time": {"seconds": 1}}, {}, "the fit has no last step"),
}


@pytest.mark.parametrize("case", WHY)
def test_what_must_see_every_batch_gets_it_and_a_line_says_why(fit, case):
    options, arguments, why = WHY[case]
    callbacks = options.get("callbacks", [])
    options = {key: value for key, value in options.items() if key != "callbacks"}
    module = task(4, **arguments)
    with pytest.warns(UserWarning, match=f"one optimizer step a visit instead of 4: {why}"):
        fit(module, *callbacks, **{"max_steps": 12} | options)
    assert module.automatic_optimization


def test_data_of_others_come_one_batch_a_visit(make_trainer, loaders):
    module = task(4)
    with pytest.warns(UserWarning, match="the data come from no TensorDataModule"):
        make_trainer().fit(module, *loaders)
    assert module.automatic_optimization


def test_a_module_of_others_gets_batches_after_a_fit_with_visits(fit, make_trainer, make_module):
    data = Blobs(batch_size=8)
    trainer, _ = fit(task(4), data=lambda **_: data)
    assert trainer.made_visits
    other = make_trainer()
    other.fit(make_module(), data)
    assert other.global_step == 8


def test_lightnings_own_progress_bar_and_checkpoints_do_not_stand_in_the_way(fit, tmp_path):
    trainer, steps = fit(task(4), enable_progress_bar=True, enable_checkpointing=True, logger=CSVLogger(tmp_path))
    assert trainer.made_visits
    assert len(steps) < 20


def test_no_visit_of_no_step():
    with pytest.raises(ValueError, match="steps_per_visit=0"):
        task(0)
