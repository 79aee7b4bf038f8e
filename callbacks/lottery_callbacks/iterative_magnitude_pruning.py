"""Iterative magnitude pruning with rewinding: one fit is one level, a loop of fits is the lottery."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lottery_callbacks.apply_ticket import start_from
from lottery_callbacks.fit_steps import counts_steps, last_step, steps_per_epoch
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.steps import Step
from lottery_callbacks.level_checkpoints import has_begun, newest_of_level, note_folders
from lottery_callbacks.masked_training import require_agreement
from lottery_callbacks.messages import one_of
from lottery_callbacks.module_state import require_capturable
from lottery_callbacks.optimizer_state import parameter_names
from lottery_callbacks.plan import plan_of_masks, require_held
from lottery_callbacks.pruning import Pruning
from lottery_callbacks.pruning_callback import PruningCallback
from lottery_callbacks.rewinding import RewindPoint, refuse_unwritable
from lottery_callbacks.ticket import Ticket

Retrain = Literal["weights", "prunable_weights", "learning_rate", "fine_tune"]


@dataclass(frozen=True)
class Level:
    """One level of the lottery, as a fit needs it: its folder and the ticket that it trains."""

    number: int
    run_dir: Path
    ticket: Path

    @cached_property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint of the level when first asked, to resume from; None where there is none.

        It is looked for below `run_dir`, and where an earlier fit of the level kept its checkpoints.
        """
        found = newest_of_level(self.run_dir)
        if found is None and (has_begun(self.run_dir) or (self.number == 0 and self.ticket.exists())):
            rank_zero_warn(
                f"level {self.number} had begun and begins again: no whole checkpoint is below {self.run_dir}; to go "
                "on from one, give the Trainer ModelCheckpoint(dirpath=level.run_dir)"
            )
        return found


