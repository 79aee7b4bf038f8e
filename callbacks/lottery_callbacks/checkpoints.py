"""Checkpoints to resume from: finding the newest whole one, and writing them where a resume is exact."""

import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from lottery_callbacks.loader_order import LoaderOrder, observe
from lottery_callbacks.masked_training import of_all_processes, of_this_process


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below `folder` that a fit can resume from; None where there is none.

    A file that cannot be read whole (a killed writer, a full disk) is passed over with a warning; one that holds
    weights alone is no place to resume from. Nothing is unpickled: the archive's own checksums are verified.
    """
    return newest_of(Path(folder).rglob("*.ckpt"))


def newest_of(paths: Iterable[Path]) -> Path | None:
    """The newest of these that a fit can resume from, as `newest_checkpoint` chooses it."""
    for path in _newest_first(paths):
        try:
            with zipfile.ZipFile(path) as archive:
                torn = archive.testzip()
                pickled = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
                if torn is None and pickled and b"optimizer_states" in archive.read(pickled):
                    return path
        except (zipfile.BadZipFile, OSError, EOFError):
            torn = path.name
        if torn:
            rank_zero_warn(f"{path} is torn and is passed over: the level goes on from the checkpoint before it")
    return None


class ResumeCheckpoint(Checkpoint):
    """Keeps the two newest checkpoints, each written at the end of a validation.

    There a resumed fit repeats no validation and skips none, so its records are those of an unbroken run. Beside the
    fit it keeps the random state of each process and the order of the running epoch: a resumed fit goes on with the
    next batch, also in an ordinary shuffled `DataLoader` (`loader_order` says for which loaders this is exact).
    Lightning runs it after all other callbacks, so that each checkpoint holds their state of that validation. List it
    after a `ModelCheckpoint`, whose best file is then what `ckpt_path="best"` means.

    Args:
        dirpath: where to keep them.
        seconds: least time between two; 0 writes one at each validation.
    """

    best_model_path = ""

    def __init__(self, dirpath: str | Path, seconds: float = 30.0) -> None:
        self.dirpath = Path(dirpath)
        self.seconds = seconds
        self._written_at = time.monotonic()
        self._order: LoaderOrder | None = None
        self._resumed: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._resumed = {}  # a checkpoint's state, if any, is loaded after this
        self._order = observe(trainer) if stage == "fit" else None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._resumed:
            observe(trainer).resume(of_this_process(trainer, self._resumed["random_states"]))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._order = None

    def state_dict(self) -> dict[str, Any]:
        return {"random_states": of_all_processes(self._order.state_dict())} if self._order else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        if trainer.fit_loop._should_accumulate():
            rank_zero_warn(
                "a validation falls between the batches of one optimizer step, and a checkpoint holds no gradients: a "
                "fit resumed there is not exact; let val_check_interval be a multiple of accumulate_grad_batches"
            )
        due = trainer.strategy.broadcast(time.monotonic() - self._written_at >= self.seconds)
        if not due:
            return
        trainer.save_checkpoint(self.dirpath / f"resume-step={trainer.global_step}.ckpt")
        self._written_at = time.monotonic()
        if trainer.is_global_zero:
            for old in _newest_first(self.dirpath.glob("resume-*.ckpt"))[2:]:
                old.unlink()


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
