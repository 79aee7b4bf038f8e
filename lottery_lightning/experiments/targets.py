"""A trained network as a target: in each trial one is trained, and then arms make something of its last weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as L
import torch

from lottery_callbacks import Pruning
from lottery_lightning.experiments.needs import Needs
from lottery_lightning.experiments.runs import Run, Runner, Training, dense_fit, quick_collection
from lottery_lightning.experiments.store import share_trials, write_json
from lottery_lightning.progress import ExperimentProgress

Row = dict[str, Any]
LARGEST = ("max_error", "certified", "found")
PLAIN = str.maketrans({" ": "_", ",": None, "=": None})  # of the names of arms, for folders


@dataclass(frozen=True)
class Work:
    """One arm of one trial.

    Attributes:
        run: its folder and names.
        seed: of the trial.
        model: the trained model, which the arm may change.
        runner: tests models.
        progress: the bar; `tell` moves the arm's share of it.
    """

    run: Run
    seed: int
    model: L.LightningModule
    runner: Runner
    progress: ExperimentProgress


class Targets:
    """Trains a target in each trial and does arms on it; finished ones are skipped, a torn training is resumed.

    Args:
        model: the LightningModule; it logs `val/loss` and `test/acc`, and is initialised by `reset_parameters`.
        data: the data module; its `data_seed`, if it has one, is added to the trial's seed.
        run_dir: where everything is kept, a folder a trial, in it one for the target and one an arm.
        trials: number of trials; trial t has seed `seed + t`.
        training: how the network is trained; its last weights are the target.
        seed: of the first trial.
        needs: what is checked before the first training.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: L.LightningDataModule,
        run_dir: Path,
        trials: int,
        training: Training,
        seed: int,
        needs: Needs | None = None,
    ) -> None:
        if trials < 1:
            raise ValueError(f"trials={trials}: an experiment has at least one")
        if not Pruning().prunable(model):
            raise ValueError(f"{type(model).__name__} has no weight matrix: nothing is to be approximated")
        self.model, self.data, self.run_dir = model, data, run_dir
        self.trials, self.training, self.seed, self.needs = trials, training, seed, needs

    def run(self, arms: Mapping[str, Callable[[Work], Row]], config: Mapping[str, Any], share: float) -> list[Row]:
        """Do what is not done yet; a row of each arm of each trial, none while another process works on some.

        A row has what the arm found, and `question`, `trial`, `target_accuracy` and `accuracy_minus_target`.

        Args:
            arms: by name, after which folders are named: what finds something, `accuracy` among it.
            config: what loggers record of the experiment.
            share: of a training's time, that an arm takes.
        """
        if len({name.translate(PLAIN) for name in arms}) < len(arms):
            raise ValueError(f"{', '.join(arms)}: two of them share a folder")
        runs = self.trials * (1 + share * len(arms))
        with quick_collection(), ExperimentProgress(runs, self.training.max_steps) as progress:
            name = self.run_dir.name
            runner = Runner(self.model, self.data, self.training, name, (progress,), config, self.needs)
            share_trials(
                [self._trial_dir(trial) for trial in range(self.trials)],
                lambda trial: self._run_trial(trial, arms, share, runner, progress),
                progress.console.print,
            )
        plans = [self._plan(trial, arms) for trial in range(self.trials)]
        if any(run.record is None for plan in plans for run in plan):
            print("some arms are left to another process; the last to finish reports")
            return []
        return [row_of(run, target) for target, *runs in plans for run in runs]

    def _run_trial(
        self,
        trial: int,
        arms: Mapping[str, Callable[[Work], Row]],
        share: float,
        runner: Runner,
        progress: ExperimentProgress,
    ) -> None:
        (target, *runs), seed = self._plan(trial, arms), self.seed + trial
        progress.start(f"trial {trial} target")
        if target.record is None:
            runner.do(target, seed, dense_fit(self.model, seed))
        progress.finish(None)
        weights = torch.load(target.run_dir / "final.ckpt", map_location="cpu", weights_only=True)["state_dict"]
        for make, run in zip(arms.values(), runs, strict=True):
            progress.start(f"trial {trial} {run.arm}", share)
            if run.record is None:
                model = runner.fresh_model(seed)
                model.load_state_dict(weights)
                write_json(run.run_dir / "result.json", make(Work(run, seed, model, runner, progress)))
            progress.finish(None)

    def _plan(self, trial: int, arms: Iterable[str]) -> list[Run]:
        """The target's run, and one an arm."""
        folder = self._trial_dir(trial)
        return [Run(folder / name.translate(PLAIN), trial, 0, name) for name in ("target", *arms)]

    def _trial_dir(self, trial: int) -> Path:
        return self.run_dir / f"trial_{trial}"


def row_of(run: Run, target: Run) -> Row:
    """What a finished arm found, beside the target's accuracy."""
    found, accuracy = run.record or {}, (target.record or {})["test_acc_end"]
    beside = {"target_accuracy": accuracy, "accuracy_minus_target": found["accuracy"] - accuracy}
    return {"question": run.arm, "trial": run.trial, **found, **beside}


def by_question(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each arm, one a trial, in the order of the first trial."""
    return [[row for row in rows if row["question"] == name] for name in dict.fromkeys(row["question"] for row in rows)]


def over_trials(rows: Sequence[Row], key: str) -> float:
    """The mean of an arm's figure over trials; of the largest error, the certified and the found one the largest."""
    return (max if key in LARGEST else mean)(row[key] for row in rows)
