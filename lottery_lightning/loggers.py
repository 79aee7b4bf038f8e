"""The one place that knows the loggers: W&B, TensorBoard, CSV. None of them needs to be installed to import this.

Everything works on any project's own logger; what a logger cannot show (CSV: pictures, tables, tickets) it leaves out.
`mask_figure` is one of `lottery_lightning.figures`.

```python
ticket = Ticket.load(level.ticket)  # after trainer.fit(...) of a level, with any logger
log_level(trainer.logger, {"ticket/acc": float(trainer.callback_metrics["val/acc"])}, level.number)
log_image(trainer.logger, "masks", mask_figure([(0, ticket)]), level.number)
log_table(trainer.logger, "levels", [{"level": level.number, "density": ticket.density}], level.number)
log_ticket(trainer.logger, level.ticket)
```

`log_lines` is a `report` of `lottery_callbacks.LinearModeConnectivity`.
"""

import hashlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lottery_callbacks import Ticket
from lottery_callbacks.functional.interpolation import Line

Kind = Literal["none", "csv", "tensorboard", "wandb"]


def make_logger(kind: Kind, folder: Path, project: str, group: str | None, name: str) -> Logger | bool:
    """The logger of one run, writing below `folder` alone; False for none.

    W&B: one run a level, in one group a trial. Nothing needs an account: `WANDB_MODE=offline` keeps it on disk.
    `WANDB_PROJECT` replaces `project`. Under a sweep's agent there is one run a process, the agent's own: it is given
    to the run without a group, an experiment's summary, and those with a group have none.

    Args:
        kind: none, csv, tensorboard or wandb.
        folder: of the run; a resumed run goes on in its own W&B run.
        project: of W&B.
        group: of W&B; None for the summary of an experiment.
        name: of the W&B run.

    Raises:
        ValueError: an unknown kind, or one whose package is not installed.
    """
    if kind == "none" or (kind == "wandb" and group and os.environ.get("WANDB_SWEEP_ID")):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "csv":
        return CSVLogger(folder, name="logs")
    if kind == "tensorboard":
        try:
            return TensorBoardLogger(folder, name="logs", version="", default_hp_metric=False)
        except ModuleNotFoundError as error:
            mend = "pip install 'lottery-lightning[tensorboard]'"
            raise ValueError(f"logger='tensorboard' needs tensorboard: {mend}") from error
    if kind == "wandb":
        try:
            own = hashlib.sha1(str(folder.resolve()).encode()).hexdigest()[:16]  # a resumed run goes on in its own
            project = os.environ.get("WANDB_PROJECT") or project
            return WandbLogger(name=name, save_dir=folder, project=project, group=group, id=own, resume="allow")
        except ModuleNotFoundError as error:
            raise ValueError("logger='wandb' needs wandb: pip install 'lottery-lightning[wandb]'") from error
    raise ValueError(f"logger={kind!r} is not known: choose none, csv, tensorboard or wandb")


def log_level(logger: Logger | bool | None, values: Mapping[str, float], level: int) -> None:
    """Log scalars with the level as their axis: the metric `level` in W&B, the step elsewhere.

    In W&B their charts have that axis also in a run that logs its training by step.
    """
    if not isinstance(logger, Logger):
        return
    if isinstance(logger, WandbLogger):
        logger.experiment.define_metric("level")
        for name in values:  # by name, since Lightning has bound "*" to trainer/global_step
            logger.experiment.define_metric(name, step_metric="level")
        values = {**values, "level": level}
    logger.log_metrics(dict(values), step=level)


def log_image(logger: Logger | bool | None, key: str, png: bytes, step: int) -> None:
    """Show the bytes of a PNG, as the functions of `figures` return them."""
    if isinstance(logger, WandbLogger):
        logger.log_image(key, [_decoded(png)], step)
    if isinstance(logger, TensorBoardLogger):
        import numpy as np

        logger.experiment.add_image(key, np.asarray(_decoded(png)), step, dataformats="HWC")


def log_table(logger: Logger | bool | None, key: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Show rows of numbers and text as a table (TensorBoard: as text); a value that a row lacks is left empty.

    W&B keeps a second copy of each table in `WANDB_DATA_DIR` until it is uploaded.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name) for name in columns] for row in rows]
    if isinstance(logger, WandbLogger):
        logger.log_table(key, columns, cells, step=step)
    if isinstance(logger, TensorBoardLogger):
        lines = [columns, ["---"] * len(columns), *([_text(value) for value in row] for row in cells)]
        logger.experiment.add_text(key, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)


def log_ticket(logger: Logger | bool | None, path: str | os.PathLike[str]) -> None:
    """Hand a ticket on: in W&B an artifact of type "ticket", in TensorBoard its path.

    The artifact is named `<group, else the run's id>-<the file's name>`, its metadata are level, density and
    provenance, and `Ticket.load` reads the downloaded file. No copy is made: the file stays where it is until it is
    uploaded.
    """
    if not isinstance(logger, WandbLogger | TensorBoardLogger):
        return
    path = Path(path).resolve()
    ticket = Ticket.load(path)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("ticket", f"`{path}`, density {ticket.density:.4g}", ticket.level)
        return
    import wandb

    run = logger.experiment
    name = re.sub(r"[^\w.-]+", "_", f"{run.group or run.id}-{path.stem}")
    metadata = {**ticket.provenance, "level": ticket.level, "density": ticket.density}
    artifact = wandb.Artifact(name, type="ticket", metadata=metadata)
    artifact.add_file(str(path), policy="immutable", skip_cache=True)
    run.log_artifact(artifact)


def log_lines(trainer: L.Trainer, lines: Mapping[str, Line]) -> None:
    """Show `connectivity_figure` of the lines as "lmc" in every logger that shows pictures, at the last step.

    A `report` for `LinearModeConnectivity`, in a config by its class path:

    ```yaml
    callbacks:
      - class_path: LinearModeConnectivity
        init_args: {to: [seed1.ckpt], report: lottery_lightning.loggers.log_lines}
    ```
    """
    if not any(isinstance(logger, WandbLogger | TensorBoardLogger) for logger in trainer.loggers):
        return
    from lottery_lightning.figures import connectivity_figure  # needs matplotlib

    png = connectivity_figure(lines)
    for logger in trainer.loggers:
        log_image(logger, "lmc", png, trainer.global_step)


def close(logger: Logger | bool | None) -> None:
    """End a run's logging, so that the next run gets a dashboard of its own."""
    if isinstance(logger, Logger):
        logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()


def _decoded(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
