"""How fast the framework trains, beside a loop written by hand and beside Lightning as people write it.

    python scripts/bench_training.py --data data --out results/speed_cpu.csv
    python scripts/bench_training.py --models lenet --rounds 3 --sections steps,where

LeNet-300-100 on MNIST and Conv-2 on CIFAR-10, by the framework's own configs, in one process, in interleaved rounds.
Options that are not named below override keys of the configs (`--training.val_every 50it`).

Variants; each validates 5,000 images every 100 steps, and is compared with `bare` of the same round:

- bare: a loop over tensors on the device.
- framework: a level of the lottery at 20 % density, as its config says, with all metrics, CSV logger, progress bar
  and checkpoints, from the start of its training to the end.
- framework_single: the same with one step a visit.
- framework_heard: the same as framework beside a callback that hears each backward pass and each step, so that
  Lightning calls every hook of all callbacks and the weights are masked after each step.
- framework_dense: its level 0, no weight pruned.
- stock: torchvision's data set in a DataLoader without workers, self.log and torchmetrics at every step, Lightning's
  ModelPruning to 20 % density.
- graph: on CUDA, the bare loop as a CUDA graph.

Sections: "steps" is all of that; "boundary" what a level costs beside its training; and of LeNet alone "memory", the
resident set over the levels of a lottery, and "where", where a step's time goes. Peak memory is of the whole process,
which holds the data of all variants, or on CUDA of its tensors. Progress bars draw to a terminal that nobody sees.
Importing Lightning makes each optimizer step on a CPU slower (see `NVML`): hand-written loops run without that, as they
would alone. The last line is JSON.
"""

import argparse
import csv
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import linear_regression, mean, median
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import torch
from bench_loops import bare, graph, parts_of_a_step, stock
from bench_measuring import NVML, Laps, Listener, give_back, hidden, interleaved, repeated, say, status

from lottery_callbacks import IterativeMagnitudePruning
from lottery_lightning.cli import build, quiet
from lottery_lightning.experiments import Lottery
from lottery_lightning.experiments.runs import Run, Runner, quick_collection
from lottery_lightning.progress import ExperimentProgress

CONFIGS = Path(__file__).parents[1] / "configs" / "lth"
MODELS = {"lenet": "lenet_mnist_small.yaml", "conv2": "conv2_cifar10_small.yaml"}
STEPS, STOCK_STEPS = {"lenet": 1000, "conv2": 100}, {"lenet": 200, "conv2": 100}
SECTIONS = ("steps", "boundary", "memory", "where")
DENSITY = 0.2
ITERATIONS = 5000  # of the level that a boundary is compared with
SHORT_LEVELS, SHORT_STEPS = 20, 50  # of the lottery whose memory is watched
Figures = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args, overrides = arguments(argv)
    torch.set_num_threads(args.threads)
    quiet()
    rows: list[Figures] = []
    found: Figures = {"device": machine(args.device), "rounds": args.rounds}
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(name, args, overrides, Path(folder))
            found |= {f"{name}.{key}": value for key, value in bench.run().items()}
        rows += bench.rows
    say("")
    show(rows, found)
    if args.out and rows:
        write(rows, args.out)
    print(json.dumps({key: rounded(value) for key, value in found.items()}))
    return 0


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and all others."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help=f"of a variant, a multiple of 100; by default {STEPS}")
    parser.add_argument("--stock-steps", type=int, help=f"of stock, likewise; by default {STOCK_STEPS}")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the data_dir of the configs")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, help="a CSV file for the rows")
    args, overrides = parser.parse_known_args(argv)
    args.models, args.sections = args.models.split(","), args.sections.split(",")
    for given, known in ((args.models, MODELS), (args.sections, SECTIONS)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: choose of {', '.join(known)}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args, overrides


def machine(device: str) -> str:
    """In general words."""
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} CPU threads of {platform.machine()}"
    return f"{gpu}{threads}, torch {torch.__version__}, lightning {version('lightning')}"


