"""The rewind point: the complete training state at step k, captured once and restored at every level."""

from __future__ import annotations  # Lightning is for type checkers alone: a ticket needs torch and safetensors

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lottery_callbacks.messages import describe, inform
from lottery_callbacks.names import canonical, further_names, named_buffers, named_parameters

if TYPE_CHECKING:
    import lightning.pytorch as L


@dataclass(frozen=True)
class RewindPoint:
    """Training state at optimizer step `step`, detached from the run that it was captured from.

    Attributes:
        step: k, counted in optimizer steps; 0 is initialisation.
        tensors: every parameter and buffer by name (tied ones once), on the CPU.
        training: for k > 0 the optimizer, scheduler, precision and loop states as Lightning would checkpoint
            them, so that a level goes on from step k with its learning rate, schedule and place in the data.
            Empty for k = 0: a fresh fit is that state.

    Random number generators are not part of it: each level has SGD noise of its own. Where step k lies inside an epoch,
    `training` has the random state from which the order of that epoch was drawn, and the level goes on with its next
    batch (`loader_order` says for which loaders). Where step k ends an epoch, the state is that after the optimizer's
    and the schedulers' step. `ReduceLROnPlateau` is refused for k > 0:
    Lightning does not step it where a fit goes on, so that it would be one step behind.
    """

    step: int
    tensors: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        state = f", training state: {', '.join(map(str, self.training))}" if self.training else ""
        return f"RewindPoint(step {self.step}, tensors {len(self.tensors)}{state})"

    @classmethod
    def capture(cls, trainer: L.Trainer, module: nn.Module) -> RewindPoint:
        """Copy the state of a running fit; call from `on_fit_start` (k = 0) or `on_train_batch_end` (k > 0)."""
        step = trainer.global_step
        if step and any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            raise ValueError("ReduceLROnPlateau cannot be rewound to a step k > 0: rewind to '0it'")
        return cls(step, snapshot(module), training_state(trainer) if step else {})

    def restore(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Put a fit that has not begun into this state; call from `on_fit_start`.

        Parameters and buffers are overwritten in place; optimizers, schedulers and loops get copies, so that no
        later step can reach into this object.
        """
        load_snapshot(module, self.tensors)
        load_training_state(trainer, self.training)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """CPU copies of all parameters and buffers by name, tied ones once."""
    return {name: tensor.detach().cpu().clone() for name, tensor in _named_tensors(module).items()}


def load_snapshot(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the module's parameters and buffers, in place.

    Tied tensors may come under each of their names, as in a `state_dict`; of them the first one counts. Buffers that
    a `state_dict` leaves out may be absent, and keep their values. As in `load_state_dict` a tensor takes the module's
    own dtype: exactly where that is wider, rounded to nearest where it is narrower, and a line says so.

    Raises:
        ValueError: names or shapes differ from the module's.
    """
    own, further = _named_tensors(module), further_names(module)
    own = {name: tensor for name, tensor in own.items() if name in tensors or name not in _transient(module)}
    check_same_architecture(
        {name: tensor.shape for name, tensor in tensors.items() if name not in further},
        {name: tensor.shape for name, tensor in own.items()},
    )
    rounded = [name for name, tensor in own.items() if _rounds(tensors[name].dtype, tensor.dtype)]
    if rounded:
        there, here = tensors[rounded[0]].dtype, own[rounded[0]].dtype
        inform(f"rounded to the network's precision, {there} to {here}: {describe(rounded)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _transient(module: nn.Module) -> set[str]:
    return named_buffers(module).keys() - {canonical(name, module) for name in module.state_dict()}


def _rounds(source: torch.dtype, target: torch.dtype) -> bool:
    return torch.promote_types(source, target) != target


def check_same_architecture(ticket: Mapping[str, torch.Size], module: Mapping[str, torch.Size]) -> None:
    """Compare names and shapes, ticket against module.

    Raises:
        ValueError: one line that names the first difference.
    """
    for name in [*module, *ticket]:
        if ticket.get(name) != module.get(name):
            there, here = (tuple(s[name]) if name in s else "absent" for s in (ticket, module))
            raise ValueError(
                f"the ticket is for another architecture: {name} is {there} in the ticket and {here} in the network; "
                "build the network that the ticket was found on"
            )


def training_state(trainer: L.Trainer) -> dict[str, Any]:
    """Optimizer, scheduler, precision and loop states of a running fit, deeply copied, tensors on the CPU."""
    from lottery_callbacks.fit_steps import in_steps  # with Lightning
    from lottery_callbacks.loader_order import observe

    state = {
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
        "loops": in_steps(trainer.fit_loop.state_dict(), trainer.train_dataloader, trainer.global_step),
    }
    if order := observe(trainer).inside_epoch():
        state["order"] = order
    return to_cpu(state)


def load_training_state(trainer: L.Trainer, state: Mapping[str, Any]) -> None:
    """Load what `training_state` gave; nothing where it is empty.

    `Optimizer.load_state_dict` keeps the tensors that it is given, hence the deep copy.
    A state of `learning_rates` (fine-tuning) fixes these per parameter group and sets the schedulers aside.
    """
    state = copy.deepcopy(dict(state))
    if "loops" in state:
        _check_same_optimizers(trainer, state)
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)
        if state["precision"]:
            trainer.precision_plugin.load_state_dict(state["precision"])
        _load_loops(trainer, state["loops"])
        from lottery_callbacks.loader_order import observe  # with Lightning

        observe(trainer).rewind(state.get("order", {}))
    if "learning_rates" in state:
        trainer.lr_scheduler_configs.clear()
        for optimizer, rates in zip(trainer.optimizers, state["learning_rates"], strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def _check_same_optimizers(trainer: L.Trainer, state: Mapping[str, Any]) -> None:
    def kinds(optimizers: list[dict[str, Any]], schedulers: int) -> tuple[Any, ...]:
        return [[sorted(group) for group in saved["param_groups"]] for saved in optimizers], schedulers

    own = kinds([optimizer.state_dict() for optimizer in trainer.optimizers], len(trainer.lr_scheduler_configs))
    if own != kinds(state["optimizers"], len(state["schedulers"])):
        raise ValueError(
            "the rewind point holds the state of other optimizers or schedulers: train it with those that it was "
            "captured from, or rewind to '0it'"
        )


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


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**named_parameters(module), **named_buffers(module)}


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
