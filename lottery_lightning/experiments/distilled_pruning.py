"""Tickets found on distilled data beside those found on real data, all trained on real data (arXiv 2310.18769)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from lottery_callbacks import Ticket
from lottery_callbacks.functional import masks as M
from lottery_lightning.data import DistilledDataModule, TensorDataModule
from lottery_lightning.experiments.distill_sets import cost_of
from lottery_lightning.experiments.distilled_pruning_report import Row, report
from lottery_lightning.experiments.instability import Instability, Lines
from lottery_lightning.experiments.lottery import Lottery, Rule
from lottery_lightning.experiments.runs import Runner, Training, quick_collection, stable_seed
from lottery_lightning.experiments.starts import DENSE
from lottery_lightning.experiments.store import read_json, share_trials
from lottery_lightning.progress import ExperimentProgress

RANDOM = "random"


@dataclass(frozen=True)
class Route:
    """One way to find tickets: a lottery on a distilled set, or on real data.

    Args:
        distilled: file of a `DistilledSet` that its levels train on; None for the real data.
        batch_size: of the distilled images; None for that of the real ones.
        augmentation: of the distilled images, see `DistilledDataModule`.
        training: how its levels train; None for as on real data.
        model: the same network with another optimizer or schedule; None for those of the real data.
        rule: how they are pruned. `retrain: prunable_weights` is the partial rewind of the published code.
    """

    distilled: Path | None = None
    batch_size: int | None = None
    augmentation: str | None = None
    training: Training | None = None
    model: L.LightningModule | None = None
    rule: Rule = Rule()


class DistilledPruning:
    """McDermott & Cummings, arXiv 2310.18769 and 2307.03364: are tickets of distilled data as good, and more stable?

    In each trial every route's lottery prunes the same initial weights up to the last of `levels`. Then the dense
    network and each route's tickets at these levels are trained on real data, `copies` times with other noise of SGD,
    beside random masks: those of the real data's tickets (without such a route, the first one's), permuted within each
    layer. Measured are the copies' test accuracy, the instability and the lines between them (see `Instability`), and
    what each route's lottery consumed.

    It is `Lottery` for each route in `run_dir/<route>` and `Instability` in `run_dir/retrained`, with their folders,
    tickets and finished copies; `geometry` measures them. Finished runs are skipped on a rerun and a torn one is
    resumed; a second process with the same command shares the trials. At the end: table, results.csv (a row a pair of
    copies), ledger.csv (what each ticket cost to find), lines.csv, figures, one sentence of finding, one line of JSON.

    The ledger counts training points, that is examples drawn by the optimizer steps of the runs before the ticket, of
    validation none: decoded, as trained on, and stored, which counts a distilled image once however many it decodes to,
    as the published "150 times fewer" does. What making the set consumed stands beside it, where `Distill` made it.

    Args:
        model: the LightningModule, whose forward maps inputs to logits; each trial draws its own initial weights by
            `reset_parameters`. It logs `val/loss` and `test/acc`.
        data: the real data; validation images are held out of the training ones.
        run_dir: where everything is kept.
        routes: ways to find tickets, by name; all rewind to the same step.
        levels: whose tickets are trained on real data, from 1 on.
        trials: number of trials; trial t has seed `seed + t`.
        copies: runs of each ticket, 2 at least.
        lines: how the networks between two copies are evaluated.
        training: how runs on real data train.
        seed: of the first trial.

    Raises:
        ValueError: a bad argument; before the first run, a distilled set that does not go with the data.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: TensorDataModule,
        run_dir: Path,
        routes: dict[str, Route],
        levels: Sequence[int] = (4, 9),
        trials: int = 1,
        copies: int = 3,
        lines: Lines = Lines(),
        training: Training = Training(),
        seed: int = 0,
    ) -> None:
        if not levels or min(levels) < 1 or len(set(levels)) < len(levels):
            raise ValueError(f"levels={list(levels)}: give levels from 1 on, each once; the dense one is always there")
        if not routes or {DENSE, RANDOM, "retrained"} & set(routes) or any("/" in name for name in routes):
            raise ValueError(f"routes: give one at least, no name with a / and none of {DENSE}, {RANDOM}, retrained")
        if len(rewinds := {route.rule.rewind for route in routes.values()}) > 1:
            raise ValueError(f"routes rewind to {' and '.join(sorted(rewinds))}: copies start from one step")
        self.data, self.run_dir, self.routes = data, Path(run_dir), routes
        self.levels, self.trials, self.training, self.seed = sorted(levels), trials, training, seed
        self.lotteries = {
            name: Lottery(
                route.model or model,
                self._data_of(route),
                self.run_dir / name,
                max(1, self.levels[-1] - 1),
                trials,
                {},
                route.rule,
                route.training or training,
                seed,
            )
            for name, route in routes.items()
        }
        self.stability = Instability(
            model,
            data,
            self.run_dir / "retrained",
            rewinds.pop(),
            copies,
            trials,
            self._tickets(),
            lines,
            training,
            seed,
        )

    def _data_of(self, route: Route) -> TensorDataModule:
        if route.distilled is None:
            return self.data
        real = self.data
        return DistilledDataModule(
            route.distilled,
            real,
            route.augmentation,
            batch_size=route.batch_size or real.batch_size,
            eval_batch_size=real.eval_batch_size,
            data_seed=real.data_seed,
        )

    def _tickets(self) -> dict[str, str]:
        return {
            ticket_name(route, level): str(self._ticket(route, level, "{trial}"))
            for level in self.levels
            for route in (*self.routes, RANDOM)
        }

    def _ticket(self, route: str, level: int, trial: int | str) -> Path:
        return self.run_dir / route / f"trial_{trial}" / "tickets" / f"level_{level:02d}.safetensors"

    def run(self) -> None:
        """Do what is not done yet, then report; a trial that another process works on is left to it."""
        if self.stability.left:
            self._read()
        parts: list[tuple[Lottery | Instability, float]]
        parts = [*((lottery, len(lottery.plan(0))) for lottery in self.lotteries.values())]
        parts.append((self.stability, self.stability.length))
        steps = sum(runs * part.training.max_steps for part, runs in parts)
        with quick_collection(), ExperimentProgress(self.trials * steps, 1) as progress:
            runners = {part.run_dir: part.runner(progress) for part, _ in parts}  # before a run moves the data's seed
            folders = [self.run_dir / f"trial_{trial}" for trial in range(self.trials)]
            share_trials(folders, lambda trial: self._run_trial(trial, runners, progress), progress.console.print)
        if self.stability.left:
            print(f"{self.stability.left} lines are left to another process; the last to finish reports")
            return
        names = {ticket_name(route, level): (route, level) for level in self.levels for route in (*self.routes, RANDOM)}
        pairs = [
            {"route": route, "level": level} | row
            for row in self.stability.rows
            for route, level in [names.get(row["network"], (DENSE, 0))]
        ]
        report(pairs, self.ledger(), self.run_dir)

    def _read(self) -> None:
        """Read the real data once for all, and refuse before the first run a set that does not go with them."""
        self.data.prepare_data()
        for data in (self.data, *(lottery.data for lottery in self.lotteries.values())):
            data.setup("fit")

    def _run_trial(self, trial: int, runners: Mapping[Path, Runner], progress: ExperimentProgress) -> None:
        def do(part: Lottery | Instability, what: str) -> None:
            progress.console.print(f"trial {trial}: {what}", soft_wrap=True)
            progress.steps_per_run = part.training.max_steps
            part.run_trial(trial, runners[part.run_dir], progress)

        for name, lottery in self.lotteries.items():
            do(lottery, f"tickets of route {name}")
        for level in self.levels:
            self._shuffle(trial, level)
        do(self.stability, "all of them on real data")

    def _shuffle(self, trial: int, level: int) -> None:
        """Write the random ticket of this level: the same bytes each time."""
        first = next((name for name, route in self.routes.items() if route.distilled is None), next(iter(self.routes)))
        ticket, dense = (Ticket.load(self._ticket(first, number, trial)) for number in (level, 0))
        generator = torch.Generator().manual_seed(stable_seed(self.seed + trial, level, RANDOM))
        masks = M.shuffled(ticket.masks, generator)
        Ticket(masks, dense.rewind, {"level": level, "pruning": RANDOM}).save(self._ticket(RANDOM, level, trial))

    def ledger(self) -> list[Row]:
        """What each ticket cost to find, a row a route, level and trial; see the class."""
        return [
            {"route": name, "real": route.distilled is None, "level": level, "trial": trial}
            | self._cost(name, level, trial)
            | self._making(name)
            for name, route in self.routes.items()
            for level in self.levels
            for trial in range(self.trials)
        ]

    def _cost(self, name: str, level: int, trial: int) -> Row:
        runs = [run for run in self.lotteries[name].plan(trial) if run.level < level]
        spent: list[Mapping[str, Any]] = [read_json(run.run_dir / "cost.json") for run in runs]
        data = self.lotteries[name].data
        factor = data.distilled.factor if isinstance(data, DistilledDataModule) else 1
        decoded = sum(run["points"] for run in spent)
        return {
            "runs": len(spent),
            "decoded_points": decoded,
            "stored_points": decoded // factor**2,
            "seconds": sum(run["seconds"] for run in spent),
        }

    def _making(self, name: str) -> Row:
        """What the making of the route's set consumed, once for all trials; None where nothing beside it tells."""
        data = self.lotteries[name].data
        told = {"points": 0, "seconds": 0.0}
        if isinstance(data, DistilledDataModule):
            told = read_json(cost_of(data.path)) or {}
        return {"making_points": told.get("points"), "making_seconds": told.get("seconds")}


def ticket_name(route: str, level: int) -> str:
    """What the copies of this ticket are called in `run_dir/retrained`."""
    return f"{route} level {level}"
