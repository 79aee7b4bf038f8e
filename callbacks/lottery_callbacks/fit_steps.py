"""The optimizer steps of a running fit, also where one call of `training_step` (a visit) makes several of them.

A callback takes part in visits by defining

    def visit_ends(self, per_epoch: int, last: float) -> Iterable[int] | None

the optimizer steps up to `last` after which its `on_train_batch_start` and `on_train_batch_end` must see the run, where
an epoch has `per_epoch` of them; None if it needs every step. A callback that overrides neither hook need not. Hooks of
each backward pass and step are called at each step in any case; one with `on_before_zero_grad` gets one step a visit.
"""

import math
from typing import Any

import lightning.pytorch as L

from lottery_callbacks.functional.steps import Step


def makes_visits(trainer: L.Trainer) -> bool:
    """Whether the training batches of this fit are visits of our loader, each of several optimizer steps."""
    return getattr(trainer.train_dataloader, "visits", None) is not None


def counts_steps(trainer: L.Trainer) -> bool:
    """Whether a batch is an optimizer step, up to accumulation; a module that optimizes by hand makes any number."""
    return trainer.lightning_module.automatic_optimization or makes_visits(trainer)


def steps_per_epoch(trainer: L.Trainer) -> int:
    """Optimizer steps in an epoch; 0 where that is unknown: no length, or a module that optimizes by hand."""
    if makes_visits(trainer):
        loader: Any = trainer.train_dataloader
        return loader.steps_per_epoch
    batches = trainer.num_training_batches
    if math.isinf(batches) or not counts_steps(trainer):
        return 0
    return math.ceil(batches / trainer.accumulate_grad_batches)


def iterations(step: Step, per_epoch: int) -> int:
    """`step` in optimizer steps.

    Raises:
        ValueError: it counts epochs, and their length is unknown (0).
    """
    if step.unit == "ep" and not per_epoch:
        raise ValueError(
            f"{step} needs automatic optimization and a loader with a length: give iterations, as in '500it'"
        )
    return step.in_iterations(per_epoch)


def last_step(trainer: L.Trainer, per_epoch: int) -> float:
    """The optimizer step that the Trainer's limits end the fit at, where an epoch has `per_epoch`; inf for none."""
    limits = (trainer.max_steps, per_epoch * (trainer.max_epochs or -1))
    return min((limit for limit in limits if limit > 0), default=math.inf)


def in_steps(loops: dict[str, Any], loader: Any, step: int) -> dict[str, Any]:
    """The state of a fit's loops with its counters in optimizer steps, as a fit of one step a visit keeps them.

    So a rewind point that was captured between visits begins fits with others, or with none.

    Args:
        loops: `trainer.fit_loop.state_dict()`; changed in place.
        loader: the training loader; of `state_dict()["batch"]` batches into the epoch if it makes visits.
        step: the optimizer steps done.
    """
    if getattr(loader, "visits", None) is not None:
        progress, batch = loops["epoch_loop.batch_progress"], loader.state_dict()["batch"]
        for counters, reached in ((progress["total"], step), (progress["current"], batch)):
            behind = reached - counters["ready"]
            counters.update({name: count + behind for name, count in counters.items()})
    return loops


def count_steps(loops: dict[str, Any], step: int) -> None:
    """Make `step` the optimizer steps done, for fits that optimize automatically and for those that make visits."""
    automatic = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
    manual = loops["epoch_loop.manual_optimization.optim_step_progress"]["total"]
    for counters in (automatic, manual):
        counters.update(ready=step, completed=step)