class Bench:
    """The measures of one model: `run` makes its figures, and the rows of its variants."""

    def __init__(self, name: str, args: argparse.Namespace, overrides: Sequence[str], folder: Path) -> None:
        self.name, self.args, self.folder, self.device = name, args, folder, torch.device(args.device)
        options = ["--config", str(CONFIGS / MODELS[name]), "--run_dir", str(folder), "--data.data_dir", str(args.data)]
        options += ["--levels", "1", "--trials", "1", "--controls", "{}", "--training.logger", "csv"]
        options += ["--rule.rate", str(1 - DENSITY), "--rule.pruning.rates", "{}"]
        options += ["--training.max_steps", str(args.steps or STEPS[name]), "--training.threads", str(args.threads)]
        self.experiment: Any = build("lottery", [*options, *overrides])[0]
        self.single: Any = build("lottery", [*options, *overrides, "--model.steps_per_visit", "1"])[0]
        training = self.experiment.training
        place = {"accelerator": "gpu" if args.device == "cuda" else "cpu"}
        self.experiment.training = replace(training, trainer=training.trainer | place)
        self.single.data, self.single.training = self.experiment.data, self.experiment.training
        self.imp = self.pruning("tickets", 1 - DENSITY)
        self.rows: list[Figures] = []
        self.levels: list[dict[str, float]] = []  # seconds by part of those that `framework` trained

    def pruning(self, folder: str, rate: float) -> IterativeMagnitudePruning:
        """The experiment's rule at another rate, with tickets of its own."""
        rule = self.experiment.rule
        return IterativeMagnitudePruning(rate, rule.rewind, self.folder / folder, rule.pruning, rule.retrain)

    def run(self) -> Figures:
        """The figures of all sections that were asked for."""
        say(f"{self.name}: level 0, for a ticket")
        self.framework_dense()
        found: Figures = {}
        for section in SECTIONS:
            if section in self.args.sections and (self.name == "lenet" or section in ("steps", "boundary")):
                found |= getattr(self, section)()
        return found

    # ---- the variants: each trains once, and returns its microseconds a step

    def bare(self) -> float:
        with patch.dict(os.environ, {NVML: "0"}):
            return self.per_step(bare(self.experiment, self.fresh_model()))

    def graph(self) -> float:
        with patch.dict(os.environ, {NVML: "0"}):
            return self.per_step(graph(self.experiment, self.fresh_model()))

    def framework(self) -> float:
        self.levels.append(self.level(1, self.experiment))
        return self.per_step(self.levels[-1]["training"])

    def framework_single(self) -> float:
        return self.per_step(self.level(1, self.single)["training"])

    def framework_heard(self) -> float:
        return self.per_step(self.level(1, self.experiment, Listener())["training"])

    def framework_dense(self) -> float:
        return self.per_step(self.level(0, self.experiment)["training"])

    def stock(self) -> float:
        shorter, laps = copy(self.experiment), Laps()
        steps = self.args.stock_steps or min(STOCK_STEPS[self.name], self.experiment.training.max_steps)
        shorter.training = replace(self.experiment.training, max_steps=steps)
        with hidden(), patch.dict(os.environ, {NVML: "1"}), tempfile.TemporaryDirectory(dir=self.folder) as folder:
            stock(shorter, self.fresh_model(), Path(folder), laps)
        return self.per_step(laps.seconds["training"], steps)

    def per_step(self, seconds: float, steps: int | None = None) -> float:
        return 1e6 * seconds / (steps or self.experiment.training.max_steps)

    def fresh_model(self) -> Any:
        return Runner(self.experiment.model, self.experiment.data, self.experiment.training, "bench").fresh_model(0)

    def level(self, number: int, experiment: Lottery, *callbacks: L.Callback) -> dict[str, float]:
        """Train a level as the lottery does; its seconds by part."""
        for later in (1, 2):  # tickets of the time before: a finished level is refused
            if later > number:
                self.imp.ticket_path(later).unlink(missing_ok=True)
        self.imp.select(number)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, running(experiment, *callbacks) as (runner, laps):
            runner.do(Run(Path(folder), 0, number, "ticket"), 0, self.imp)
            laps.end("records")
        return dict(laps.seconds)

    # ---- the sections

    def steps(self) -> Figures:
        """Each variant's time a step, its ratio to the bare one, and its peak memory."""
        names = ["bare", "framework", "framework_single", "framework_heard", "framework_dense", "stock"]
        names += ["graph"] if self.device.type == "cuda" else []
        us, peaks = interleaved(self.name, {n: getattr(self, n) for n in names}, self.args.rounds, self.device)
        found: Figures = {f"{name}_us": median(us[name]) for name in names}
        for name in names:
            ratios = quotients(us[name], us["bare"])
            row = {"model": self.name, "variant": name} | spread("us", us[name]) | spread("ratio", ratios)
            self.rows.append(row | {"peak_mib": peaks[name]})
            if name != "bare":
                found |= {f"{name}_over_bare": median(ratios), f"{name}_over_bare_range": [min(ratios), max(ratios)]}
        found["masks_over_bare"] = median(quotients(differences(us["framework"], us["framework_dense"]), us["bare"]))
        found["where.hooks_and_masks_if_heard_us"] = median(differences(us["framework_heard"], us["framework"]))
        found["where.loop_at_one_step_a_visit_us"] = median(differences(us["framework_single"], us["framework"]))
        if "graph" in us:
            found["framework_over_graph"] = median(quotients(us["framework"], us["graph"]))
        return found

    def boundary(self) -> Figures:
        """Seconds of a level beside its training, and as a fraction of the training of a level of 5,000 iterations."""
        while len(self.levels) < self.args.rounds:
            say(f"{self.name}: boundary, level {len(self.levels) + 1} of {self.args.rounds}")
            self.framework()
        seconds = {part: median(level[part] for level in self.levels) for part in self.levels[0]}
        training = ITERATIONS * self.per_step(seconds.pop("training")) / 1e6
        whole = median(sum(level.values()) - level["training"] for level in self.levels)
        found = {"boundary_s": whole, "boundary_over_level": whole / training}
        return found | {f"boundary.{part}_s": value for part, value in seconds.items()}

    def memory(self) -> Figures:
        """Growth of the resident set over short levels of one lottery, what is free given back before each look."""
        shorter, imp = copy(self.experiment), self.pruning("memory", 0.2)
        shorter.training = replace(self.experiment.training, max_steps=SHORT_STEPS, val_every=f"{SHORT_STEPS}it")
        resident: list[float] = []
        with running(shorter) as (runner, _):
            for level in imp.levels(SHORT_LEVELS - 1):
                runner.do(Run(level.run_dir, 0, level.number, "ticket"), 0, imp)
                give_back()
                resident += filter(None, [status("VmRSS")])
        if not resident:
            return {}
        later, third = resident[5:], len(resident) // 3
        return {
            "memory_growth_mib_per_level": linear_regression(range(len(later)), later).slope,
            "memory_last_third_minus_first_mib": mean(resident[-third:]) - mean(resident[:third]),
            "memory_mib": resident,
        }

    def where(self) -> Figures:
        """Time of the parts of a bare step, and of the ways to do them."""
        calls = parts_of_a_step(self.experiment, self.fresh_model(), DENSITY)
        timers = {part: partial(repeated, call) for part, call in calls.items()}
        timers["adam_fused_under_lightning"] = partial(repeated, calls["adam_fused"], nvml="1")
        us, _ = interleaved(f"{self.name}, parts of a step", timers, self.args.rounds, self.device)
        return {f"where.{part}_us": median(taken) for part, taken in us.items()}


