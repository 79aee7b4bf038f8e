"""One run: one fit in one folder, its tests, and the record that says it is done."""

import copy
import gc
import inspect
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lottery_callbacks import (
    ApplyTicket,
    EdgePopup,
    IterativeMagnitudePruning,
    Pruning,
    ResumeCheckpoint,
    RewindPoint,
    SparsityMonitor,
    Ticket,
    ValidateEvery,
    ValidationCurve,
    newest_checkpoint,
)
from lottery_callbacks.apply_ticket import reinitialise
from lottery_callbacks.functional import masks as M
from lottery_callbacks.masked_training import MaskedTraining
from lottery_lightning.experiments.cost import Cost
from lottery_lightning.experiments.needs import Needs
from lottery_lightning.experiments.store import read_json, write_json
from lottery_lightning.loggers import Kind, close, log_ticket, make_logger

# What dashboards show of a finished run, as <arm>/<key>.
MEASURED = ("early_stop_iteration", "test_acc_early_stop", "test_acc_end")
# What an experiment decides itself; accumulation would turn steps of validation into batches, limits miscount examples.
OWNED = {
    "max_steps", "max_epochs", "max_time", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps",
    "logger", "callbacks", "default_root_dir", "accumulate_grad_batches", "fast_dev_run", "limit_train_batches",
    "overfit_batches",
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """How each run of an experiment trains.

    Args:
        max_steps: optimizer steps of a run.
        val_every: validate every so many steps, "100it" or "1ep", and after the last.
        threads: CPU threads of torch; small networks are fastest with 1. None leaves torch's choice.
        checkpoint_seconds: least time between two checkpoints to resume from.
        logger: "csv", "tensorboard", "wandb" (offline without an account: WANDB_MODE=offline) or "none".
        trainer: further arguments of `lightning.pytorch.Trainer`, such as accelerator or precision.
    """

    max_steps: int = 50_000
    val_every: str = "100it"
    threads: int | None = None
    checkpoint_seconds: float = 30.0
    logger: Kind = "none"
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: a run makes one step at least")
        ValidateEvery(self.val_every)
        check_trainer(self.trainer, "training.trainer")

    def use_threads(self) -> None:
        """Have torch use that many threads from now on."""
        if self.threads:
            torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class Run:
    """One run of a plan: which trial, level, arm and draw, and where it lives."""

    run_dir: Path
    trial: int
    level: int
    arm: str
    draw: int = 0

    @property
    def record(self) -> dict[str, Any] | None:
        """What the run found; None while it is not done."""
        return read_json(self.run_dir / "result.json")

    def __str__(self) -> str:
        return f"trial {self.trial} level {self.level} {self.arm}" + (f" {self.draw}" if self.draw else "")


class Runner:
    """Does runs of one model on one data module, each from a seed of its own."""

    def __init__(
        self,
        model: L.LightningModule,
        data: L.LightningDataModule,
        training: Training,
        name: str,
        callbacks: tuple[L.Callback, ...] = (),
        config: Mapping[str, Any] | None = None,
        needs: Needs | None = None,
    ) -> None:
        self.model, self.data, self.training, self.name, self.callbacks = model, data, training, name, callbacks
        self.config = dict(config or {})  # what loggers record of the experiment, beside each run's own
        self.needs = needs or Needs()
        self.unchecked: list[Runner] = [self]  # what must be right before this one's next step
        self._data_seed = getattr(data, "data_seed", 0)
        training.use_threads()

    def fresh_model(self, seed: int) -> L.LightningModule:
        """A copy of the model, initialised by `seed`."""
        model = copy.deepcopy(self.model)
        reinitialise(model, seed)
        return model

    def do(self, run: Run, seed: int, masked: MaskedTraining, *more: L.Callback) -> dict[str, Any]:
        """Fit, test the best and the last weights, write the record; a torn fit goes on from its checkpoint.

        Args:
            run: the run.
            seed: of the trial: initialisation and order of the data. Dropout and the like have seeds of the run.
            masked: the callback that applies the ticket.
            *more: further callbacks of this run.

        Raises:
            ValueError: before the first run, the model or the data have not what runs need (see `Needs`); the best
                weights are not those of the curve.
        """
        self.training.use_threads()  # another runner may have set its own
        model = self.fresh_model(seed)
        if hasattr(self.data, "data_seed"):
            self.data.data_seed = self._data_seed + seed  # pyright: ignore[reportAttributeAccessIssue]
        own_seed = stable_seed(seed, run.level, former(run.arm), run.draw)
        while self.unchecked:
            L.seed_everything(own_seed, verbose=False)  # data that are drawn in `setup` are those of the fit
            self.unchecked.pop(0).check(run.run_dir)
        L.seed_everything(own_seed, verbose=False)
        folder, validate, curve = run.run_dir, ValidateEvery(self.training.val_every), ValidationCurve()
        best = ModelCheckpoint(
            folder,
            filename="best",
            monitor=curve.loss,
            save_weights_only=True,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        resume, cost = ResumeCheckpoint(folder / "resume", self.training.checkpoint_seconds), Cost()
        callbacks = [masked, validate, SparsityMonitor(), curve, cost, *more, *self.callbacks, best, resume]
        trainer = self._trainer(run, callbacks)
        if trainer.logger:
            own = {"seed": seed, "trial": run.trial, "level": run.level, "arm": run.arm, "draw": run.draw}
            trainer.logger.log_hyperparams(self.config | own)
        trainer.fit(model, self.data, ckpt_path=newest_checkpoint(folder / "resume"))
        trainer.save_checkpoint(folder / "final.ckpt", weights_only=True)
        _check_step(folder / "best.ckpt", curve.early_stop_iteration)
        at_end = at_best = self._test(trainer, model)
        if curve.early_stop_iteration != trainer.global_step:
            at_best = self._test(trainer, model, folder / "best.ckpt")
        record = {
            "trial": run.trial,
            "level": run.level,
            "arm": run.arm,
            "draw": run.draw,
            "density": M.density(masked.fit_masks),
            "kept": sum(M.kept(masked.fit_masks).values()),
            "kept_per_layer": M.kept(masked.fit_masks),
            "early_stop_iteration": curve.early_stop_iteration,
            "min_val_loss": curve.minimum,
            "test_acc_early_stop": at_best,
            "test_acc_end": at_end,
            "curve": curve.rows,
        }
        if trainer.logger:
            found = {f"{run.arm}/{key}": record[key] for key in MEASURED}
            trainer.logger.log_metrics(found, step=self.training.max_steps)
        if isinstance(masked, IterativeMagnitudePruning):
            log_ticket(trainer.logger, masked.ticket_path(run.level))
        elif isinstance(masked, EdgePopup) and masked.path:
            log_ticket(trainer.logger, Path(masked.path))
        close(trainer.logger)
        write_json(folder / "cost.json", cost.of(trainer))  # apart: seconds are never the same again
        write_json(folder / "result.json", record)
        shutil.rmtree(folder / "resume", ignore_errors=True)
        del trainer, model, masked
        gc.collect()  # trainers and models hold each other: they go only when cycles are collected
        return record

    def check(self, folder: Path) -> None:
        """Refuse a model or data without what runs need, see `Needs.check`; the global random state is drawn from."""
        options = self._options(folder)
        one_process(L.Trainer(**options))
        self.needs.check(self.model, self.data, options | {"logger": self.training.logger != "none"})

    def test(self, run: Run, model: L.LightningModule, found: Mapping[str, float]) -> float:
        """The test accuracy of the model's present weights; loggers get it with what else was found of them."""
        trainer = self._trainer(run, list(self.callbacks))
        accuracy = self._test(trainer, model)
        if trainer.logger:
            trainer.logger.log_hyperparams(self.config | {"trial": run.trial, "arm": run.arm})
            trainer.logger.log_metrics(dict(found))
        close(trainer.logger)
        return accuracy

    def _trainer(self, run: Run, callbacks: list[L.Callback]) -> L.Trainer:
        group = f"{self.name}-trial_{run.trial}"
        logger = make_logger(self.training.logger, run.run_dir, self.name, group, str(run))
        return one_process(L.Trainer(**self._options(run.run_dir), logger=logger, callbacks=callbacks))

    def _options(self, folder: Path) -> dict[str, Any]:
        options: dict[str, Any] = {
            "max_steps": self.training.max_steps,
            "max_epochs": -1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "devices": 1,
            "default_root_dir": folder,
        }
        return options | self.training.trainer

    def _test(self, trainer: L.Trainer, model: L.LightningModule, checkpoint: Path | None = None) -> float:
        (metrics,) = trainer.test(model, self.data, ckpt_path=checkpoint, verbose=False)
        if "test/acc" not in metrics:
            raise ValueError(f"the model logs no 'test/acc' in test_step: it logs {', '.join(metrics) or 'nothing'}")
        return float(metrics["test/acc"])


def check_together(runners: Iterable[Runner]) -> None:
    """Have the first run of any of them check all, before its first step."""
    unchecked = list(runners)
    for runner in unchecked:
        runner.unchecked = unchecked


def dense_fit(model: L.LightningModule, seed: int) -> ApplyTicket:
    """What trains all weights, drawn by `seed`: a dense fit is that of the ticket which keeps everything."""
    everything = Ticket(M.ones(Pruning().prunable(model)), RewindPoint(0, {}))
    return ApplyTicket(everything, weights="reinit", seed=seed)


def check_trainer(arguments: Mapping[str, Any], name: str) -> None:
    """Refuse arguments called `name` that Trainer has not, or that are the experiment's own."""
    if unknown := set(arguments) - set(inspect.signature(L.Trainer).parameters):
        raise ValueError(f"{name} names {', '.join(sorted(unknown))}: no argument of Trainer")
    if owned := set(arguments) & OWNED:
        raise ValueError(f"{name} names {', '.join(sorted(owned))}: the experiment sets that itself")


def one_process(trainer: L.Trainer) -> L.Trainer:
    """The trainer, refused if it would start several processes."""
    if trainer.world_size > 1:
        raise ValueError(
            "an experiment trains each run in one process: start the command once per device "
            "(CUDA_VISIBLE_DEVICES), they share the trials"
        )
    return trainer


@contextmanager
def quick_collection() -> Iterator[None]:
    """A block in which a collection of cycles looks at new objects alone: in 3 ms, not 200 for all that is imported."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _check_step(best: Path, iteration: int) -> None:
    """The best weights are those of the early-stop iteration, unless the folder was moved in the midst of a run."""
    step = torch.load(best, map_location="cpu", weights_only=True)["global_step"]
    if step != iteration:
        raise ValueError(f"{best} is of step {step} and not of the best, {iteration}: remove its folder and repeat")


def former(arm: str) -> str:
    """The arm as it was called when results were published: seeds are drawn from that name, to the same bits.

    >>> former("layerwise_random"), former("layerwise_random level 4 at 0it"), former("global_random")
    ('random', 'random level 4 at 0it', 'global_random')
    """
    return re.sub(r"^layerwise_random(?=$| level )", "random", arm)


def stable_seed(*parts: object) -> int:
    """A seed that depends on `parts` alone, on every machine."""
    return random.Random("/".join(map(str, parts))).getrandbits(31)
