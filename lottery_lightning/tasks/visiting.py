"""Training with several optimizer steps a visit: the loop, and when it is not possible."""

import math
import os
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lottery_callbacks.fit_steps import count_steps, last_step
from lottery_callbacks.messages import describe
from lottery_lightning.data import TensorDataModule
from lottery_lightning.data.visits import Visit, Visits

# What Lightning calls once a batch: of callbacks, and of the module; a visit calls them once for all its steps.
CALLBACK_HOOKS = ("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad")
MODULE_HOOKS = (
    *CALLBACK_HOOKS, "training_step", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step",
    "configure_gradient_clipping", "on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device",
)  # fmt: skip
# Lightning calls these around each backward pass, of all callbacks and the module, also where nobody has them.
BACKWARD_HOOKS = ("on_before_backward", "on_after_backward", "backward")


class VisitingModule(L.LightningModule):
    """A task with one optimizer that trains by `loss(batch)`, `steps_per_visit` optimizer steps a visit.

    What Lightning does around each call of `training_step` is then done once for many steps, which is most of the time
    of a small network. The bits are those of one step a visit: a visit ends early wherever something is due, at the
    steps that callbacks name (`visit_ends`, see `lottery_callbacks.fit_steps`), at checkpoints every so many steps, at
    the end of an epoch and of the fit. Learning rates step with each optimizer step. `Trainer.log_every_n_steps` counts
    optimizer steps here; `val_check_interval` counts visits (`ValidateEvery` counts steps), as does a progress bar.

    One step a visit, with a line that says why, where something must see every batch: several devices, accumulation,
    clipping, precision other than 32-true and bf16-mixed, limited batches, a data module that is none of ours, no last
    step, or a callback or module with a hook of its own for each batch. The data module must be a `TensorDataModule`.
    """

    def __init__(self, steps_per_visit: int = 1) -> None:
        super().__init__()
        if steps_per_visit < 1:
            raise ValueError(f"steps_per_visit={steps_per_visit}: a visit makes one optimizer step at least")
        self.steps_per_visit = steps_per_visit
        self.scheduler_interval = "step"
        self._visiting = self._hooked = False

    def loss(self, batch: Any) -> Tensor:
        """The training loss of one batch."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(batch)")

    def setup(self, stage: str) -> None:
        if stage == "fit":
            if not torch.cuda.is_available():  # set by Lightning; each optimizer step would look for a GPU, 0.1 ms
                os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
            self._visiting = self._begin_visits()
            self.automatic_optimization = not self._visiting

    def _begin_visits(self) -> bool:
        if self.steps_per_visit == 1:
            return False
        trainer: Any = self.trainer
        if reason := obstacle(trainer, self):
            rank_zero_warn(f"one optimizer step a visit instead of {self.steps_per_visit}: {reason}")
            return False
        batches = trainer.datamodule.train_dataloader().steps_per_epoch
        last = int(last_step(trainer, batches))
        ends = {last}.union(*(visit_ends(callback, batches, last) or () for callback in trainer.callbacks))
        if trainer.loggers:
            ends.update(range(trainer.log_every_n_steps, last, trainer.log_every_n_steps))
        trainer.datamodule.visits = Visits(self.steps_per_visit, ends, batches, last)
        self._hooked = any(
            overrides(owner, hook, base)
            for hook in BACKWARD_HOOKS
            for owner, base in [(self, VisitingModule), *((callback, L.Callback) for callback in trainer.callbacks)]
        )
        return True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "loops" in checkpoint:  # it may come from a fit with visits, or from one without
            count_steps(checkpoint["loops"]["fit_loop"], checkpoint["global_step"])

    def on_train_start(self) -> None:
        """Where a fit begins in the midst of an epoch, count the items behind it in those of this fit."""
        loader: Any = self.trainer.train_dataloader
        if (behind := getattr(loader, "visits_done", None)) is not None:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress
            progress.increment_by(behind - progress.current.ready, is_last_batch=progress.is_last_batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self._visit(batch) if isinstance(batch, Visit) else self.loss(batch)
        if self.trainer.loggers:  # a log entry costs a tenth of a small network's step
            self.log("train/loss", loss.detach())
        return None if self._visiting else loss

    def _visit(self, visit: Visit) -> Tensor:
        """Train on each batch; returns the loss of the last."""
        trainer: L.Trainer = self.trainer
        optimizer: Any = self.optimizers()
        schedules: Any = [config.scheduler for config in trainer.lr_scheduler_configs]
        steps_made = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        loss = torch.empty(0)
        # Lightning has entered autocast around the whole visit. Autocast keeps what it has cast until its outermost
        # context ends, and a backward pass belongs outside: so leave it, and enter it for each forward pass.
        with torch.autocast(self.device.type, enabled=False):
            for batch in visit:
                optimizer.zero_grad()
                with trainer.precision_plugin.train_step_context():
                    loss = self.loss(batch)
                torch.clear_autocast_cache()
                if self._hooked:
                    self.manual_backward(loss)
                    optimizer.step()
                else:
                    loss.backward()
                    steps_made.increment_ready()
                    optimizer.optimizer.step()
                    steps_made.increment_completed()
                if self.scheduler_interval == "step":
                    for schedule in schedules:
                        schedule.step()
        if self.scheduler_interval == "epoch" and trainer.is_last_batch:
            for schedule in schedules:
                schedule.step()
        # The axis of everything logged; Lightning adds the one of this visit.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step - 1
        return loss


def visit_ends(callback: L.Callback, per_epoch: int, last: int) -> Iterable[int] | None:
    """The steps that a callback must see; None if it needs every step, or has a hook of each batch undeclared."""
    hooks = [hook for hook in CALLBACK_HOOKS if overrides(callback, hook, L.Callback)]
    if all(issubclass(_owner(callback, "visit_ends"), _owner(callback, hook)) for hook in hooks):
        return callback.visit_ends(per_epoch, last) if hooks else ()  # pyright: ignore[reportAttributeAccessIssue]
    if all(_owner(callback, hook).__module__.startswith("lightning.") for hook in hooks):
        if isinstance(callback, ModelCheckpoint):
            every = callback._every_n_train_steps
            return range(every, last + 1, every) if every else ()
        if isinstance(callback, ProgressBar | Timer):
            return ()
    return None


def _owner(callback: L.Callback, name: str) -> type:
    """The class that a callback has a method from; a subclass with a new hook must declare anew."""
    return next((cls for cls in type(callback).__mro__ if name in vars(cls)), object)


def obstacle(trainer: Any, module: L.LightningModule) -> str | None:
    """Why a Trainer's fit cannot make several optimizer steps a visit; None if it can."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, TensorDataModule):
        return "the data come from no TensorDataModule"
    if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
        return f"{type(trainer.strategy).__name__} synchronises every step"
    callbacks = trainer.callbacks
    if trainer.accumulate_grad_batches > 1 or any(isinstance(c, GradientAccumulationScheduler) for c in callbacks):
        return "gradients are accumulated over batches"
    if trainer.gradient_clip_val:
        return "gradient_clip_val is the business of automatic optimization"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "fp16 scales the loss of every step"
    if type(trainer.precision_plugin) not in (Precision, MixedPrecision):
        return f"{type(trainer.precision_plugin).__name__} converts every batch"
    if trainer.limit_train_batches not in (1.0, None) or trainer.overfit_batches:
        return "limit_train_batches and overfit_batches count batches"
    if changed := [hook for hook in MODULE_HOOKS if overrides(module, hook, VisitingModule)]:
        return f"{type(module).__name__} has its own {describe(changed)}"
    if moved := [hook for hook in MODULE_HOOKS if overrides(data, hook, L.LightningDataModule)]:
        return f"{type(data).__name__} has its own {describe(moved)}"
    batches = data.train_dataloader().steps_per_epoch
    if math.isinf(last := last_step(trainer, batches)):
        return "the fit has no last step: give max_steps or max_epochs"
    every = [type(callback).__name__ for callback in callbacks if visit_ends(callback, batches, int(last)) is None]
    return f"{describe(every)} must see every batch" if every else None


def overrides(owner: Any, hook: str, base: type) -> bool:
    """Whether an object's class has its own method of that name, and does not take `base`'s."""
    own = getattr(type(owner), hook, None)
    return own is not None and own is not getattr(base, hook, None)
