"""Distillation: a few images made of a data set, and whether training on them beats as many real ones."""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as L

from lottery_lightning.data import DistilledDataModule, DistilledSet, TensorDataModule
from lottery_lightning.distillation import Matching
from lottery_lightning.distillation.selection import SELECTIONS
from lottery_lightning.experiments.distill_making import RESUME, Making, Told, Watched
from lottery_lightning.experiments.distill_report import Row, report
from lottery_lightning.experiments.distill_sets import Images, Sets, cost_of
from lottery_lightning.experiments.runs import Run, Runner, Training, dense_fit, quick_collection
from lottery_lightning.experiments.store import read_json, share_trials
from lottery_lightning.experiments.variants import variants
from lottery_lightning.figures.distill import CEILING
from lottery_lightning.progress import ExperimentProgress

MAKING = "making"  # a folder beside those of the runs


class Distill:
    """In each trial a distilled set is made, and the model trained on it, on as many real images, and on all of them.

    A trial trains the model on all real images ("whole", the ceiling), chooses images of the real training split by
    each of the baselines (those that need features take this model's, see `distillation.features`), makes the
    distilled set, and trains the model, newly initialised and with the same seed, on each. Validation is on real
    images that are held out of the training split, everywhere; no set sees these or the test images. Baselines store as
    many images as the distilled set; with a `factor` that one decodes to more. With start "random" and factor 1 it
    begins as the very images of the baseline "random".

    The sets are `trial_0/sets/*.safetensors`, see `lottery_lightning.data.DistilledSet`; the same experiment gives the
    same bytes. Pictures of the forming images are in `trial_0/pictures`. Finished parts are skipped on
    a rerun and a torn one is resumed; a second process with the same command shares the trials. At the end: table,
    results.csv (a row a set and trial), figure, one sentence of finding, one line of JSON.

    Args:
        model: the LightningModule that is trained on the sets; it logs `val/loss` and `test/acc` and is initialised by
            `reset_parameters`.
        data: the real data; its `data_seed` is added to the trial's seed.
        run_dir: where everything is kept.
        method: how the distilled set is made.
        images: what images sets have.
        baselines: of "random", "herding" and "k-means", see `distillation.selection`.
        network: the submodule of the model that sets are made for and images embedded by.
        making: how long the distilled set is made.
        training: how the model trains on each of the sets.
        batch_size: of that training.
        whole: how it trains on all real images; None for `training`.
        whole_model: what is trained on those, of the same network, as its schedule may be another; None for `model`.
        trials: number of trials; trial t has seed `seed + t`.
        seed: of the first trial.

    Raises:
        ValueError: a bad argument; no such submodule, or another one in `whole_model`; data that do not say how they
            are preprocessed.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: TensorDataModule,
        run_dir: Path,
        method: Matching,
        images: Images = Images(),
        baselines: Sequence[str] = ("random", "herding", "k-means"),
        network: str = "network",
        making: Making = Making(),
        training: Training = Training(),
        batch_size: int = 256,
        whole: Training | None = None,
        whole_model: L.LightningModule | None = None,
        trials: int = 1,
        seed: int = 0,
    ) -> None:
        if trials < 1:
            raise ValueError(f"trials={trials}: an experiment has at least one")
        if unknown := [name for name in baselines if name not in SELECTIONS]:
            raise ValueError(f"baselines names {unknown[0]!r}: choose of {', '.join(SELECTIONS)}")
        if len(set(baselines)) < len(baselines):
            raise ValueError("baselines: give each of them once")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be positive")
        if data.preprocessing is None:
            raise ValueError(f"{type(data).__name__} states no `preprocessing`: set it to what its load() applies")
        self.model, self.whole_model = model, whole_model or model
        for one in (self.model, self.whole_model):
            variants(one, network, None)  # refuses one without that submodule
        if _shapes(self.model, network) != _shapes(self.whole_model, network):
            raise ValueError(f"whole_model has another {network} than model: change its optimizer and schedule alone")
        self.data, self.run_dir, self.method, self.images = data, Path(run_dir), method, images
        self.baselines, self.network, self.making, self.training = tuple(baselines), network, making, training
        self.batch_size, self.whole, self.trials, self.seed = batch_size, whole or training, trials, seed
        self._data_seed = data.data_seed  # which runs move
        self._unchecked: list[Runner] = []
        self.sets = Sets(data, data.preprocessing, images, model.get_submodule(network))

    @property
    def methods(self) -> tuple[str, ...]:
        """The sets of a trial: whole, baselines, the distilled one."""
        return (CEILING, *self.baselines, self.method.name)

    def run(self) -> None:
        """Do what is not done yet, then report; a trial that another process works on is left to it."""
        self.data.prepare_data()
        self.data.setup("fit")
        self.sets.check(self.method.needs_features or bool(set(self.baselines) - {"random"}))
        trained = ((self.whole_model, self.whole), (self.model, self.training))
        self._unchecked = [
            Runner(model, self.data, training, self.run_dir.name) for model, training in trained
        ]  # whole, and one for all sets
        with (
            quick_collection(),
            ExperimentProgress(self.trials * sum(self._shares), self.training.max_steps) as progress,
        ):
            folders = [self._trial_dir(trial) for trial in range(self.trials)]
            share_trials(folders, lambda trial: self._run_trial(trial, progress), progress.console.print)
        plans = [self.plan(trial) for trial in range(self.trials)]
        if left := sum(run.record is None for plan in plans for run in plan.values()):
            print(f"{left} runs are left to another process; the last to finish reports")
            return
        losses = {trial: read_json(self._trial_dir(trial) / MAKING / "losses.json") for trial in range(self.trials)}
        report([row for trial in range(self.trials) for row in self._rows(trial)], losses, self.run_dir)

    @property
    def config(self) -> dict[str, Any]:
        """What loggers record of the whole experiment: the method and its images."""
        return {"method": self.method.name, "per_class": self.images.per_class, "factor": self.images.factor}

    def plan(self, trial: int) -> dict[str, Run]:
        """The runs of one trial by their sets, in the order in which they are done."""
        return {name: Run(self._trial_dir(trial) / _slug(name), trial, 0, name) for name in self.methods}

    def set_path(self, trial: int, method: str) -> Path:
        """The file of a set."""
        return self._trial_dir(trial) / "sets" / f"{_slug(method)}.safetensors"

    @property
    def _shares(self) -> tuple[float, float, float, int]:
        """What the parts of a trial take, in trainings on a baseline's set, by images that go through the network."""
        classes, stored, decoded = self.sets.sizes
        run = 3 * min(self.batch_size, stored) * self.training.max_steps
        whole = 3 * self.data.batch_size * self.whole.max_steps
        making = self.method.passes(classes, decoded) * self.making.max_steps
        distilled = 3 * min(self.batch_size, decoded) * self.training.max_steps
        return whole / run, making / run, distilled / run, len(self.baselines)

    def _run_trial(self, trial: int, progress: ExperimentProgress) -> None:
        seed, plan = self.seed + trial, self.plan(trial)
        whole, making, distilled, _ = self._shares
        for name, run in plan.items():
            for training in (self.whole, self.training):  # also where a finished run sets none: bits may depend on them
                training.use_threads()
            label, path = f"trial {trial} {name}", self.set_path(trial, name)
            if name == self.method.name:
                progress.start(f"{label}, making", making)
                folder, shown = self._trial_dir(trial) / MAKING, self.training.logger
                if not path.exists():
                    watched = Watched(folder, label, trial, progress, shown, self.run_dir.name, self.config)
                    self.sets.make(self.method, self.making, seed, path, watched)
                shutil.rmtree(folder / RESUME, ignore_errors=True)  # a kill after the set was kept may have left it
                progress.finish(None)
            elif name != CEILING and not path.exists():
                self._choose(name, seed, trial, plan[CEILING])
            progress.start(label, whole if name == CEILING else distilled if name == self.method.name else 1.0)
            if run.record is not None:
                progress.finish(None)
                continue
            runner = self._runner(name, path, progress)
            record = runner.do(run, seed, dense_fit(runner.model, seed))
            progress.finish(f"{label:<36} test accuracy {record['test_acc_end']:.2%}")

    def _runner(self, name: str, path: Path, progress: ExperimentProgress) -> Runner:
        told = (Told(progress),)
        self.data.data_seed = self._data_seed
        if name == CEILING:
            runner = Runner(self.whole_model, self.data, self.whole, self.run_dir.name, told, self.config)
        else:
            small = DistilledDataModule(path, self.data, batch_size=self.batch_size, data_seed=self._data_seed)
            runner = Runner(self.model, small, self.training, self.run_dir.name, told, self.config)
        runner.unchecked = self._unchecked
        return runner

    def _choose(self, name: str, seed: int, trial: int, whole: Run) -> None:
        """Write the set of a baseline; all that need features at once, which are embedded once."""
        if name == "random":
            self.sets.choose(name, seed, self.set_path(trial, name), None, {"seconds": 0.0, "points": 0})
            return
        began, cost = perf_counter(), read_json(whole.run_dir / "cost.json")
        embedded = self.sets.embed(self.whole_model, self.network, self.whole, whole)
        spent = {"seconds": cost["seconds"] + perf_counter() - began, "points": cost["points"] + len(embedded)}
        for other in self.baselines:
            if other != "random" and not (path := self.set_path(trial, other)).exists():
                self.sets.choose(other, seed, path, embedded, spent)

    def _rows(self, trial: int) -> Iterator[Row]:
        """What a finished trial found, a row a set."""
        runs = {
            name: (run.record or {}, read_json(run.run_dir / "cost.json")) for name, run in self.plan(trial).items()
        }
        for name, (record, spent) in runs.items():
            path = self.set_path(trial, name)
            if name == CEILING:
                stored = decoded = len(self.data.splits["train"][1])
                made = {"seconds": 0.0, "points": 0}
            else:
                found, made = DistilledSet.load(path), read_json(cost_of(path))
                stored, decoded = len(found.images), len(found.images) * found.factor**2
            random = runs["random"][0]["test_acc_end"] if "random" in runs else None
            yield {
                "trial": trial,
                "method": name,
                "stored": stored,
                "decoded": decoded,
                "test_acc": record["test_acc_end"],
                "early_stop_iteration": record["early_stop_iteration"],
                "test_acc_early_stop": record["test_acc_early_stop"],
                "acc_minus_random": None if random is None else record["test_acc_end"] - random,
                "making_real_points": made["points"],
                "making_seconds": round(made["seconds"], 1),
                "training_points": spent["points"],
                "training_seconds": round(spent["seconds"], 1),
                "set": "" if name == CEILING else str(path.relative_to(self.run_dir)),
            }

    def _trial_dir(self, trial: int) -> Path:
        return self.run_dir / f"trial_{trial}"


def _shapes(model: L.LightningModule, network: str) -> dict[str, Any]:
    return {name: tensor.shape for name, tensor in model.get_submodule(network).state_dict().items()}


def _slug(method: str) -> str:
    return re.sub(r"[^\w.-]+", "_", method)
