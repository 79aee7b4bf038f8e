"""Where the checkpoints of a level are, also those that Lightning puts into a logger's folder."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint

from lottery_callbacks.checkpoints import newest_of

NOTE = "checkpoints.json"


def note_folders(trainer: L.Trainer, run_dir: Path) -> None:
    """Keep in `run_dir` the folders outside it to which this fit writes checkpoints, and since when.

    Call it when callbacks are set up. Nothing is written where all checkpoints are below `run_dir`.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    places = [getattr(callback, "dirpath", None) for callback in callbacks if isinstance(callback, Checkpoint)]
    folders = [Path(place).absolute() for place in places if place and "://" not in str(place)]
    elsewhere = [str(folder) for folder in folders if not folder.is_relative_to(run_dir.absolute())]
    noted = _noted(run_dir)
    if trainer.is_global_zero and elsewhere and not noted.keys() >= set(elsewhere):
        run_dir.mkdir(parents=True, exist_ok=True)
        written = run_dir / f"{NOTE}.{os.getpid()}.tmp"
        written.write_text(json.dumps(dict.fromkeys(elsewhere, time.time_ns()) | noted, indent=2))
        written.replace(run_dir / NOTE)


def newest_of_level(run_dir: Path) -> Path | None:
    """The newest checkpoint that a level can resume from: below `run_dir`, or in a folder that was noted there.

    In such a folder other levels may have left theirs: those older than the note do not count.
    """
    return newest_of([*run_dir.rglob("*.ckpt"), *_elsewhere(run_dir)])


def has_begun(run_dir: Path) -> bool:
    """Whether a fit of the level has left anything in its folder."""
    return run_dir.is_dir() and any(run_dir.iterdir())


def _elsewhere(run_dir: Path) -> Iterator[Path]:
    for folder, since in _noted(run_dir).items():
        found: Iterable[Path] = Path(folder).rglob("*.ckpt")
        yield from (path for path in found if path.stat().st_mtime_ns >= since)


def _noted(run_dir: Path) -> dict[str, int]:
    path = run_dir / NOTE
    return json.loads(path.read_text()) if path.exists() else {}