@contextmanager
def running(experiment: Lottery, *callbacks: L.Callback) -> Iterator[tuple[Runner, Laps]]:
    """What does runs of an experiment, with the progress bar of a lottery and a stopwatch that runs already."""
    with hidden(), quick_collection(), ExperimentProgress(1, experiment.training.max_steps) as progress:
        laps = Laps()
        yield (
            Runner(experiment.model, experiment.data, experiment.training, "bench", (progress, laps, *callbacks)),
            laps,
        )


def quotients(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(ones, others, strict=True)]


def differences(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(ones, others, strict=True)]


def spread(name: str, values: Sequence[float]) -> Figures:
    return {f"{name}_median": median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


# ---- telling


def show(rows: Sequence[Figures], found: Figures) -> None:
    """For people."""
    print(f"{found['device']}; {found['rounds']} interleaved rounds, median (min to max)\n")
    for row in rows:
        us = "{us_median:,.0f} ({us_min:,.0f} to {us_max:,.0f}) us".format(**row)
        ratio = "{ratio_median:.3f} ({ratio_min:.3f} to {ratio_max:.3f})".format(**row)
        memory = "n/a" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f} MiB"
        print(f"{row['model']:<6} {row['variant']:<17} {us:>36} a step {ratio:>26} of bare, peak {memory}")
    print()
    for key, value in found.items():
        if isinstance(value, float):
            print(f"{key:<44} {value:,.4g}")


def rounded(value: Any) -> Any:
    """Six digits of each number."""
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(rows: Sequence[Figures], path: Path) -> None:
    """The rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({key: rounded(value) for key, value in row.items()} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
