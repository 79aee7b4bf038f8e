"""Strong tickets by search: in random networks masks are trained, and no weight is (arXiv 1911.13299)."""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from torch import nn

from lottery_callbacks import EdgePopup, Pruning
from lottery_callbacks.functional.popup import Scope, Scores, Weights
from lottery_callbacks.functional.steps import Step
from lottery_lightning.experiments.edge_popup_report import Row, report
from lottery_lightning.experiments.runs import Run, Runner, Training, check_together, dense_fit, quick_collection
from lottery_lightning.experiments.store import share_trials
from lottery_lightning.experiments.variants import variants
from lottery_lightning.progress import ExperimentProgress


@dataclass(frozen=True)
class Search:
    """How masks are searched: what `lottery_callbacks.EdgePopup` takes beside sparsity and weights.

    Args:
        scope: "layerwise", "layerwise_truncated" (the published count), "global", or "threshold", which begins at the
            sparsity and learns another.
        scores: "kaiming_uniform" or "magnitude", before the first step.
        norms: whether the affine parts of norm layers are "frozen" as initialised, or "trained".
        end: the step up to which the sparsity rises from 0, "500it" or "2ep"; None for all of it at once.
        exclude: names or patterns of parameters that stay dense, and as they were initialised.
    """

    scope: Scope = "layerwise"
    scores: Scores = "kaiming_uniform"
    norms: Literal["frozen", "trained"] = "frozen"
    end: str | None = None
    exclude: Sequence[str] = ()


@dataclass(frozen=True)
class Arm:
    """One run of each trial: a search, or the training of the dense network."""

    network: str
    weights: str = "trained"
    sparsity: float = 0.0

    def __str__(self) -> str:
        return f"{self.network}, {self.weights}, {self.sparsity:g}" if self != DENSE else self.network


DENSE = Arm("dense")


