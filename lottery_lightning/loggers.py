"""Loggers for experiments: the one place that knows W&B."""

import hashlib
from pathlib import Path
from typing import Literal

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger


def make_logger(
    kind: Literal["none", "csv", "wandb"], folder: Path, project: str, group: str, name: str
) -> Logger | bool:
    """The logger of one run, writing below `folder` alone; False for none.

    W&B: one run a level, in one group a trial. Nothing needs an account: `WANDB_MODE=offline` keeps it on disk.

    Raises:
        ValueError: an unknown kind, or wandb is asked for and not installed.
    """
    if kind == "none":
        return False
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "csv":
        return CSVLogger(folder, name="logs")
    if kind == "wandb":
        try:
            own = hashlib.sha1(str(folder.resolve()).encode()).hexdigest()[:16]  # a resumed run goes on in its own
            return WandbLogger(name=name, save_dir=folder, project=project, group=group, id=own, resume="allow")
        except ModuleNotFoundError as error:
            raise ValueError("logger='wandb' needs wandb: pip install 'lottery-lightning[wandb]'") from error
    raise ValueError(f"logger={kind!r} is not known: choose none, csv or wandb")


def close(logger: Logger | bool | None) -> None:
    """End a run's logging, so that the next run gets a dashboard of its own."""
    if isinstance(logger, Logger):
        logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
