"""Visits beside callbacks, modules and fits that know nothing of them."""

import lightning.pytorch as L
import pytest
import torch
from visiting_fits import Blobs, bits, half, momentum, task

from lottery_callbacks import ApplyTicket, ValidateEvery
from lottery_lightning.tasks import ImageClassifier

STEP_HOOKS = ["on_before_backward", "on_after_backward", "on_before_optimizer_step"]


class Counts(L.Callback):
    """The optimizer steps at which a hook was called."""

    def __init__(self, hook):
        self.steps = []
        setattr(self, hook, lambda trainer, *_: self.steps.append(trainer.global_step))


@pytest.mark.parametrize("hook", STEP_HOOKS)
def test_hooks_of_each_step_are_called_at_each_step(fit, hook):
    seen = {}
    for most in (1, 6):
        counts = Counts(hook)
        trainer, _ = fit(task(most), counts)
        seen[most] = counts.steps, bits(trainer)
        assert trainer.made_visits is (most > 1)
    assert seen[1] == seen[6]
    assert seen[6][0] == list(range(40))


class Clips(ImageClassifier):
    def on_before_optimizer_step(self, optimizer):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class EveryThird(ImageClassifier):
    """Schedules as Lightning takes them, each at its interval."""

    def configure_optimizers(self):
        optimizer = momentum(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)}


class Logs(ImageClassifier):
    def loss(self, batch):
        loss = super().loss(batch)
        self.log("mine", loss.detach(), on_step=False, on_epoch=True)
        return loss


@pytest.mark.parametrize("cls", [Clips, EveryThird, Logs])
def test_subclasses_give_the_bits_of_single_steps(fit, cls):
    ends = {}
    for most in (1, 6):
        trainer, _ = fit(task(most, cls), max_steps=27)
        assert trainer.made_visits is (most > 1)
        ends[most] = bits(trainer), {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert ends[1] == ends[6]
    assert ("mine" in ends[6][1]) is (cls is Logs)


class Noise(L.Callback):
    """Writes into the gradients or the weights, pruned ones too, at each step."""

    def __init__(self, where):
        self.generator = torch.Generator().manual_seed(0)
        setattr(self, where, self.write)

    def write(self, trainer, module, *_):
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad += 0.1 * torch.randn(parameter.shape, generator=self.generator)

    def on_train_start(self, trainer, module):
        if "after_step" in vars(self):
            trainer.optimizers[0].register_step_post_hook(lambda *_: self.after(module))

    @torch.no_grad()
    def after(self, module):
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=self.generator)


class Pruned(ImageClassifier):
    """The largest pruned weight that a forward pass has seen."""

    ticket, largest = None, 0.0

    def loss(self, batch):
        weights = dict(self.named_parameters())
        for name, mask in self.ticket.masks.items():
            self.largest = max(self.largest, float(weights[name].detach()[~mask].abs().max()))
        return super().loss(batch)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["on_after_backward", "on_before_optimizer_step", "after_step"])
def test_pruned_weights_are_zero_whatever_others_write(fit, where, first):
    for most in (1, 6):
        module = task(most, Pruned)
        module.ticket = half(module)
        apply, noise = ApplyTicket(module.ticket), Noise(where)
        if where == "after_step" and not first:  # the hook that is registered last has the last word
            with pytest.raises(RuntimeError, match=r"pruned weights of .* are not 0; something wrote to it outside"):
                fit(module, apply, noise)
            continue
        fit(module, *((noise, apply) if first else (apply, noise)))
        weights = dict(module.named_parameters())
        after = max(float(weights[name].detach()[~mask].abs().max()) for name, mask in module.ticket.masks.items())
        assert (module.largest, after) == (0.0, 0.0), most


# ---- one module, several fits


def test_each_fit_of_a_module_decides_anew(fit):
    module, data = task(6), Blobs(batch_size=8)
    trainer, _ = fit(module, data=lambda **_: data)
    assert trainer.made_visits
    assert module.automatic_optimization
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (8, 6)
    with pytest.warns(UserWarning, match="gradients are accumulated"):
        trainer, _ = fit(module, data=lambda **_: data, accumulate_grad_batches=2)
    assert not trainer.made_visits
    with pytest.warns(UserWarning, match="gradient_clip_val"):
        fit(module, data=lambda **_: data, gradient_clip_val=1.0)
    trainer, steps = fit(module, data=lambda **_: data)
    assert trainer.made_visits
    assert (trainer.global_step, steps[-1]) == (40, 40)


def test_a_module_that_optimizes_by_hand_goes_on_doing_so(fit):
    class ByHand(ImageClassifier):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    ends = []
    for most in (1, 6):
        trainer, _ = fit(task(most, ByHand), max_steps=10)
        assert trainer.global_step == 10
        ends.append(bits(trainer))
    assert ends[0] == ends[1]


def test_a_validation_and_a_test_between_fits_leave_no_trace(fit):
    """Lightning runs them in inference mode, whose tensors a fit cannot change."""
    module, data = task(6), Blobs(batch_size=8, eval_batch_size=6)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    validated = L.Trainer(**quiet).validate(module, data, verbose=False)
    L.Trainer(**quiet).test(module, data, verbose=False)
    trainer, _ = fit(module, ValidateEvery("10it"), data=lambda **_: data)
    alone, _ = fit(task(6), ValidateEvery("10it"))
    assert bits(trainer) == bits(alone)
    last, expected = (float(t.callback_metrics["val/loss"]) for t in (trainer, alone))
    assert last == pytest.approx(expected, rel=1e-5)  # in other batches
    assert validated[0]["val/loss"] > last


@pytest.mark.parametrize("every", [0, 3])
def test_log_entries_may_be_off(fit, tmp_path, every):
    logger = L.loggers.CSVLogger(tmp_path)
    trainer, steps = fit(task(6), logger=logger, log_every_n_steps=every)
    assert trainer.made_visits
    assert (3 in steps) is (every == 3)
