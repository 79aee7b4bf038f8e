"""Progress of a whole experiment: one bar over the steps of all its runs, one line a finished run."""

from typing import Any

import lightning.pytorch as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ExperimentProgress(L.Callback):
    """A rich bar with the present run and the time left; on no terminal, the lines alone.

    Use as a context; `start` names each run, `finish` prints its line. One update every `every` steps of a fit; what is
    no fit calls `tell`. `runs` is their number, each times its share of a whole one; `unit` is what a step is called.
    """

    def __init__(self, runs: float, steps_per_run: int, every: int = 25, unit: str = "steps") -> None:
        self.console = Console(highlight=False)
        self.steps_per_run, self.every = steps_per_run, every
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn(f"{unit}, left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=2,  # each drawing holds up the training for some milliseconds
        )
        self._task = self._bar.add_task("", total=runs * steps_per_run)
        self._before, self._share, self._shown = 0.0, 1.0, 0

    def __enter__(self) -> "ExperimentProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, name: str, share: float = 1.0) -> None:
        """A run begins, which takes as long as this share of a whole one; a fit of it takes the last of its steps."""
        self._share, self._shown = share, 0
        self._bar.update(self._task, description=name)

    def finish(self, line: str | None) -> None:
        """A run is done, now or before; its line is printed if there is one."""
        self._before += self.steps_per_run * self._share
        self._share = 1.0
        self._bar.update(self._task, completed=self._before)
        if line:
            self.console.print(line, soft_wrap=True)

    def tell(self, done: int, total: int) -> None:
        """So much of the present run is done."""
        self._bar.update(self._task, completed=self._before + self.steps_per_run * self._share * done / max(total, 1))

    def visit_ends(self, per_epoch: int, last: float) -> tuple[int, ...]:
        """The bar may advance by visits."""
        return ()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step - self._shown >= self.every:
            self._shown = trainer.global_step
            skipped = self.steps_per_run * (1 - self._share)
            self._bar.update(self._task, completed=self._before + max(0, self._shown - skipped))
