"""Training with several optimizer steps a visit."""

import os
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lottery_callbacks.fit_steps import count_steps, last_step
from lottery_lightning.data.visits import Visit, Visits
from lottery_lightning.tasks.visit_rules import hears_steps, obstacle, steps_due


class VisitingModule(L.LightningModule):
    """A task with one optimizer that trains by `loss(batch)`, `steps_per_visit` optimizer steps a visit.

    What Lightning does around each call of `training_step` is then done once for many steps, which is most of the time
    of a small network. The bits are those of one step a visit: a visit ends early wherever something is due, at the
    steps that callbacks name (`visit_ends`, see `lottery_callbacks.fit_steps`), at checkpoints every so many steps, at
    the end of an epoch and of the fit. Schedules follow their interval; `Trainer.log_every_n_steps` counts optimizer
    steps. `val_check_interval` counts visits (`ValidateEvery` counts steps), as do progress bars and whatever else of
    Lightning counts batches.

    One step a visit, with a line that says why, where something must see every batch: several devices, accumulation,
    clipping, precision other than 32-true and bf16-mixed, limited batches, a data module that is no `TensorDataModule`,
    no last step, an optimizer with a closure, a schedule that follows a metric, a callback or module with a hook of its
    own for each batch (`visit_rules`). A subclass that overrides `setup`, `teardown`, `on_fit_start`, `on_train_start`
    or `on_load_checkpoint` calls super.

    `loss` computes; weights are changed by the optimizer and by hooks, not there.
    """

    def __init__(self, steps_per_visit: int = 1) -> None:
        super().__init__()
        if steps_per_visit < 1:
            raise ValueError(f"steps_per_visit={steps_per_visit}: a visit makes one optimizer step at least")
        self.steps_per_visit = steps_per_visit
        self._visiting = self._heard = False

    def loss(self, batch: Any) -> Tensor:
        """The training loss of one batch."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(batch)")

    # ---- the fit around visits

    def setup(self, stage: str) -> None:
        self._end_visits()  # a fit that ended in an exception has not

    def teardown(self, stage: str) -> None:
        self._end_visits()

    def on_fit_start(self) -> None:
        """Decide: optimizers and schedules are there, and no batch is drawn yet."""
        if not torch.cuda.is_available():
            # Lightning sets it for all; each optimizer step of torch would look for a GPU, 0.1 ms of LeNet's 1.5.
            os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
        if self.steps_per_visit == 1:
            return
        trainer: Any = self.trainer
        if reason := obstacle(trainer, self, VisitingModule):
            rank_zero_warn(f"one optimizer step a visit instead of {self.steps_per_visit}: {reason}")
            return
        per_epoch = trainer.datamodule.train_dataloader().steps_per_epoch
        last = int(last_step(trainer, per_epoch))
        trainer.datamodule.visits = Visits(self.steps_per_visit, steps_due(trainer, per_epoch, last), per_epoch, last)
        self._heard = hears_steps(trainer, self, VisitingModule)
        step = trainer.global_step  # of a rewind point, by the counter of automatic optimization
        self._visiting, self.automatic_optimization = True, False
        self._steps_made.total.ready = self._steps_made.total.completed = step

    def _end_visits(self) -> None:
        if self._visiting:
            self._visiting, self.automatic_optimization = False, True
            if data := getattr(self.trainer, "datamodule", None):
                data.visits = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "loops" in checkpoint:  # it may come from a fit with visits, or from one without
            count_steps(checkpoint["loops"]["fit_loop"], checkpoint["global_step"])

    def on_train_start(self) -> None:
        """Where a fit begins in the midst of an epoch, count the items behind it in those of this fit."""
        loader: Any = self.trainer.train_dataloader
        if (behind := getattr(loader, "visits_done", None)) is not None:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress
            progress.increment_by(behind - progress.current.ready, is_last_batch=progress.is_last_batch)

    # ---- a visit

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self._visit(batch) if isinstance(batch, Visit) else self.loss(batch)
        if self.trainer.loggers:  # a log entry costs a tenth of a small network's step
            self.log("train/loss", loss.detach())
        return None if self._visiting else loss

    def _visit(self, visit: Visit) -> Tensor:
        """Train on each batch; returns the loss of the last."""
        trainer: L.Trainer = self.trainer
        optimizer: Any = self.optimizers()
        schedules: Any = trainer.lr_scheduler_configs  # none of them follows a metric
        by_step = [config.scheduler for config in schedules if config.interval == "step"]
        by_epoch = [config.scheduler for config in schedules if config.interval == "epoch"]
        loss = torch.empty(0)
        # Lightning has entered autocast around the whole visit. Autocast keeps what it has cast until its outermost
        # context ends, and a backward pass belongs outside: so leave it, and enter it for each forward pass.
        with torch.autocast(self.device.type, enabled=False):
            for batch in visit:
                trainer._logger_connector.on_batch_start(batch)  # `self.log` in `loss` asks it for the batch's size
                optimizer.zero_grad()
                with trainer.precision_plugin.train_step_context():
                    loss = self.loss(batch)
                torch.clear_autocast_cache()
                self._step(loss, optimizer)
                for schedule in by_step:
                    schedule.step()
        if trainer.is_last_batch:
            for schedule in by_epoch:
                schedule.step()
        self._tell_steps()
        return loss

    def _step(self, loss: Tensor, optimizer: Any) -> None:
        """Backward pass and step; past the hooks of all callbacks where none has one (results/training_speed.md)."""
        if self._heard:
            self.manual_backward(loss)
            optimizer.step()
        else:
            loss.backward()
            self._steps_made.increment_ready()
            optimizer.optimizer.step()
            self._steps_made.increment_completed()

    @property
    def _steps_made(self) -> Any:
        """Lightning's counter of `global_step` under manual optimization."""
        return self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress

    def _tell_steps(self) -> None:
        """Tell Lightning's loops, which count visits, the steps: for the axis of logs, and when the fit is over."""
        loop: Any = self.trainer.fit_loop.epoch_loop
        made = loop.automatic_optimization.optim_progress.optimizer.step.total
        made.ready = made.completed = self.trainer.global_step
        loop._batches_that_stepped = self.trainer.global_step - 1  # it adds the one of this visit