class IterativeMagnitudePruning(PruningCallback):
    """Finds winning tickets (Frankle & Carbin, arXiv 1803.03635; rewinding to step k as in 1912.05671).

    ```python
    imp = IterativeMagnitudePruning(rate=0.2, rewind="0it", run_dir="runs/lenet")
    for level in imp.levels(20):                       # skips finished levels, resumes a torn one
        trainer = L.Trainer(max_steps=50_000, callbacks=[imp], default_root_dir=level.run_dir)
        trainer.fit(model, datamodule, ckpt_path=level.checkpoint)
    ```

    Level 0 is the dense run, unchanged to the bit; its state at step `rewind` is the rewind point. At the end of
    each fit the surviving weights are ranked, round(rate x surviving) of them are removed, and the next ticket is
    written to `run_dir/tickets`. The next fit trains it, by this object or by `ApplyTicket`, to the same bits.
    A fit of level >= 1 begins at step k: `max_steps`, schedules and epochs go on from there as Lightning counts.
    Networks with dropout, or data shuffled by the global random state: call `L.seed_everything` before each fit.

    Args:
        rate: fraction of the surviving weights removed at each level, in (0, 1). open_lth, the code of 1912.05671,
            removes ceil(rate x surviving): `Pruning(counts="ceiling")`.
        rewind: the step k to rewind to: "0it" (initialisation), "500it", "1ep".
        run_dir: where tickets and levels are kept; a relative path is relative to the working directory.
        pruning: score, scope, rates per layer and exclusions; by default magnitude, layerwise.
        retrain: what a level starts from: "weights" rewinds all parameters, buffers and the schedule to step k;
            "prunable_weights" leaves what is not pruned as trained, biases, norm layers and running statistics (the
            partial rewind in the code of arXiv 2310.18769 and 2307.03364, whose tickets are not at initialisation);
            "learning_rate" keeps all trained weights and rewinds optimizer and schedule (Renda et al., arXiv
            2003.02389); "fine_tune" keeps them and trains on at the last learning rate, from step 0, with no schedule.
        seed: of scores that draw.

    Reset at each level: optimizer, schedulers, loops (to step k). Kept: the rewind point, never written again.
    Memory: one CPU copy of the module, and for k > 0 of the optimizer state.

    Raises:
        ValueError: a bad argument, a rewind step beyond the run, a missing ticket, a `run_dir` with tickets of another
            rule or of a level that is finished; each says what to do.
    """

    found = ("ticket", "masks", "fit_masks", "level", "_yielded")

    def __init__(
        self,
        rate: float = 0.2,
        rewind: str = "0it",
        run_dir: str | os.PathLike[str] = "runs/lottery",
        pruning: Pruning | None = None,
        retrain: Retrain = "weights",
        seed: int = 0,
    ) -> None:
        super().__init__(pruning)
        if not 0 < rate < 1:
            raise ValueError(f"rate={rate} is outside (0, 1): it is the fraction of surviving weights a level removes")
        self.rate = rate
        self.rewind = Step.parse(rewind)
        self.run_dir = Path(run_dir)
        self.retrain = one_of("retrain", retrain, get_args(Retrain))
        self.seed = seed
        self.ticket: Ticket | None = None
        self._yielded: int | None = None  # by `levels`, which has looked at what is there

    # ---- the loop of fits

    def levels(self, last: int, finished: Callable[[Level], bool] | None = None) -> Iterator[Level]:
        """Yield levels 0 (dense) to `last`, each to be fitted before the next; finished ones are skipped.

        A level is finished when the ticket after it is written, or when `finished(level)` says so.

        Raises:
            ValueError: `run_dir` holds tickets that another rule found.
        """
        self._check_rule()
        for number in range(last + 1):
            level = self._level(number)
            if finished(level) if finished else self.ticket_path(number + 1).exists():
                rank_zero_info(f"level {number} is finished: {level.run_dir}")
                continue
            self.select(number)
            self._yielded = number
            yield level

    def _check_rule(self) -> None:
        newest = max(self.run_dir.glob("tickets/level_*.safetensors"), default=None)
        if newest is None:
            return
        found, own = Ticket.load(newest).provenance, self._provenance(0, None)
        for key in own.keys() - {"level", "parent", "torch"}:
            if key in found and found[key] != own[key]:
                raise ValueError(
                    f"{self.run_dir} holds tickets of another rule: {key} is {found[key]!r} there and {own[key]!r} "
                    "now; choose another run_dir, or remove that one"
                )

    def select(self, number: int) -> Level:
        """Make `number` the level that the next fit trains.

        Raises:
            ValueError: its ticket is missing or torn.
        """
        if number == 0:
            self.ticket, self.masks = None, {}
        elif self.ticket is None or self.ticket.level != number:
            self._take(Ticket.load(self.ticket_path(number)))
        self.level, self._yielded = number, None
        return self._level(number)

    def ticket_path(self, level: int) -> Path:
        """Where the ticket that `level` trains is kept."""
        return self.run_dir / "tickets" / f"level_{level:02d}.safetensors"

    def _level(self, number: int) -> Level:
        run_dir = self.run_dir / f"level_{number:02d}"
        return Level(number, run_dir, self.ticket_path(number))

    def _take(self, ticket: Ticket) -> None:
        self.ticket, self.masks = ticket, ticket.masks

    # ---- one level

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._yielded != self.level and not _smoke_test(trainer):
            self._check_rule()
            if not self._resumed:
                self._require_unfinished()
        require_capturable(pl_module)
        self.pruning.check(pl_module)
        if self.level:
            assert self.ticket is not None
            self.ticket.check(pl_module)
            require_held(pl_module, self.masks)
            rank_zero_info(plan_of_masks(pl_module, self.masks))
            start_from(self.ticket, trainer, pl_module, self.resumes(trainer))
        else:
            self._start_dense(trainer, pl_module)
        self.apply_masks(trainer, pl_module)

    def _require_unfinished(self) -> None:
        found = max(self.run_dir.glob("tickets/level_*.safetensors"), default=self.ticket_path(0))
        if found > self.ticket_path(self.level):
            raise ValueError(
                f"level {self.level} of {self.run_dir} is finished, and training it again would replace what it found: "
                f"{found.name} is there; go on by imp.levels(...), or choose another run_dir"
            )

    def _start_dense(self, trainer: L.Trainer, module: nn.Module) -> None:
        self.masks = self.pruning.initial_masks(module)
        self.ticket = None
        rank_zero_info(self.plan(module))
        if self.resumes(trainer):
            if self._resumed["captured"]:
                self.ticket = Ticket.load(self.ticket_path(0))
            return
        if not self.rewind.count:
            self._take(self._rewind_ticket(trainer, module))

    def plan(self, module: nn.Module) -> str:
        """What is pruned and what is left out, with the reasons, for people to read."""
        return self.pruning.plan(module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if _smoke_test(trainer):
            return
        note_folders(trainer, self._level(self.level).run_dir)
        if self.ticket is None:
            self._check_rewind(trainer)
            if self.rewind.count:
                refuse_unwritable(trainer)
        elif self.level == 0 and not self._resumed:
            self._keep(self.ticket, trainer)  # not sooner: a fit without a batch writes nothing

    def _check_rewind(self, trainer: L.Trainer) -> None:
        if self.rewind.unit == "ep" and math.isinf(trainer.num_training_batches):
            raise ValueError(f"rewind={self.rewind} needs a loader with a length: give iterations, as in '500it'")
        per_epoch = steps_per_epoch(trainer)
        at, last = self.rewind.in_iterations(per_epoch), last_step(trainer, per_epoch)
        if last <= at and counts_steps(trainer):  # else an epoch's number of steps is the module's own
            raise ValueError(
                f"rewind={self.rewind} is step {at}, and the run's last step is {last}: rewind earlier or train longer"
            )

    def visit_ends(self, per_epoch: int, last: float) -> Iterable[int] | None:
        collecting = super().visit_ends(per_epoch, last)
        return collecting if collecting is None else [self.rewind.in_iterations(per_epoch)]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.ticket is not None:
            return
        if self.rewind.unit == "ep":
            reached = trainer.is_last_batch and trainer.current_epoch + 1 >= self.rewind.count
        else:
            reached = trainer.global_step >= self.rewind.count
        if reached or _smoke_test(trainer):
            self._keep(self._rewind_ticket(trainer, pl_module), trainer)

    def _rewind_ticket(self, trainer: L.Trainer, module: nn.Module) -> Ticket:
        return Ticket(self.masks, RewindPoint.capture(trainer, module), self._provenance(0, None))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune the trained weights and write the next ticket; the next fit of this object trains it."""
        super().on_fit_end(trainer, pl_module)
        if self.ticket is None:
            raise ValueError(
                f"the run ended at step {trainer.global_step}, before rewind={self.rewind}: "
                "rewind earlier or train longer"
            )
        generator = torch.Generator().manual_seed(1_000 * self.seed + self.level)
        masks = self.pruning.next_masks(self.evidence(trainer, pl_module, generator), self.masks, self.rate)
        require_agreement(trainer, masks)
        self.level += 1
        rewind = self._rewind_point(trainer, pl_module, self.ticket.rewind)
        self._keep(Ticket(masks, rewind, self._provenance(self.level, self.ticket)), trainer)

    def _rewind_point(self, trainer: L.Trainer, module: nn.Module, first: RewindPoint) -> RewindPoint:
        if self.retrain == "weights":
            return first
        if self.retrain == "prunable_weights":
            rewound = {name: first.tensors[name] for name in self.masks}
            trained = RewindPoint.of(module, first.step, first.training)
            return replace(trained, tensors=trained.tensors | rewound)
        if self.retrain == "learning_rate":
            return RewindPoint.of(module, first.step, first.training)
        rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        names = parameter_names(trainer.optimizers, module)
        return RewindPoint.of(module, 0, {"learning_rates": rates, "parameters": names})

    def _keep(self, ticket: Ticket, trainer: L.Trainer) -> None:
        if trainer.is_global_zero and not _smoke_test(trainer):
            ticket.save(self.ticket_path(ticket.level))
        self._take(ticket)

    def _provenance(self, level: int, parent: Ticket | None) -> dict[str, Any]:
        return {
            "level": level,
            "rate": self.rate,
            "rates": self.pruning.rates,
            "pruning": str(self.pruning),
            "exclude": list(self.pruning.exclude),
            "include": list(self.pruning.include),
            "batches": self.pruning.batches,
            "rewind": str(self.rewind),
            "retrain": self.retrain,
            "seed": self.seed,
            "parent": M.digest(parent.masks) if parent else None,
            "torch": torch.__version__,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"captured": self.ticket is not None}


def _smoke_test(trainer: L.Trainer) -> bool:
    """Under `fast_dev_run` the rewind point is the state after its only step, and nothing is written."""
    return bool(getattr(trainer, "fast_dev_run", False))
