"""The rewind point: the complete training state at step k, captured once and restored at every level."""

from __future__ import annotations  # Lightning is for type checkers alone: a ticket needs torch and safetensors

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lottery_callbacks.module_state import check_same_architecture, further_state, load_snapshot, snapshot
from lottery_callbacks.optimizer_state import CHECKPOINT, group_order, parameter_names, states_by_name
from lottery_callbacks.primitives import primitive

if TYPE_CHECKING:
    import lightning.pytorch as L

__all__ = [
    "RewindPoint",
    "check_same_architecture",
    "load_snapshot",
    "load_training_state",
    "refuse_unwritable",
    "resume_by_name",
    "snapshot",
    "to_cpu",
    "training_state",
]


@dataclass(frozen=True)
class RewindPoint:
    """Training state at optimizer step `step`, detached from the run that it was captured from.

    Attributes:
        step: k, counted in optimizer steps; 0 is initialisation.
        tensors: every parameter and persistent buffer by name (tied ones once), on the CPU.
        training: for k > 0 the optimizer, scheduler, precision and loop states as Lightning would checkpoint
            them, so that a level goes on from step k with its learning rate, schedule and place in the data; and
            "parameters", the names in each optimizer's groups, by which a level's own optimizers get the state.
            For k = 0 a fresh fit is that state. "module" is what `further_state` adds to the tensors, if anything.

    A non-persistent buffer is a cache: it is left to the module, and a value that training put there stays. Random
    number generators are not part of it: each level has SGD noise of its own. Where step k lies inside an epoch,
    `training` has the random state from which the order of that epoch was drawn, and the level goes on with its next
    batch (`loader_order` says for which loaders). Where step k ends an epoch, the state is that after the optimizer's
    and the schedulers' step. `ReduceLROnPlateau` is refused for k > 0: Lightning does not
    step it where a fit goes on, so that it would be one step behind.
    """

    step: int
    tensors: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        state = f", training state: {', '.join(map(str, self.training))}" if self.training else ""
        return f"RewindPoint(step {self.step}, tensors {len(self.tensors)}{state})"

    @classmethod
    def capture(cls, trainer: L.Trainer, module: nn.Module) -> RewindPoint:
        """Copy the state of a running fit; call from `on_fit_start` (k = 0) or `on_train_batch_end` (k > 0).

        Raises:
            ValueError: a ticket file cannot hold the state; one line that names the place.
        """
        step = trainer.global_step
        if step:
            refuse_unwritable(trainer)
        return cls.of(module, step, training_state(trainer) if step else {})

    @classmethod
    def of(cls, module: nn.Module, step: int = 0, training: Mapping[str, Any] | None = None) -> RewindPoint:
        """Copy the module's present state, beside the `training` state of step `step`."""
        tensors, further = snapshot(module), further_state(module)
        others = {key: value for key, value in (training or {}).items() if key != "module"}
        return cls(step, tensors, others | ({"module": further} if further else {}))

    def load_(self, module: nn.Module) -> None:
        """Put the module alone into this state, as `load_snapshot` says."""
        load_snapshot(module, self.tensors, self.training.get("module"))

    def renamed(self, rename: Callable[[dict[str, Any]], dict[str, Any]]) -> RewindPoint:
        """The same state of the module under other names; that of the optimizers, which is the whole fit's, is left."""
        further = {kind: rename(state) for kind, state in self.training.get("module", {}).items()}
        further = {kind: state for kind, state in further.items() if state}
        return RewindPoint(self.step, rename(self.tensors), {"module": further} if further else {})

    def restore(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Put a fit that has not begun into this state; call from `on_fit_start`.

        Parameters and buffers are overwritten in place; optimizers, schedulers and loops get copies, so that no
        later step can reach into this object.
        """
        self.load_(module)
        load_training_state(trainer, module, self.training)


def training_state(trainer: L.Trainer) -> dict[str, Any]:
    """Optimizer, scheduler, precision and loop states of a running fit, deeply copied, tensors on the CPU.

    Raises:
        ValueError: something in it is neither tensor nor primitive.
    """
    from lottery_callbacks.fit_steps import in_steps  # with Lightning
    from lottery_callbacks.loader_order import observe

    state = {
        "parameters": parameter_names(trainer.optimizers, trainer.lightning_module),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
        "loops": in_steps(trainer.fit_loop.state_dict(), trainer.train_dataloader, trainer.global_step),
    }
    if order := observe(trainer).inside_epoch():
        state["order"] = order
    return primitive(state, "training")


def refuse_unwritable(trainer: L.Trainer) -> None:
    """Refuse optimizers and schedulers whose state no rewind point of a step k > 0 can hold; call before step 1.

    Raises:
        ValueError: one line that names what it is.
    """
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        raise ValueError("ReduceLROnPlateau cannot be rewound to a step k > 0: rewind to '0it'")
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    primitive({"schedulers": schedulers}, "training")
    primitive({"optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers]}, "training")


def load_training_state(trainer: L.Trainer, module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `training_state` gave, by parameter name; nothing where it is empty.

    `Optimizer.load_state_dict` keeps the tensors that it is given, hence the deep copy.
    A state of `learning_rates` (fine-tuning) fixes these per parameter group and sets the schedulers aside.

    Raises:
        ValueError: the fit has other optimizers, schedulers, parameters or groups.
    """
    state = copy.deepcopy(dict(state))
    names = state.get("parameters")
    if "loops" in state:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        optimizers, schedules = states_by_name(
            trainer.optimizers, schedulers, module, state["optimizers"], state["schedulers"], names
        )
        for optimizer, saved in zip(trainer.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(schedulers, schedules, strict=True):
            scheduler.load_state_dict(saved)
        if state["precision"]:
            trainer.precision_plugin.load_state_dict(state["precision"])
        _load_loops(trainer, state["loops"])
        from lottery_callbacks.loader_order import observe  # with Lightning

        observe(trainer).rewind(state.get("order", {}))
    if "learning_rates" in state:
        trainer.lr_scheduler_configs.clear()
        _load_rates(trainer, module, state["learning_rates"], names)


def _load_rates(trainer: L.Trainer, module: nn.Module, rates: list[list[float]], names: Any) -> None:
    own = parameter_names(trainer.optimizers, module)
    here, there = ([len(groups) for groups in of_all] for of_all in (own, rates))
    if here != there:
        raise ValueError(
            f"the ticket holds the learning rates of {there} parameter groups, and the fit's optimizers have {here}: "
            "fine-tune it with the optimizers that it was found with"
        )
    for number, optimizer in enumerate(trainer.optimizers):
        label = f"optimizer {number} ({type(optimizer).__name__})"
        order = group_order(names[number], own[number], label) if names else range(here[number])
        for group, match in zip(optimizer.param_groups, order, strict=True):
            group["lr"] = rates[number][match]


def resume_by_name(trainer: L.Trainer, module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Order the optimizer and scheduler states of a loaded checkpoint as the fit's optimizers list the parameters.

    Lightning restores them by position after `on_fit_start`, so it is called there. A checkpoint without
    "optimizer_parameters" is left as it is.

    Raises:
        ValueError: the fit has other optimizers, schedulers, parameters or groups.
    """
    names = checkpoint.get("optimizer_parameters")
    if not names or (averages_weights(trainer) and names == parameter_names(trainer.optimizers, module)):
        return
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    saved = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    states = states_by_name(trainer.optimizers, schedulers, module, *saved, names, CHECKPOINT)
    checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = states


def averages_weights(trainer: L.Trainer) -> bool:
    """Whether stochastic weight averaging puts a scheduler of its own into the fit, which Lightning then restores."""
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    return any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]


def _load_loops(trainer: L.Trainer, state: dict[str, Any]) -> None:
    """Go on after the batch of step k; where it ended an epoch, begin the next one as an unbroken fit does.

    Lightning's own restart from the last batch of an epoch skips `on_train_epoch_start` and leaves the epoch
    counters uneven, so that a second restart would misread them.
    """
    loop = trainer.fit_loop
    ends_epoch = state["epoch_loop.batch_progress"]["is_last_batch"]
    if ends_epoch:
        state["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    loop.load_state_dict(state)
    if ends_epoch:
        loop.epoch_loop.batch_progress.increment_completed()
        loop.epoch_progress.increment_processed()
        loop.epoch_progress.increment_completed()
        loop.epoch_loop.restarting = False


def to_cpu(value: Any) -> Any:
    """A deep copy with its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        copied = {key: to_cpu(item) for key, item in value.items()}
        return Counter(copied) if isinstance(value, Counter) else copied  # the milestones of MultiStepLR
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(item) for item in value)
    return copy.deepcopy(value)
