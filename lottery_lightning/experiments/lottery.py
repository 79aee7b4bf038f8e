"""The lottery ticket experiment: winning tickets by iterative magnitude pruning, and the controls that they beat."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, Pruning, Ticket
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.scores import Evidence
from lottery_callbacks.iterative_magnitude_pruning import Level, Retrain
from lottery_lightning.experiments.lottery_report import report
from lottery_lightning.experiments.runs import Run, Runner, Training, former, quick_collection, stable_seed
from lottery_lightning.experiments.store import share_trials
from lottery_lightning.progress import ExperimentProgress

CONTROLS = ("reinit", "layerwise_random", "global_random", "one_shot")


@dataclass(frozen=True)
class Rule:
    """How each level is pruned and what the next one starts from.

    Args:
        rate: fraction of the surviving weights removed at each level.
        rewind: the step to rewind to, "0it", "500it" or "1ep".
        retrain: "weights", "prunable_weights", "learning_rate" or "fine_tune"; see `IterativeMagnitudePruning`.
        pruning: score, scope, rates per layer, exclusions.
    """

    rate: float = 0.2
    rewind: str = "0it"
    retrain: Retrain = "weights"
    pruning: Pruning = field(default_factory=Pruning)


class Lottery:
    """Frankle & Carbin, arXiv 1803.03635: tickets of `levels` levels in each of `trials` trials, with controls.

    A trial has its own initialisation and data order. Its levels 0 (dense) to `levels` are runs of one fit each;
    each control of level L is one more run that trains exactly as many weights:

    - "reinit": the ticket's mask, weights drawn anew.
    - "layerwise_random": the ticket's start, its mask permuted within each layer.
    - "global_random": the ticket's start, as many weights kept anywhere in the network.
    - "one_shot": the dense run's weights pruned once to the ticket's counts, then the ticket's start.

    Finished runs are skipped on a rerun and a torn one is resumed; a second process with the same command shares
    the trials. At the end: table, CSV, figure, one sentence of finding, one line of JSON.

    Args:
        model: the LightningModule; every trial draws its own initial weights by `reset_parameters`. It logs `val/loss`
            and `test/acc`.
        data: the data module; its `data_seed`, if it has one, is added to the trial's seed.
        run_dir: where everything is kept.
        levels: the last level; level 0 is dense.
        trials: number of trials; trial t has seed `seed + t`.
        controls: how many draws of each control per trial and level; by default one of reinit, layerwise_random and
            one_shot.
        rule: how levels are pruned.
        training: how runs train.
        seed: of the first trial.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: L.LightningDataModule,
        run_dir: Path,
        levels: int = 20,
        trials: int = 1,
        controls: dict[str, int] | None = None,
        rule: Rule = Rule(),
        training: Training = Training(),
        seed: int = 0,
    ) -> None:
        if levels < 1 or trials < 1:
            raise ValueError(f"levels={levels}, trials={trials}: an experiment has at least one of each")
        self.model, self.data = model, data
        self.run_dir = Path(run_dir)
        self.levels, self.trials, self.seed = levels, trials, seed
        self.controls = {"reinit": 1, "layerwise_random": 1, "one_shot": 1} if controls is None else controls
        if "random" in self.controls:
            raise ValueError(
                "controls names random, which is ambiguous: choose layerwise_random (each layer's mask permuted, what "
                "random meant here) or global_random (as many weights anywhere in the network)"
            )
        if unknown := set(self.controls) - set(CONTROLS):
            raise ValueError(f"controls names {', '.join(sorted(unknown))}: there are {', '.join(CONTROLS)}")
        runs = self.run_dir.glob("trial_*/level_*")
        if old := sorted(str(run) for run in runs if re.fullmatch(r"level_\d+_random_\d+", run.name)):
            raise ValueError(
                f"{old[0]} is a run of the control that is called layerwise_random now, and would be trained again: "
                "choose another run_dir, or remove that one"
            )
        if rule.pruning.needs and self.controls.get("one_shot"):
            raise ValueError(f"one_shot has no {rule.pruning.needs} for score {rule.pruning}: leave it out of controls")
        self.rule, self.training = rule, training
        rule.pruning.check(model)
        rewind = self._pruning_of(0).rewind
        if rewind.unit == "it" and rewind.count >= training.max_steps:
            raise ValueError(f"rule.rewind={rewind} is not before training.max_steps={training.max_steps}")

    def run(self) -> None:
        """Do what is not done yet, then report; a trial that another process works on is left to it."""
        runs = self.trials * len(self.plan(0))
        with quick_collection(), ExperimentProgress(runs, self.training.max_steps) as progress:
            progress.console.print(self._pruning_of(0).plan(self.model), soft_wrap=True)
            runner = self.runner(progress)
            folders = [self._trial_dir(trial) for trial in range(self.trials)]
            share_trials(folders, lambda trial: self.run_trial(trial, runner, progress), progress.console.print)
        records = [run.record for trial in range(self.trials) for run in self.plan(trial)]
        done = [record for record in records if record is not None]
        if len(done) < len(records):
            print(f"{len(records) - len(done)} runs are left to another process; the last to finish reports")
            return
        report(done, self.run_dir, self.training, self.config | {"seed": self.seed, "trials": self.trials})

    @property
    def config(self) -> dict[str, Any]:
        """What loggers record of the whole experiment: the rule, in primitives."""
        rule = vars(self.rule).items()
        return {"rule": {key: value if isinstance(value, int | float | str) else str(value) for key, value in rule}}

    def plan(self, trial: int) -> list[Run]:
        """The runs of one trial in the order in which they are done."""
        folder = self._trial_dir(trial)
        tickets = [Run(folder / f"level_{level:02d}", trial, level, "ticket") for level in range(self.levels + 1)]
        controls = [
            Run(folder / f"level_{level:02d}_{arm}_{draw}", trial, level, arm, draw)
            for level in range(1, self.levels + 1)
            for arm, draws in self.controls.items()
            for draw in range(draws)
        ]
        return tickets + controls

    def runner(self, progress: ExperimentProgress, name: str = "") -> Runner:
        """What does the runs of this experiment and shows them; loggers get the name, by default the folder's."""
        return Runner(self.model, self.data, self.training, name or self.run_dir.name, (progress,), self.config)

    def run_trial(self, trial: int, runner: Runner, progress: ExperimentProgress) -> None:
        """Do what is not done yet of one trial; in the folder of a trial one process works at a time."""
        plan = self.plan(trial)
        tickets = {run.level: run for run in plan if run.arm == "ticket"}
        imp = self._pruning_of(trial)

        def finished(level: Level) -> bool:
            done = tickets[level.number].record is not None
            if done:
                progress.finish(None)
            return done

        seed = self.seed + trial
        for level in imp.levels(self.levels, finished):
            run = tickets[level.number]
            progress.start(str(run))
            record = runner.do(run, seed, imp)
            progress.finish(line(run, record))
        for run in plan[len(tickets) :]:
            if run.record is not None:
                progress.finish(None)
                continue
            progress.start(str(run))
            record = runner.do(run, seed, self._control(run, imp, tickets[0]))
            progress.finish(line(run, record))

    def _control(self, run: Run, imp: IterativeMagnitudePruning, dense: Run) -> ApplyTicket:
        ticket = Ticket.load(imp.ticket_path(run.level))
        seed = stable_seed(self.seed + run.trial, run.level, former(run.arm), run.draw, "control")
        if run.arm == "reinit":
            return ApplyTicket(ticket, weights="reinit", seed=seed)
        if run.arm in ("layerwise_random", "global_random"):
            return ApplyTicket(ticket, mask=run.arm, seed=seed)
        trained = torch.load(dense.run_dir / "final.ckpt", map_location="cpu", weights_only=True)["state_dict"]
        evidence = Evidence(trained, torch.Generator().manual_seed(seed))
        masks = self.rule.pruning.next_masks(evidence, M.ones(ticket.masks), self.rule.rate, rounds=run.level)
        if sum(M.kept(masks).values()) != sum(M.kept(ticket.masks).values()):
            raise RuntimeError(f"one-shot pruning of {run} keeps another count than the ticket")
        start = Ticket.load(imp.ticket_path(0)).rewind
        return ApplyTicket(Ticket(masks, start, ticket.provenance | {"pruning": "one-shot"}))

    def _pruning_of(self, trial: int) -> IterativeMagnitudePruning:
        rule = self.rule
        return IterativeMagnitudePruning(
            rule.rate, rule.rewind, self._trial_dir(trial), rule.pruning, rule.retrain, self.seed + trial
        )

    def _trial_dir(self, trial: int) -> Path:
        return self.run_dir / f"trial_{trial}"


def line(run: Run, record: dict) -> str:
    """What a finished run found, for people."""
    return (
        f"{run!s:<28} density {record['density']:7.2%}  early stop at {record['early_stop_iteration']:>6,}  "
        f"test accuracy there {record['test_acc_early_stop']:.2%}, at the end {record['test_acc_end']:.2%}"
    )
