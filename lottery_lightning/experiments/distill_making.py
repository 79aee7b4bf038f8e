"""The making of a distilled set: one fit, with pictures of the images as they form."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lottery_callbacks import ResumeCheckpoint, ValidateEvery, newest_checkpoint
from lottery_callbacks.ticket import write_atomically
from lottery_lightning.data import Preprocessing
from lottery_lightning.distillation import Distiller, RealBatches
from lottery_lightning.experiments.cost import Cost
from lottery_lightning.experiments.runs import check_trainer, one_process
from lottery_lightning.experiments.store import write_json
from lottery_lightning.figures.distill import images_figure
from lottery_lightning.loggers import Kind, close, log_image, make_logger
from lottery_lightning.progress import ExperimentProgress

RESUME = "resume"  # the folder of checkpoints
LOSSES = 400  # about so many losses are kept of a making


@dataclass(frozen=True)
class Making:
    """How a distilled set is made, beside its method.

    Args:
        max_steps: steps of the images.
        picture_every: steps between two pictures of them; the first is of step 0, the last of the end.
        checkpoint_seconds: least time between two checkpoints to resume from; one may be written every
            gcd(`picture_every`, 100) steps.
        trainer: further arguments of `lightning.pytorch.Trainer`, such as the accelerator.
    """

    max_steps: int = 20_000
    picture_every: int = 1000
    checkpoint_seconds: float = 30.0
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.picture_every < 1:
            raise ValueError(f"making: max_steps={self.max_steps}, picture_every={self.picture_every}: give 1 at least")
        check_trainer(self.trainer, "making.trainer")


@dataclass(frozen=True)
class Watched:
    """Where a making is kept, and how it is shown.

    Args:
        folder: of the making; beside it lie its `pictures`.
        name: for lines and titles.
        trial: its number.
        progress: is told how far it is.
        logger: as in `Training`.
        project: for loggers, beside `config`, what they record.
        config: see there.
    """

    folder: Path
    name: str
    trial: int
    progress: ExperimentProgress
    logger: Kind
    project: str
    config: Mapping[str, Any]

    def make_logger(self) -> Logger | bool:
        """The logger of the fit."""
        group = f"{self.project}-trial_{self.trial}"
        made = make_logger(self.logger, self.folder, self.project, group, f"{self.name}, making")
        if isinstance(made, Logger):
            made.log_hyperparams({**self.config, "trial": self.trial})
        return made


def fit(
    distiller: Distiller, batches: RealBatches, preprocessing: Preprocessing, making: Making, watched: Watched
) -> dict[str, Any]:
    """Fit the distiller, whose images are then done; a torn fit goes on from its checkpoint, to the same bits.

    Beside the folder, which gets `losses.json` (steps and their matching losses), are the `pictures`: `step_00000.png`
    and so on, `start_and_end.png`. What its folder `RESUME` holds may go when the images are kept.

    Args:
        distiller: with the first images.
        batches: the real images.
        preprocessing: theirs, for pictures.
        making: how.
        watched: where, and how it is shown.

    Returns:
        Its `seconds`, and `points`, how many real images its steps read.

    Raises:
        ValueError: the trainer is of several processes, or an image is not finite.
    """
    cost, watch = Cost(), Watch(preprocessing, making, watched)
    options: dict[str, Any] = {
        "max_steps": making.max_steps,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "logger": watched.make_logger(),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "devices": 1,
        "default_root_dir": watched.folder,
        "callbacks": [
            ValidateEvery(f"{math.gcd(making.picture_every, 100)}it"),
            cost,
            watch,
            Told(watched.progress),
            ResumeCheckpoint(watched.folder / RESUME, making.checkpoint_seconds),
        ],
    }
    trainer = one_process(L.Trainer(**options | making.trainer))
    trainer.fit(distiller, batches, ckpt_path=newest_checkpoint(watched.folder / RESUME))
    close(trainer.logger)
    write_json(watched.folder / "losses.json", watch.losses)
    return {"seconds": cost.of(trainer)["seconds"], "points": trainer.global_step * distiller.points_per_step}


class Told(L.Callback):
    """Tells the bar how much of a fit is done, of however many steps it is."""

    def __init__(self, progress: ExperimentProgress) -> None:
        self.progress = progress

    def visit_ends(self, per_epoch: int, last: float) -> tuple[int, ...]:
        """None: the bar may advance by visits; see `fit_steps`."""
        return ()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.progress.tell(trainer.global_step, trainer.max_steps)


class Watch(L.Callback):
    """Pictures of the images, their matching losses, lines with the time left; it changes nothing of the fit.

    Images that are not finite end the fit at the next validation, before a checkpoint keeps them.
    """

    def __init__(self, preprocessing: Preprocessing, making: Making, watched: Watched) -> None:
        self.preprocessing, self.making, self.watched = preprocessing, making, watched
        self.folder = watched.folder.parent / "pictures"
        self.losses: list[tuple[int, float]] = []
        self.first: Tensor | None = None
        self._began, self._from, self._loss = 0.0, 0, torch.empty(0)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._began, self._from = time.perf_counter(), trainer.global_step
        if self.first is None:
            self.first = self._pixels(pl_module)
            self._draw(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % max(1, self.making.max_steps // LOSSES) == 0:
            self.losses.append((step, float(outputs["loss"])))
        self._loss = outputs["loss"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        step, last = trainer.global_step, self.making.max_steps
        if not bool(pl_module.images.isfinite().all()):
            rate = f"lr={pl_module.method.lr}"
            raise ValueError(f"an image is not finite at step {step:,}: the making diverged, lower its method's {rate}")
        if step % self.making.picture_every and step != last:
            return
        self._draw(trainer, pl_module)
        if step == last:
            first: Any = self.first
            sides = {"step 0": first, f"step {step:,}": self._pixels(pl_module)}
            write_atomically(
                self.folder / "start_and_end.png", images_figure(sides, pl_module.classes, self.watched.name)
            )
            return
        left = (time.perf_counter() - self._began) / (step - self._from) * (last - step)
        self.watched.progress.console.print(
            f"  {self.watched.name}, step {step:,} of {last:,}: loss {float(self._loss):.4g}, {_duration(left)} left",
            soft_wrap=True,
        )

    def _draw(self, trainer: L.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        picture = images_figure({f"step {step:,}": self._pixels(pl_module)}, pl_module.classes, self.watched.name)
        write_atomically(self.folder / f"step_{step:05d}.png", picture)
        log_image(trainer.logger, "images", picture, step)

    def _pixels(self, pl_module: Any) -> Tensor:
        return self.preprocessing.pixels(pl_module.images.detach().cpu())

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses, self.first = [tuple(pair) for pair in state_dict["losses"]], state_dict["first"]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "under 1 min"