class EdgePopupSearch:
    """In each trial, masks of random networks are searched by edge-popup: scores are trained, weights never are.

    Arms: "dense", a network trained for comparison, if one is given; then a search for each network, weights and
    sparsity, each in one fit (`lottery_callbacks.EdgePopup`). In a trial they share the order of the data, and searches
    of one network the random numbers that their weights are made of.

    Finished runs are skipped on a rerun and a torn one is resumed; a second process with the same command shares the
    trials. At the end: table, results.csv, figure, one sentence of finding, one line of JSON; each search's folder has
    its ticket, `ticket.safetensors`. Accuracies are those of the last weights: nothing is chosen on the test set.

    Args:
        model: the LightningModule; what its optimizer trains are scores. It logs `val/loss` and `test/acc`, and is
            initialised by `reset_parameters`.
        data: the data module; its `data_seed`, if it has one, is added to the trial's seed.
        run_dir: where everything is kept.
        sparsities: fractions of the weights removed, each in [0, 1).
        weights: what random weights are drawn; see `lottery_callbacks.EdgePopup`.
        search: all else of the search.
        networks: by name, what takes the place of the submodule `network`; None for the model's own, named after its
            class.
        network: the submodule that is searched; what lies outside stays as it was initialised.
        dense: a LightningModule that is trained without a search, as its optimizer may need another learning rate than
            scores do; None leaves it out.
        trials: number of trials; trial t has seed `seed + t`.
        training: how runs train.
        seed: of the first trial.

    Raises:
        ValueError: a bad argument; no such submodule, or one without a weight matrix; a name or number given twice.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: L.LightningDataModule,
        run_dir: Path,
        sparsities: Sequence[float],
        weights: Sequence[Weights] = ("signed_constant",),
        search: Search = Search(),
        networks: dict[str, nn.Module] | None = None,
        network: str = "network",
        dense: L.LightningModule | None = None,
        trials: int = 1,
        training: Training = Training(),
        seed: int = 0,
    ) -> None:
        if trials < 1:
            raise ValueError(f"trials={trials}: an experiment has at least one")
        self.models = variants(model, network, networks)
        searches = [Arm(name, draw, sparsity) for name in self.models for draw in weights for sparsity in sparsities]
        self.arms = [DENSE, *searches] if dense else searches
        if dense and DENSE.network in self.models:
            raise ValueError(f"networks names {DENSE.network!r}, which is the trained arm: give it another name")
        end = Step.parse(search.end) if search.end else None
        if end and end.unit == "it" and end.count > training.max_steps:
            raise ValueError(f"search.end={search.end} lies beyond training.max_steps={training.max_steps}")
        if not searches or len({_folder(arm) for arm in self.arms}) < len(self.arms):
            raise ValueError("networks, weights, sparsities: give one of each at least, and each of them once")
        self.data, self.run_dir, self.network, self.search = data, Path(run_dir), network, search
        self.trials, self.training, self.seed = trials, training, seed
        for arm in searches:  # before the first run, and by the callback's own words
            self._popup(arm).pruning.check(self.models[arm.network])
        if dense:
            self.models[DENSE.network] = dense

    def run(self) -> None:
        """Do what is not done yet, then report; a trial that another process works on is left to it."""
        runs = self.trials * len(self.arms)
        with quick_collection(), ExperimentProgress(runs, self.training.max_steps) as progress:
            runners = {  # all of them before the first run, which moves the data's seed
                name: Runner(model, self.data, self.training, self.run_dir.name, (progress,), self.config)
                for name, model in self.models.items()
            }
            check_together(runners.values())
            folders = [self._trial_dir(trial) for trial in range(self.trials)]
            share_trials(folders, lambda trial: self._run_trial(trial, runners, progress), progress.console.print)
        plans = [self.plan(trial) for trial in range(self.trials)]
        left = [run for plan in plans for run in plan.values() if run.record is None]
        if left:
            print(f"{len(left)} runs are left to another process; the last to finish reports")
            return
        report([self._row(arm, plan) for plan in plans for arm in plan], self.run_dir)

    @property
    def config(self) -> dict[str, Any]:
        """What loggers record of the whole experiment: how masks are searched."""
        return {key: value if isinstance(value, str) else str(value) for key, value in asdict(self.search).items()}

    def plan(self, trial: int) -> dict[Arm, Run]:
        """The runs of one trial in the order in which they are done."""
        return {arm: Run(self._trial_dir(trial) / _folder(arm), trial, 0, str(arm)) for arm in self.arms}

    def _run_trial(self, trial: int, runners: dict[str, Runner], progress: ExperimentProgress) -> None:
        seed = self.seed + trial
        for arm, run in self.plan(trial).items():
            if run.record is not None:
                progress.finish(None)
                continue
            progress.start(f"trial {trial} {arm}")
            began = time.perf_counter()
            if arm == DENSE:
                masked = dense_fit(self.models[arm.network], seed)
            else:
                masked = self._popup(arm, seed, run.run_dir / "ticket.safetensors")
            record = runners[arm.network].do(run, seed, masked)
            progress.finish(
                f"{f'trial {trial} {arm}':<42} density {record['density']:7.2%}  test accuracy at the end "
                f"{record['test_acc_end']:.2%}  {time.perf_counter() - began:,.0f} s"
            )

    def _popup(self, arm: Arm, seed: int = 0, path: Path | None = None) -> EdgePopup:
        search = asdict(self.search) | {"exclude": [*self.search.exclude, *self._outside(arm)]}
        return EdgePopup(arm.sparsity, weights=arm.weights, seed=seed, path=path, **search)  # pyright: ignore[reportArgumentType]

    def _outside(self, arm: Arm) -> list[str]:
        """Weights that are not those of the submodule."""
        return [
            name for name in Pruning().prunable(self.models[arm.network]) if not name.startswith(f"{self.network}.")
        ]

    def _row(self, arm: Arm, plan: dict[Arm, Run]) -> Row:
        """What a finished run found, beside the dense network of its trial."""
        record = plan[arm].record or {}
        pruning = Pruning(exclude=self._outside(arm)) if arm == DENSE else self._popup(arm).pruning
        prunable = pruning.prunable(self.models[arm.network])
        dense = (plan[DENSE].record or {})["test_acc_end"] if DENSE in plan else None
        return {
            "trial": record["trial"],
            "network": arm.network,
            "weights": arm.weights,
            "sparsity": arm.sparsity,
            "density": record["density"],
            "kept": sum(record["kept_per_layer"][name] for name in prunable),
            "prunable": sum(weights.numel() for weights in prunable.values()),
            "early_stop_iteration": record["early_stop_iteration"],
            "val_loss_end": record["curve"][-1]["val/loss"],
            "test_acc_early_stop": record["test_acc_early_stop"],
            "test_acc_end": record["test_acc_end"],
            "dense_acc": dense,
            "acc_minus_dense": None if dense is None else record["test_acc_end"] - dense,
        }

    def _trial_dir(self, trial: int) -> Path:
        return self.run_dir / f"trial_{trial}"


def _folder(arm: Arm) -> str:
    return re.sub(r"[^\w.-]+", "_", str(arm))
