"""What alpha-stable numbers cost beside scipy's, and heavy-tailed noise beside the training step that it follows.

    python scripts/bench_alpha_stable.py
    python scripts/bench_alpha_stable.py --sections steps --steps 3000

"draws": nanoseconds a number, for many at once, of `scipy.stats.levy_stable.rvs`, `alpha_stable.symmetric`,
`StableTable` and rotationally invariant noise, 1,000 numbers a row. "steps": LeNet-300-100 at batch 60 on random images
by plain SGD, several steps a visit, without validation, logger or checkpoint, alone and with `HeavyTailedNoise`.
All variants of a section run in one process in interleaved rounds; ratios are within a round. The last line is JSON.
"""

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, get_args

import lightning.pytorch as L
import torch
from bench_edge_popup import RandomImages
from bench_loops import wait
from bench_measuring import Laps, hidden, interleaved, say
from bench_training import machine, quotients, rounded, spread

from lottery_callbacks.functional.alpha_stable import Kind, noise, symmetric
from lottery_callbacks.functional.stable_table import StableTable
from lottery_callbacks.heavy_tailed_noise import HeavyTailedNoise
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier

Figures = dict[str, Any]
Timers = dict[str, Callable[[], float]]
SECTIONS = ("draws", "steps")
ROW = 1000


def draws(args: argparse.Namespace) -> Timers:
    """Nanoseconds a number."""
    generator, table = torch.Generator(args.device).manual_seed(0), StableTable(args.alpha, args.device)
    rows = max(1, args.count // ROW)
    calls: dict[str, Callable[[], Any]] = {
        "scipy": partial(scipys, args.alpha, args.count),
        "formula": lambda: symmetric(args.alpha, (args.count,), generator),
        "table": lambda: table.draw((args.count,), generator),
        "rotation": lambda: noise("rotation", args.alpha, (rows, args.count // rows), generator),
    }
    return {name: partial(timed, call, args.count) for name, call in calls.items()}


def scipys(alpha: float, count: int) -> Any:
    from scipy.stats import levy_stable

    return levy_stable.rvs(alpha, 0, size=count, random_state=0)


def timed(call: Callable[[], Any], count: int) -> float:
    began = wait()
    call()
    wait()
    return 1e9 * (time.perf_counter() - began) / count


def steps(args: argparse.Namespace) -> Timers:
    """Microseconds a training step."""
    return {
        "plain": lambda: train(args),
        **{kind: lambda kind=kind: train(args, HeavyTailedNoise(args.alpha, 1e-4, kind)) for kind in get_args(Kind)},
    }


def train(args: argparse.Namespace, *callbacks: L.Callback) -> float:
    """One fit, without what comes before its first step."""
    laps = Laps()
    torch.manual_seed(0)
    task = ImageClassifier(Dense([784, 300, 100, 10]), partial(torch.optim.SGD, lr=0.1), steps_per_visit=50)
    with hidden(), tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=args.steps,
            callbacks=[*callbacks, laps],
            accelerator="gpu" if args.device == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        trainer.fit(task, datamodule=RandomImages((1, 28, 28), 60))
    return 1e6 * laps.seconds["training"] / args.steps


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alpha", type=float, default=1.75)
    parser.add_argument("--count", type=int, default=4_000_000, help="numbers of a draw")
    parser.add_argument("--steps", type=int, default=1000, help="of a fit")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    args = parser.parse_args(argv)
    sections = args.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: choose of {', '.join(SECTIONS)}")
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    found: Figures = {"device": machine(args.device), "rounds": args.rounds, "alpha": args.alpha}
    lines = [f"{found['device']}; {args.rounds} interleaved rounds, alpha {args.alpha:g}, median (min to max)\n"]
    for section, timers, unit in (("draws", draws, "ns a number"), ("steps", steps, "us a step")):
        if section not in sections:
            continue
        if section == "draws":
            timed(partial(scipys, args.alpha, 1000), 1000)  # imports
        taken, _ = interleaved(section, timers(args), args.rounds, torch.device(args.device))
        first = next(iter(taken))
        for name, values in taken.items():
            ratios = quotients(taken[first], values) if section == "draws" else quotients(values, taken[first])
            row = spread("time", values) | spread("ratio", ratios)
            what = f"times as fast as {first}" if section == "draws" else f"of {first}"
            time_taken = "{time_median:,.1f} ({time_min:,.1f} to {time_max:,.1f})".format(**row)
            lines.append(
                f"{name:<9} {time_taken:>32} {unit:<11} "
                + "{ratio_median:.2f} ({ratio_min:.2f} to {ratio_max:.2f})".format(**row)
                + f" {what}"
            )
            found[f"{section}.{name}"] = median(values)
            if name != first:
                key = f"{section}.{name}_{'speedup' if section == 'draws' else 'over_plain'}"
                found |= {key: median(ratios), f"{key}_range": [min(ratios), max(ratios)]}
    say("")
    print("\n".join(lines))
    print(json.dumps({key: rounded(value) for key, value in found.items()}))
    return 0


if __name__ == "__main__":
    gc.freeze()
    sys.exit(main())
