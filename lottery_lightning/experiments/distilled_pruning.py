"""Tickets found on distilled data beside those found on real data, all trained on real data (arXiv 2310.18769)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from lottery_callbacks import Ticket
from lottery_callbacks.functional import masks as M
from lottery_lightning.data import TensorDataModule
from lottery_lightning.experiments.distilled_pruning_report import Row, report
from lottery_lightning.experiments.instability import Instability, Lines
from lottery_lightning.experiments.lottery import Lottery
from lottery_lightning.experiments.routes import RANDOM, Route, check_routes, keep_identity, set_of
from lottery_lightning.experiments.runs import Runner, Training, check_together, former, quick_collection, stable_seed
from lottery_lightning.experiments.starts import DENSE
from lottery_lightning.experiments.store import read_json, share_trials
from lottery_lightning.progress import ExperimentProgress

PLACE = "<trial>"


class DistilledPruning:
    """McDermott & Cummings, arXiv 2310.18769 and 2307.03364: are tickets of distilled data as good, and more stable?

    In each trial every route's lottery prunes the same initial weights up to the last of `levels`. Then the dense
    network and each route's tickets at these levels are trained on real data, `copies` times with other noise of SGD,
    beside layerwise_random: the masks of the real data's tickets (without such a route, the first one's), permuted
    within each layer. Measured are the copies' test accuracy, the instability and the lines between them (see
    `Instability`), and what each route's lottery consumed.

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
        routes: ways to find tickets, by name, of one rate and rewind step; on distilled sets that is step 0.
        levels: whose tickets are trained on real data, from 1 on.
        trials: number of trials; trial t has seed `seed + t`.
        copies: runs of each ticket, 2 at least.
        lines: how the networks between two copies are evaluated.
        training: how runs on real data train.
        seed: of the first trial.

    Raises:
        ValueError: a bad argument; before the first run, a distilled set that does not go with the data or is not the
            one that the folder began with, or a route with another network.
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
        rewind = check_routes(routes)
        if (old := Path(run_dir) / "random").is_dir():
            raise ValueError(
                f"{old} holds tickets of the route that is called {RANDOM} now, whose copies would be trained again: "
                "choose another run_dir, or remove that one"
            )
        self.data, self.run_dir, self.routes = data, Path(run_dir), routes
        self.levels, self.trials, self.seed = sorted(levels), trials, seed
        self.lotteries = {
            name: Lottery(
                route.model or model,
                route.data(data),
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
            rewind,
            copies,
            trials,
            self._tickets(),
            lines,
            training,
            seed,
        )

    def _tickets(self) -> dict[str, str]:
        return {
            ticket_name(route, level): _pattern(self._ticket(route, level, PLACE))
            for level in self.levels
            for route in (*self.routes, RANDOM)
        }

    def _ticket(self, route: str, level: int, trial: int | str) -> Path:
        return self.run_dir / route / f"trial_{trial}" / "tickets" / f"level_{level:02d}.safetensors"

    def run(self) -> None:
        """Do what is not done yet, then report; a trial that another process works on is left to it."""
        parts: list[tuple[Lottery | Instability, float]]
        parts = [*((lottery, len(lottery.plan(0))) for lottery in self.lotteries.values())]
        parts.append((self.stability, self.stability.length))
        steps = sum(runs * part.training.max_steps for part, runs in parts)
        with quick_collection(), ExperimentProgress(self.trials * steps, 1) as progress:
            runners = {  # all of them before a run moves the data's seed
                part.run_dir: part.runner(progress, f"{self.run_dir.name}-{part.run_dir.name}") for part, _ in parts
            }
            check_together(runners.values())
            if self.stability.left:
                self._read(runners)
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

    def _read(self, runners: Mapping[Path, Runner]) -> None:
        """Read the real data once for all, and refuse what does not go together before the first run."""
        self.data.prepare_data()
        for data in (self.data, *(lottery.data for lottery in self.lotteries.values())):
            data.setup("fit")
        initial = runners[self.stability.run_dir].fresh_model(self.seed).state_dict()
        for name, route in self.routes.items():
            if route.distilled:
                keep_identity(route.distilled, self.run_dir / name)
            own = runners[self.run_dir / name].fresh_model(self.seed).state_dict()
            if own.keys() != initial.keys() or not all(torch.equal(own[key], value) for key, value in initial.items()):
                raise ValueError(f"routes.{name}.model is or begins as another network: change its optimizer alone")

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
        """Write the random ticket of this level, once."""
        path = self._ticket(RANDOM, level, trial)
        if path.exists():
            return
        first = next((name for name, route in self.routes.items() if route.distilled is None), next(iter(self.routes)))
        ticket, dense = (Ticket.load(self._ticket(first, number, trial)) for number in (level, 0))
        generator = torch.Generator().manual_seed(stable_seed(self.seed + trial, level, former(RANDOM)))
        masks = M.shuffled(ticket.masks, generator)
        Ticket(masks, dense.rewind, {"level": level, "pruning": RANDOM}).save(path)

    def ledger(self) -> list[Row]:
        """What each ticket cost to find, a row a route, level and trial; see the class."""
        return [
            {"route": name, "real": route.distilled is None, "level": level, "trial": trial}
            | self._cost(name, level, trial)
            for name, route in self.routes.items()
            for level in self.levels
            for trial in range(self.trials)
        ]

    def _cost(self, name: str, level: int, trial: int) -> Row:
        spent: list[Mapping[str, Any]] = [
            read_json(run.run_dir / "cost.json") for run in self.lotteries[name].plan(trial) if run.level < level
        ]
        of_set, points = set_of(self.run_dir / name), [run["points"] for run in spent]
        decoded = None if None in points else sum(points)  # a data module may have a loader of its own
        return {
            "runs": len(spent),
            "decoded_points": decoded,
            "stored_points": None if decoded is None else decoded / of_set["factor"] ** 2,
            "seconds": sum(run["seconds"] for run in spent),
            "making_points": of_set["making_points"],
            "making_seconds": of_set["making_seconds"],
        }


def _pattern(path: Path) -> str:
    """The path as `Instability` takes it: `PLACE` stands for the trial, and braces for themselves."""
    return str(path).replace("{", "{{").replace("}", "}}").replace(PLACE, "{trial}")


def ticket_name(route: str, level: int) -> str:
    """What the copies of this ticket are called in `run_dir/retrained`."""
    return f"{route} level {level}"
