"""Heavy-tailed SGD: networks trained with alpha-stable noise, and how far they can be compressed (arXiv 2306.08125)."""

import copy
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from torch import nn

from lottery_callbacks import HeavyTailedNoise
from lottery_callbacks.functional.alpha_stable import Kind
from lottery_lightning.experiments.compression import Row, compression_of
from lottery_lightning.experiments.finished import weights_of
from lottery_lightning.experiments.heavy_tails_report import report
from lottery_lightning.experiments.hooks import FirstRate, StopAt
from lottery_lightning.experiments.needs import Needs, require_logits
from lottery_lightning.experiments.runs import (
    Run,
    Runner,
    Training,
    check_together,
    dense_fit,
    quick_collection,
    stable_seed,
)
from lottery_lightning.experiments.setting import Setting
from lottery_lightning.experiments.store import read_json, share_trials, write_json
from lottery_lightning.experiments.variants import variants
from lottery_lightning.progress import ExperimentProgress


@dataclass(frozen=True)
class Noise:
    """What noise is added: what `lottery_callbacks.HeavyTailedNoise` takes beside alpha.

    Args:
        scale: the paper's sigma.
        kind: "neuron", "weight" or "rotation": the paper's types 1, 2 and 3.
        exclude: names or patterns of parameters that get no noise, beside the output layer, biases and norms; they are
            compressed nevertheless.
        include: names or patterns of parameters that get noise although the default leaves them out.
        first_convolution: whether the first convolution gets noise, and is compressed; the published code leaves it.
        kernels: of convolutions, one number a kernel instead of one a filter.
    """

    scale: float = 0.003
    kind: Kind = "neuron"
    exclude: Sequence[str] = ()
    include: Sequence[str] = ()
    first_convolution: bool = False
    kernels: bool = False


@dataclass(frozen=True)
class Compression:
    """How finished networks are compressed, layer by layer, after training and without any more of it.

    Args:
        budget: the squared relative error that a layer may have, ||W - W_k||^2 / ||W||^2 (the paper: 0.1).
        ratios: parts of each layer's columns, and of its weights, removed for the curves.
        output: whether the last layer is compressed too, as where it is not the output layer that was trained.
    """

    budget: float = 0.1
    ratios: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    output: bool = False

    def __post_init__(self) -> None:
        if not self.ratios:
            raise ValueError("compression.ratios is empty: give parts of a layer, as [0.0, 0.5, 0.9]")
        if not 0 <= self.budget < 1:
            raise ValueError(f"compression.budget={self.budget} is outside [0, 1): a part of the squared norm")
        if outside := [ratio for ratio in self.ratios if not 0 <= ratio <= 1]:
            raise ValueError(f"compression.ratios names {outside[0]}: parts of a layer lie in [0, 1]")


@dataclass(frozen=True)
class Arm:
    """One run of each trial: a network, and the noise's alpha; None trains without noise."""

    network: str
    alpha: float | None

    def __str__(self) -> str:
        return f"{self.network}, " + ("no noise" if self.alpha is None else f"alpha {self.alpha:g}")


