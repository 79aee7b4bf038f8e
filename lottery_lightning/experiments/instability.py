"""Instability analysis: copies of a network that differ only in the noise of SGD (arXiv 1912.05671)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lottery_callbacks import Ticket
from lottery_callbacks.apply_ticket import reinitialise
from lottery_callbacks.functional.hidden_units import permutation_groups
from lottery_callbacks.functional.interpolation import even
from lottery_callbacks.functional.running_statistics import Norms
from lottery_callbacks.functional.steps import Step
from lottery_callbacks.masked_training import MaskedTraining
from lottery_callbacks.messages import one_of
from lottery_lightning.experiments.between import Between
from lottery_lightning.experiments.instability_report import Row, report
from lottery_lightning.experiments.needs import Needs, require_logits
from lottery_lightning.experiments.rewind_points import RewindPoints
from lottery_lightning.experiments.runs import Run, Runner, Training, dense_fit, quick_collection, stable_seed
from lottery_lightning.experiments.starts import DENSE, Start, Trial, begin, mask_of, require_weights_of
from lottery_lightning.experiments.store import read_json, share_trials, write_json
from lottery_lightning.progress import ExperimentProgress

LINE = 0.1  # of a run's time, for the bar


@dataclass(frozen=True)
class Lines:
    """How the networks between two copies are evaluated.

    Args:
        points: number of even points t from 0 to 1, the ends included.
        norms: batch norm statistics inside (0, 1): "average" interpolates them, "reestimate" computes them anew.
        norm_batches: training batches that "reestimate" takes.
        align: whether to report the lines also after weight matching (arXiv 2209.04836), which moves a ticket's mask
            with its weights: such a line leaves the mask.
    """

    points: int = 30
    norms: Norms = "average"
    norm_batches: int = 20
    align: bool = False

    def __post_init__(self) -> None:
        even(self.points)
        one_of("norms", self.norms, ("average", "reestimate"))
        if self.norm_batches < 1:
            raise ValueError(f"norm_batches={self.norm_batches}: statistics need one batch at least")


class Instability:
    """Frankle et al., arXiv 1912.05671, algorithm 1: how far apart SGD's noise drives two copies of one network.

    In each trial one dense run keeps its state W_k at each step k of `at`. From W_k, and from m * W_k for the mask m of
    each ticket, `copies` runs are trained to the last step, which differ in the order and augmentation of the data, and
    in dropout, alone. For each pair of them the instability is max over t of E(t) - (E(0) + E(1)) / 2, E the test error
    on the line between their last weights; below 2 % the start is stable. Pairs that share a copy are no independent
    samples: with 3 copies and 3 trials there are the paper's 9.

    Copy c has the same order of the data at every start of a trial (of data with a `data_seed`), at that of level 0.
    Copy 0 has the order of the dense run, so that from W_k the dense run itself is copy 0: a run less at each k.

    Finished runs and lines are skipped on a rerun and a torn run is resumed; a second process with the same command
    shares the trials. At the end: table, results.csv (a row a pair), lines.csv, figure, one sentence of finding, one
    line of JSON. Kept for each trial: its states W_k as dense tickets, and each copy's last weights.

    Args:
        model: the LightningModule, whose forward maps inputs to logits; each trial draws its own initial weights by
            `reset_parameters`. It logs `val/loss` and `test/acc`.
        data: the data module; its `data_seed`, if it has one, is added to the copy's seed. Its batches are (inputs,
            class labels).
        run_dir: where everything is kept.
        at: the steps k, a list or "0it,500it,2ep".
        copies: runs from each start, 2 at least.
        trials: number of trials; trial t has seed `seed + t`.
        tickets: paths of ticket files by name; {trial} and {at} in a path stand for the trial's number and the step, as
            in "runs/lottery_{at}/trial_{trial}/tickets/level_10.safetensors". Of a ticket the mask is taken, and after
            a partial rewind to step k what is not pruned, too: a lottery of the same model, data and seed found it on
            the very weights that it is applied to.
        lines: how the networks between two copies are evaluated.
        training: how runs train.
        seed: of the first trial.

    Raises:
        ValueError: a bad argument, a missing ticket, or one whose rewind point is not this trial's own: at step 0, or
            at the step k that it is applied at; other steps cannot be compared.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: L.LightningDataModule,
        run_dir: Path,
        at: Sequence[str] | str = "0it",
        copies: int = 3,
        trials: int = 1,
        tickets: dict[str, str] | None = None,
        lines: Lines = Lines(),
        training: Training = Training(),
        seed: int = 0,
    ) -> None:
        if trials < 1 or copies < 2:
            raise ValueError(f"trials={trials}, copies={copies}: an experiment has one trial and two copies at least")
        if type(model).forward is L.LightningModule.forward:
            raise ValueError(f"{type(model).__name__} has no forward: give it one that maps inputs to logits")
        self.at = [Step.parse(step) for step in (at.split(",") if isinstance(at, str) else at)]
        for step in self.at:
            if step.unit == "it" and step.count >= training.max_steps:
                raise ValueError(f"at={step} is not before training.max_steps={training.max_steps}")
        self.model, self.data, self.run_dir = model, data, Path(run_dir)
        self.copies, self.trials, self.seed = copies, trials, seed
        self.tickets, self.lines, self.training = tickets or {}, lines, training
        self.starts = [Start(name, step) for name in (DENSE, *self.tickets) for step in self.at]
        folders = [DENSE, *(start.folder for start in self.starts)]
        if not self.at or DENSE in self.tickets or len(set(folders)) < len(folders):
            raise ValueError(f"at, tickets: give each once, one step at least, and no ticket the name {DENSE!r}")
        if lines.align:
            permutation_groups(model)  # refuses a network that cannot be traced

    def check_tickets(self) -> None:
        """Refuse before the first run what would be refused after many.

        Raises:
            ValueError: see the class.
        """
        for path in self.tickets.values():
            if self.trials > 1 and "{trial}" not in path:
                raise ValueError(f"tickets: {path} is one file for {self.trials} trials: put {{trial}} in its path")
        for trial in range(self.trials if self.tickets else 0):
            initial = copy.deepcopy(self.model)
            reinitialise(initial, self.seed + trial)
            for start in self.starts:
                if start.network != DENSE:
                    ticket = mask_of(self.tickets, start, trial)
                    ticket.check(self.model)
                    if not ticket.rewind.step:
                        require_weights_of(trial, start.network, ticket, dict(initial.state_dict()))

    def run(self) -> None:
        """Do what is not done yet, then report; a trial that another process works on is left to it."""
        self.check_tickets()
        with quick_collection(), ExperimentProgress(self.trials * self.length, self.training.max_steps) as progress:
            runner = self.runner(progress)
            folders = [self._trial(number).folder for number in range(self.trials)]
            share_trials(folders, lambda trial: self.run_trial(trial, runner, progress), progress.console.print)
        if self.left:
            print(f"{self.left} lines are left to another process; the last to finish reports")
            return
        report(self.rows, self.run_dir)

    @property
    def length(self) -> float:
        """What a trial takes, in whole runs."""
        trial = self._trial(0)
        lines = LINE * len(trial.pairs(self.starts[0]))
        copies = (self._share(start) for start in self.starts for run in trial.runs(start) if run != trial.dense)
        return 1.0 + lines * len(self.starts) + sum(copies)

    @property
    def left(self) -> int:
        """How many lines are not evaluated yet."""
        return sum(not path.exists() for trial, start in self._plan() for path in trial.pairs(start).values())

    @property
    def rows(self) -> list[Row]:
        """What was found, a row a pair; all lines are there."""
        return [row for trial, start in self._plan() for row in _rows(trial, start)]

    def _plan(self) -> list[tuple[Trial, Start]]:
        return [(self._trial(number), start) for start in self.starts for number in range(self.trials)]

    def runner(self, progress: ExperimentProgress, name: str = "") -> Runner:
        """What does the runs of this experiment and shows them; loggers get the name, by default the folder's."""
        name = name or self.run_dir.name
        return Runner(self.model, self.data, self.training, name, (progress,), self.config, Needs(batch=require_logits))

    @property
    def config(self) -> dict[str, Any]:
        """What loggers record of the whole experiment, in primitives."""
        return {"at": ",".join(map(str, self.at)), "copies": self.copies, "tickets": dict(self.tickets)}

    def _trial(self, number: int) -> Trial:
        return Trial(self.run_dir / f"trial_{number}", number, self.copies)

    def run_trial(self, number: int, runner: Runner, progress: ExperimentProgress) -> None:
        """Do what is not done yet of one trial; in the folder of a trial one process works at a time."""
        trial, seed = self._trial(number), self.seed + number
        points = {step: trial.point(step) for step in self.at}
        self._do(trial.dense, 1.0, seed, lambda: RewindPoints(dense_fit(self.model, seed), points), runner, progress)
        for start in self.starts:
            self._masked(trial, start)  # refuses a ticket of other weights before any copy
        for start in self.starts:
            masked = partial(self._masked, trial, start)
            for number, run in enumerate(trial.runs(start)):
                if run != trial.dense:
                    self._do(run, self._share(start), copy_seed(seed, number), masked, runner, progress)
            self._evaluate(trial, start, runner, progress)

    def _masked(self, trial: Trial, start: Start) -> MaskedTraining:
        return begin(start, trial.number, Ticket.load(trial.point(start.at)), self.tickets)

    def _share(self, start: Start) -> float:
        """Of a whole run that a copy takes; epochs are of unknown length before a fit."""
        return 1 - start.at.count / self.training.max_steps if start.at.unit == "it" else 1.0

    def _do(
        self,
        run: Run,
        share: float,
        seed: int,
        masked: Callable[[], MaskedTraining],
        runner: Runner,
        progress: ExperimentProgress,
    ) -> None:
        name = f"trial {run.trial} {run.arm}" + (f", copy {run.draw}" if run.arm != DENSE else "")
        progress.start(name, share)
        if run.record is not None:
            progress.finish(None)
            return
        record = runner.do(run, seed, masked())
        progress.finish(f"{name:<34} density {record['density']:7.2%}  test accuracy {record['test_acc_end']:.2%}")

    def _evaluate(self, trial: Trial, start: Start, runner: Runner, progress: ExperimentProgress) -> None:
        pairs, runs, seed = trial.pairs(start), trial.runs(start), self.seed + trial.number
        progress.start(f"trial {trial.number} {start}, lines", LINE * len(pairs))
        todo = {pair: path for pair, path in pairs.items() if not path.exists()}
        if todo:
            between = Between(runner.fresh_model(seed), self.data, self.training, seed, **asdict(self.lines))
            k = Ticket.load(trial.point(start.at)).rewind.step
            for done, ((one, two), path) in enumerate(todo.items(), start=1):
                found = between.lines(*(runs[copy].run_dir / "final.ckpt" for copy in (one, two)))
                write_json(path, {"k": k, "lines": {name: asdict(line) for name, line in found.items()}})
                progress.tell(done, len(todo))
        progress.finish(None)


def _rows(trial: Trial, start: Start) -> list[Row]:
    density = (trial.runs(start)[1].record or {})["density"]
    of_start = {"network": start.network, "density": density, "at": str(start.at), "trial": trial.number}
    return [
        of_start | {"first": one, "second": two} | read_json(path) for (one, two), path in trial.pairs(start).items()
    ]


def copy_seed(seed: int, copy: int) -> int:
    """The seed of SGD's noise; copy 0 has the trial's own."""
    return stable_seed(seed, "copy", copy) if copy else seed
