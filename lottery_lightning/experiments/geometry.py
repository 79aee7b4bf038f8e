"""The geometry of trained networks: curvature where they ended, and the loss on planes around and through them."""

import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
import torch

from lottery_callbacks.functional.curvature import require_curvlinops
from lottery_callbacks.functional.interpolation import require_same_tensors
from lottery_lightning.experiments.finished import masks_of, require_finished, weights_of
from lottery_lightning.experiments.geometry_measures import Row, Spectra, Tell, Views, around, curvature_of, through
from lottery_lightning.experiments.geometry_report import report
from lottery_lightning.experiments.runs import Run, Training, quick_collection, stable_seed
from lottery_lightning.experiments.setting import Setting
from lottery_lightning.experiments.store import PointFile, share_trials, write_json
from lottery_lightning.progress import ExperimentProgress

PASSES = 4  # of the batches, that a product with a Hessian takes: about; an evaluation is one


Measure = Callable[[Setting, PointFile, Tell], Row]


@dataclass(frozen=True)
class Task:
    """One measurement, "curvature", "around" or "plane": of what, about how many passes it takes, how it is made."""

    what: str
    run: Run
    passes: int
    measure: Measure


class Geometry:
    """Curvature and loss landscapes of finished runs, as of a lottery (arXiv 2310.18769, 1712.09913).

    Of each network the Hessian (or GGN) of the mean training loss on its kept weights, in eval mode: diagonal with
    standard errors, trace, extreme eigenvalues and spectral density, see `functional.spectrum`; and the loss on a
    random filter-normalised plane, see `functional.random_plane`. Of each of `planes` the loss on the plane through its
    three or four networks. All on the same training batches, in the order of the trial's seed. Planes are computed in
    the runs' precision, curvature in that of the weights: without autocast.

    What is done is skipped on a rerun, and a torn surface goes on at its next point; a second process with the same
    command shares the trials. At the end: table, results.csv (a row a network and trial), planes.csv, figures, one
    sentence of finding, one line of JSON.

    Cost of a network: `draws + spectrum_draws * steps` and about 100 more products, each of about four evaluations of
    the batches; of a plane points^2 evaluations. The time is told before, and the bar shows what is left.

    Args:
        model: the LightningModule of the runs, whose forward maps inputs to logits.
        data: their data module; its batches are (inputs, class labels).
        run_dir: where everything is kept.
        networks: folders of finished runs by name; {trial} in one stands for the trial's number, as in
            "runs/lenet/trial_{trial}/level_10". As mask the last weights that are not 0 are taken, if they are as many
            as the run says that it kept.
        planes: by name, the folders of three or four finished runs: levels of a lottery, or copies of one ticket.
        trials: number of trials.
        batches: training batches.
        spectra: how curvature is measured; null for planes alone.
        views: how planes are evaluated.
        training: of the runs: CPU threads, and the Trainer's device and precision.
        seed: of the first trial: of the batches and of all draws.

    Raises:
        ValueError: a bad argument, a run that is not finished, or whose weights do not show its mask.
        ModuleNotFoundError: curvlinops or scipy is missing.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: L.LightningDataModule,
        run_dir: Path,
        networks: dict[str, str],
        planes: dict[str, list[str]] | None = None,
        trials: int = 1,
        batches: int = 10,
        spectra: Spectra | None = Spectra(),
        views: Views = Views(),
        training: Training = Training(),
        seed: int = 0,
    ) -> None:
        if trials < 1 or batches < 1 or not networks:
            raise ValueError(f"trials={trials}, batches={batches}: give one of each at least, and a network")
        if type(model).forward is L.LightningModule.forward:
            raise ValueError(f"{type(model).__name__} has no forward: give it one that maps inputs to logits")
        for name, folders in (planes or {}).items():
            if len(folders) not in (3, 4):
                raise ValueError(f"planes.{name} names {len(folders)} runs: a plane goes through three or four")
        if spectra:
            require_curvlinops()
        self.model, self.data, self.run_dir = model, data, Path(run_dir)
        self.networks, self.planes, self.trials = networks, planes or {}, trials
        self.batches, self.spectra, self.views, self.training = batches, spectra, views, training
        self.seed = seed
        if spectra and training.trainer.get("precision") in ("bf16-true", "16-true", "bf16", "16"):
            raise ValueError(
                "training.trainer.precision is too coarse for second derivatives: leave it, or spectra=null"
            )
        for trial in range(trials):
            for folder in (*networks.values(), *(folder for some in self.planes.values() for folder in some)):
                self._check(_of_trial(folder, trial), folder in networks.values())
        plans = [task.run.run_dir for task in self.plan(0)]
        if len(set(plans)) < len(plans) or not plans:
            raise ValueError("networks, planes: two names share a folder, or nothing is to be measured")

    def _check(self, folder: Path, masked: bool) -> None:
        """Refuse before the first measurement what would be refused after some."""
        require_finished(folder)
        try:
            require_same_tensors(dict(self.model.state_dict()), weights_of(folder / "final.ckpt"))
        except ValueError as error:
            raise ValueError(f"{folder} is of another architecture: {error}") from error
        if masked:
            masks_of(folder)

    def run(self) -> None:
        """Do what is not done yet, then report; a trial that another process works on is left to it."""
        if self.training.threads:
            torch.set_num_threads(self.training.threads)
        plans = [self.plan(trial) for trial in range(self.trials)]
        passes = sum(task.passes for plan in plans for task in plan)
        with quick_collection(), ExperimentProgress(passes, 1, unit="passes") as progress:
            folders = [self.run_dir / f"trial_{trial}" for trial in range(self.trials)]
            share_trials(folders, lambda trial: self._run_trial(trial, plans[trial], progress), progress.console.print)
        runs = [task.run for plan in plans for task in plan]
        if left := sum(run.record is None for run in runs):
            print(f"{left} measurements are left to another process; the last to finish reports")
            return
        report([{"trial": run.trial, "name": run.arm} | (run.record or {}) for run in runs], self.run_dir)

    def plan(self, trial: int) -> list[Task]:
        """The measurements of one trial in the order in which they are made."""
        folder, tasks = self.run_dir / f"trial_{trial}", []
        spectra, views, seed = self.spectra, self.views, stable_seed(self.seed + trial, "geometry")
        grid = views.points**2

        def add(what: str, name: str, passes: int, measure: Measure) -> None:
            place = folder / re.sub(r"[^\w.-]+", "_", f"{what}_{name}")
            tasks.append(Task(what, Run(place, trial, 0, name), passes, measure))

        for name, path in self.networks.items():
            place = _of_trial(path, trial)
            if spectra:
                passes = PASSES * spectra.products
                add(
                    "curvature", name, passes, lambda its, _, tell, of=place: curvature_of(its, of, spectra, seed, tell)
                )
            if views.around:
                add("around", name, grid, lambda its, kept, tell, of=place: around(its, of, views, seed, kept, tell))
        for name, paths in self.planes.items():
            places = [_of_trial(path, trial) for path in paths]
            add("plane", name, grid, lambda its, kept, tell, of=places: through(its, of, views, kept, tell))
        return tasks

    def _run_trial(self, trial: int, plan: list[Task], progress: ExperimentProgress) -> None:
        setting = None
        for task in plan:
            run = task.run
            progress.start(f"trial {trial} {run.run_dir.name}", task.passes)
            if run.record is None:
                if setting is None:  # data are read where something is left to measure
                    model = copy.deepcopy(self.model)
                    setting = Setting(model, self.data, self.training, self.seed + trial, self.batches)
                    left = sum(task.passes for task in plan if task.run.record is None)
                    progress.console.print(_told(setting, left, self.batches), soft_wrap=True)
                began = time.perf_counter()
                found = task.measure(setting, PointFile(run.run_dir / "points.jsonl"), progress.tell)
                write_json(run.run_dir / "result.json", {"what": task.what} | found)
                progress.finish(f"trial {trial} {run.run_dir.name:<32} {time.perf_counter() - began:,.0f} s")
            else:
                progress.finish(None)


def _told(setting: Setting, passes: int, batches: int) -> str:
    """How long so many passes will take, after one; and how many batches there are, where these are fewer."""
    began = time.perf_counter()
    setting.on_training(setting.model)
    minutes = (time.perf_counter() - began) * passes / 60
    read = len(setting.training)
    fewer = f", of {read} batches, fewer than the {batches} asked for" if read < batches else f", of {read} batches"
    return f"about {passes:,} passes{fewer}: about {minutes:,.0f} min"


def _of_trial(path: str, trial: int) -> Path:
    try:
        return Path(path.format(trial=trial))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} names {error}, and only {{trial}} is known") from error