class HeavyTails:
    """Networks trained by SGD with alpha-stable noise for several alpha, and without; then each is compressed.

    Each arm is one fit with `lottery_callbacks.HeavyTailedNoise`. In a trial all arms of a network have the same
    initial weights and the same order of the data. Of the last weights are measured: test accuracy; by columns
    (neurons, filters), single weights and singular values, the pruning ratio at the budget of squared error and the
    test accuracy of what is left, see `functional.compressibility`; error and accuracy against the ratio; the tail
    index of the first compressed layer; and how many parameters the network has from which the pruned columns are
    really cut out, see `functional.narrowing`.

    Finished runs are skipped on a rerun and a torn one is resumed; a second process with the same command shares the
    trials. At the end: table, results.csv (a row a run), curves.csv, figure, one sentence of finding, one line of JSON.

    Args:
        model: the LightningModule; plain SGD in the paper. It logs `val/loss` and `test/acc`, and with `until`
            `val/acc`; `forward` maps inputs to logits; it is initialised by `reset_parameters`.
        data: the data module; its `data_seed`, if it has one, is added to the trial's seed.
        run_dir: where everything is kept.
        alphas: stability indices in (0, 2], and null for none; 2 is Gaussian noise.
        noise: all else of it.
        compression: how networks are compressed.
        networks: by name, what takes the place of the submodule `network`, for instance of several widths; None for
            the model's own.
        network: that submodule.
        until: validation accuracy at which a run ends, at the next validation (the paper: training accuracy 0.95);
            None for `max_steps`.
        trials: number of trials; trial t has seed `seed + t`.
        training: how runs train.
        seed: of the first trial.

    Raises:
        ValueError: a bad argument; no such submodule; a number given twice.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: L.LightningDataModule,
        run_dir: Path,
        alphas: Sequence[float | None] = (None, 2.0, 1.9, 1.8, 1.75),
        noise: Noise = Noise(),
        compression: Compression = Compression(),
        networks: dict[str, nn.Module] | None = None,
        network: str = "network",
        until: float | None = None,
        trials: int = 1,
        training: Training = Training(),
        seed: int = 0,
    ) -> None:
        if trials < 1:
            raise ValueError(f"trials={trials}: an experiment has at least one")
        if type(model).forward is L.LightningModule.forward:
            raise ValueError(f"{type(model).__name__} has no forward: give it one that maps inputs to logits")
        self.models = variants(model, network, networks)
        self.arms = [Arm(name, alpha) for name in self.models for alpha in alphas]
        if until is not None and not 0 < until <= 1:
            raise ValueError(f"until={until} is outside (0, 1]: it is a validation accuracy")
        if not self.arms or len({_folder(arm) for arm in self.arms}) < len(self.arms):
            raise ValueError("alphas, networks: give one of each at least, each of them once, and names that differ")
        self.data, self.run_dir, self.noise, self.compression = data, Path(run_dir), noise, compression
        self.until, self.trials, self.training, self.seed = until, trials, training, seed
        for arm in self.arms:  # before the first run, and by the callback's own words
            if arm.alpha is not None:
                chosen = self.models[arm.network]
                self._noise(arm.alpha, 0).left_out(chosen, set(chosen.parameters()))

    def run(self) -> None:
        """Do what is not done yet, then report; a trial that another process works on is left to it."""
        runs = self.trials * len(self.arms)
        with quick_collection(), ExperimentProgress(runs, self.training.max_steps) as progress:
            needs = Needs(("val/loss", *(() if self.until is None else ("val/acc",))), batch=require_logits)
            runners = {  # all of them before the first run, which moves the data's seed
                name: Runner(model, self.data, self.training, self.run_dir.name, (progress,), self.config, needs)
                for name, model in self.models.items()
            }
            check_together(runners.values())
            folders = [self._trial_dir(trial) for trial in range(self.trials)]
            share_trials(folders, lambda trial: self._run_trial(trial, runners, progress), progress.console.print)
        runs = [(arm, run) for trial in range(self.trials) for arm, run in self.plan(trial).items()]
        if left := sum(not _measured(run).exists() for _, run in runs):
            print(f"{left} runs are left to another process; the last to finish reports")
            return
        report([self._row(arm, run) for arm, run in runs], self.run_dir)

    @property
    def config(self) -> dict[str, Any]:
        """What loggers record of the whole experiment: the noise."""
        return {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in asdict(self.noise).items()
        }

    def plan(self, trial: int) -> dict[Arm, Run]:
        """The runs of one trial in the order in which they are done."""
        return {arm: Run(self._trial_dir(trial) / _folder(arm), trial, 0, str(arm)) for arm in self.arms}

    def _run_trial(self, trial: int, runners: dict[str, Runner], progress: ExperimentProgress) -> None:
        seed = self.seed + trial
        for arm, run in self.plan(trial).items():
            if _measured(run).exists():
                progress.finish(None)
                continue
            progress.start(f"trial {trial} {arm}")
            if run.record is None:
                more: list[L.Callback] = [] if arm.alpha is None else [self._noise(arm.alpha, seed)]
                rate = FirstRate(run.run_dir / "rate.json")
                stop = [] if self.until is None else [StopAt(self.until)]
                runners[arm.network].do(run, seed, dense_fit(self.models[arm.network], seed), *more, *stop, rate)
            found = self._measure(arm, run, seed)
            write_json(_measured(run), found)
            progress.finish(
                f"{f'trial {trial} {arm}':<36} test accuracy {found['test_acc']:.2%}; columns removed at "
                f"{self.compression.budget:.0%} error {found['column_ratio']:.1%}, then {found['column_acc']:.2%}"
            )

    def _measure(self, arm: Arm, run: Run, seed: int) -> Row:
        model = self.models[arm.network]
        setting = Setting(copy.deepcopy(model), self.data, self.training, seed, 0)
        setting.model.load_state_dict(weights_of(run.run_dir / "final.ckpt"))
        return compression_of(setting, **asdict(self.compression), first_convolution=self.noise.first_convolution)

    def _noise(self, alpha: float, seed: int) -> HeavyTailedNoise:
        return HeavyTailedNoise(alpha, **asdict(self.noise), seed=stable_seed(seed, "noise"))

    def _row(self, arm: Arm, run: Run) -> Row:
        record = run.record or {}
        return {
            "trial": run.trial,
            "network": arm.network,
            "alpha": arm.alpha,
            "steps": record["curve"][-1]["iteration"],
            "lr": read_json(run.run_dir / "rate.json"),
            **read_json(_measured(run)),
        }

    def _trial_dir(self, trial: int) -> Path:
        return self.run_dir / f"trial_{trial}"


def _measured(run: Run) -> Path:
    return run.run_dir / "compression.json"


def _folder(arm: Arm) -> str:
    return re.sub(r"[^\w.-]+", "_", str(arm))
