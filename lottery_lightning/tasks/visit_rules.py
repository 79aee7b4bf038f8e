"""When a fit can make several optimizer steps a visit, and which steps end a visit."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lottery_callbacks.fit_steps import last_step
from lottery_callbacks.messages import describe
from lottery_lightning.data import TensorDataModule

# What Lightning calls once a batch: of callbacks, and of the module; a visit calls them once for all its steps.
CALLBACK_HOOKS = ("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad")
MODULE_HOOKS = (
    *CALLBACK_HOOKS, "training_step", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step",
    "configure_gradient_clipping", "on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device",
)  # fmt: skip
# What it calls at each step in a visit too, of all callbacks and the module, also where nobody has them.
STEP_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "backward")


def obstacle(trainer: Any, module: L.LightningModule, base: type) -> str | None:
    """Why a fit that is about to start cannot make several optimizer steps a visit; None if it can.

    Args:
        trainer: its Trainer; optimizers and schedules are there.
        module: its module.
        base: the class that makes visits, whose own hooks are none of the module's.
    """
    data = trainer.datamodule
    if not isinstance(data, TensorDataModule):
        return "the data come from no TensorDataModule"
    if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
        return f"{type(trainer.strategy).__name__} synchronises every step"
    if trainer.train_dataloader is not None:
        return "the training batches were counted before the fit"
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        return f"{type(module).__name__} optimizes in its own way"
    if _closure(trainer.optimizers[0]) is inspect.Parameter.empty:
        return f"{type(trainer.optimizers[0]).__name__} needs a closure"
    if any(config.reduce_on_plateau or config.frequency > 1 for config in trainer.lr_scheduler_configs):
        return "a schedule follows a metric, or is not stepped every time"
    return _flag(trainer) or _hook(trainer, module, data, base)


def _flag(trainer: Any) -> str | None:
    callbacks, precision = trainer.callbacks, trainer.precision_plugin
    if trainer.accumulate_grad_batches > 1 or any(isinstance(c, GradientAccumulationScheduler) for c in callbacks):
        return "gradients are accumulated over batches"
    loops = StochasticWeightAveraging | LearningRateFinder | BatchSizeFinder
    if changing := [type(callback).__name__ for callback in callbacks if isinstance(callback, loops)]:
        return f"{describe(changing)} changes the training loop"
    if trainer.gradient_clip_val:
        return "gradient_clip_val is the business of automatic optimization"
    if getattr(precision, "scaler", None) is not None:
        return "fp16 scales the loss of every step"
    if type(precision) not in (Precision, MixedPrecision):
        return f"{type(precision).__name__} converts every batch"
    limit = trainer.limit_train_batches
    if isinstance(limit, int) or limit not in (1.0, None) or trainer.overfit_batches:
        return "limit_train_batches and overfit_batches count batches"
    return None


def _hook(trainer: Any, module: L.LightningModule, data: TensorDataModule, base: type) -> str | None:
    owners = ((module, MODULE_HOOKS, base), (data, MODULE_HOOKS, L.LightningDataModule))
    for owner, hooks, plain in (*owners, (data, ("train_dataloader",), TensorDataModule)):
        if own := [hook for hook in hooks if overrides(owner, hook, plain)]:
            return f"{type(owner).__name__} has its own {describe(own)}"
    per_epoch = data.train_dataloader().steps_per_epoch
    if math.isinf(last := last_step(trainer, per_epoch)):
        return "the fit has no last step: give max_steps or max_epochs"
    every = [type(c).__name__ for c in trainer.callbacks if steps_to_see(c, per_epoch, int(last)) is None]
    return f"{describe(every)} must see every batch" if every else None


def steps_due(trainer: Any, per_epoch: int, last: int) -> set[int]:
    """The optimizer steps at which a visit must end: those of callbacks, log entries and limits."""
    due = {last, trainer.min_steps or last}
    for callback in trainer.callbacks:
        due.update(steps_to_see(callback, per_epoch, last) or ())
    if trainer.loggers and trainer.log_every_n_steps:
        due.update(range(trainer.log_every_n_steps, last, trainer.log_every_n_steps))
    return due


def steps_to_see(callback: L.Callback, per_epoch: int, last: int) -> Iterable[int] | None:
    """The steps that a callback must see; None if it needs every step, or has a hook of each batch undeclared."""
    hooks = [hook for hook in CALLBACK_HOOKS if overrides(callback, hook, L.Callback)]
    declared = _owner(callback, "visit_ends")
    if "on_before_zero_grad" not in hooks and all(issubclass(declared, _owner(callback, hook)) for hook in hooks):
        return callback.visit_ends(per_epoch, last) if hooks else ()  # pyright: ignore[reportAttributeAccessIssue]
    if all(_owner(callback, hook).__module__.startswith("lightning.") for hook in hooks):
        if isinstance(callback, ModelCheckpoint):
            every = callback._every_n_train_steps
            return range(every, last + 1, every) if every else ()
        if isinstance(callback, ProgressBar | Timer):
            return ()
    return None


def hears_steps(trainer: Any, module: L.LightningModule, base: type) -> bool:
    """Whether somebody has a hook of each step. Those of `lottery_callbacks` have hooks of the optimizer beside."""
    owners = [c for c in trainer.callbacks for hook in STEP_HOOKS if overrides(c, hook, L.Callback)]
    own = any(overrides(module, hook, base) for hook in STEP_HOOKS)
    ours = [callback for callback in owners if type(callback).__module__.startswith("lottery_callbacks.")]
    return own or len(ours) < len(owners)


def overrides(owner: Any, hook: str, base: type) -> bool:
    """Whether an object, or its class, has a method of its own by that name, and not `base`'s."""
    own = getattr(type(owner), hook, None)
    return hook in vars(owner) or (own is not None and own is not getattr(base, hook, None))


def _owner(callback: L.Callback, name: str) -> type:
    """The class that a callback has a method from; a subclass with a new hook must declare anew."""
    return next((cls for cls in type(callback).__mro__ if name in vars(cls)), object)


def _closure(optimizer: Any) -> Any:
    """The default of `step`'s closure."""
    return inspect.signature(type(optimizer).step).parameters["closure"].default
