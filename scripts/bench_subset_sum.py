"""Seconds of exact subset sums beside integer programming: `python scripts/bench_subset_sum.py --out DIR`.

The instances have the shape of Pensia et al. (arXiv 2006.07990): a weight of a 784-500-10 network each, n samples
uniform between its least and greatest weight; here the targets are uniform there too. *Shared*: a set a row of a layer,
510 in all; *own*: a set a weight. Each figure is the median of the repeats; integer programs solve a few of the same
instances, and their seconds a weight are compared with `seconds_own` a weight. Beside the kernel the solver without it
answers the questions of any size. The yardstick is 2^(n/2) additions a target. The last line of output is JSON.
"""

import argparse
import csv
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lottery_callbacks.functional.subset_sum import subset_sum

Solver = Callable[[float, np.ndarray, float], float]
LOW, HIGH = -0.4642, 0.5407  # of the published network
ROWS = ((500, 784), (10, 500))
TOLERANCE = 0.01
QUESTIONS = {  # whose growth is drawn: whether each target has its own set, and the question
    "any size, own sets": (True, {}),
    "any size, one set": (False, {}),
    "size 3, own sets": (True, {"size": 3}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the rows, for a quick look")
    parser.add_argument("--milp", type=int, default=3, help="instances for the integer programs")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one of them")
    parser.add_argument("--out", type=Path, help="folder for growth.csv and .png, and bench.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = [_instances(max(1, round(args.fraction * sets)), each, args.n, args.device) for sets, each in ROWS]
    targets = torch.cat([t.flatten() for t, _ in shared])
    own = targets, _uniform(len(targets), args.n, seed=2).to(args.device)
    compiled = bool(find_spec("numba")) and args.device == "cpu"
    result: dict[str, object] = {"n": args.n, "targets": len(targets), "threads": args.threads}
    result |= {"device": _processor(args.device), "torch": torch.__version__}
    result["kernel"] = f"numba {version('numba')}" if compiled else None

    questions: dict[str, Callable[[bool], object]] = {
        "shared": lambda kernel: [subset_sum(t, x, kernel=kernel) for t, x in shared],
        "own": lambda kernel: subset_sum(*own, kernel=kernel),
        "fixed3": lambda kernel: subset_sum(*own, size=3, kernel=kernel),
        "fixed4": lambda kernel: subset_sum(*own, size=4, kernel=kernel),
        "smallest": lambda kernel: subset_sum(*own, tolerance=TOLERANCE, kernel=kernel),
    }
    for kernel in (True, False) if compiled else (False,):
        for name, ask in questions.items() if kernel or not compiled else list(questions.items())[:2]:
            key = f"seconds_{name}" + ("" if kernel or not compiled else "_without_kernel")
            result[key] = round(_median(lambda ask=ask, kernel=kernel: ask(kernel), args.repeats, args.device), 3)
            print(f"{key}: {result[key]}", flush=True)
    yardstick = partial(_yardstick, len(targets), args.n)
    result["seconds_yardstick_one_thread"] = round(_median(yardstick, args.repeats, args.device), 3)
    some = [(float(t), x.double().cpu().numpy()) for t, x in zip(own[0][: args.milp], own[1], strict=False)]
    ours, each = subset_sum(*own).errors.tolist(), float(str(result["seconds_own"])) / len(targets)
    for name, solve in {"milp": _milp, **({"gurobi": _gurobi} if find_spec("gurobipy") else {})}.items():
        result |= _compared(name, solve, some, ours[: args.milp], args.limit, each)
    if args.out:
        _growth(args.out, args.repeats, args.device)
        (args.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * (HIGH - LOW) + LOW


def _instances(sets: int, each: int, n: int, device: str) -> tuple[Tensor, Tensor]:
    return _uniform(sets, each, seed=each).to(device), _uniform(sets, n, seed=each + 1).to(device)


def _median(ask: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds; a first call that compiles or warms up is not counted."""

    def timed() -> float:
        began = time.perf_counter()
        ask()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    _warm(device)
    return statistics.median(timed() for _ in range(repeats))


def _warm(device: str) -> None:
    for kernel in (None, False):
        subset_sum(torch.zeros(2, device=device), torch.ones(2, 4, device=device), kernel=kernel)
        subset_sum(torch.zeros(2, device=device), torch.ones(4, device=device), kernel=kernel)


def _yardstick(targets: int, n: int) -> None:
    """2^(n/2) additions a target in one thread, in the cache."""
    block = torch.zeros(round(2 ** (n / 2)), dtype=torch.float64)
    numbers = torch.ones_like(block)
    for _ in range(targets):
        torch.add(block, numbers, out=block)


def _compared(
    name: str, solve: Solver, some: list[tuple[float, np.ndarray]], ours: list[float], limit: float, each: float
) -> dict[str, object]:
    """Seconds a weight of an integer program, how many times ours that is, and how often its sum is nearer."""
    seconds, nearer = [], 0
    for (target, samples), least in zip(some, ours, strict=True):
        began = time.perf_counter()
        error = solve(target, samples, limit)
        seconds.append(time.perf_counter() - began)
        nearer += bool(error < least - 1e-15)
        print(f"{name}: {seconds[-1]:.2f} s, error {error:.3g} beside {least:.3g}", flush=True)
    mean = statistics.mean(seconds)
    return {f"seconds_{name}_a_weight": round(mean, 3), f"ratio_{name}": round(mean / each), f"{name}_nearer": nearer}


def _milp(target: float, samples: np.ndarray, limit: float) -> float:
    """HiGHS through scipy: min z with |target - samples x| <= z, x binary; the error of its x."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    n = len(samples)
    found = milp(
        np.append(np.zeros(n), 1.0),
        integrality=np.append(np.ones(n), 0),
        bounds=Bounds(0, np.append(np.ones(n), np.inf)),  # pyright: ignore[reportArgumentType]
        constraints=[
            LinearConstraint(np.append(samples, 1.0)[None], target, np.inf),
            LinearConstraint(np.append(samples, -1.0)[None], -np.inf, target),
        ],
        options={"time_limit": limit},
    )
    return np.inf if found.x is None else abs(target - samples @ np.round(found.x[:n]))


def _gurobi(target: float, samples: np.ndarray, limit: float) -> float:
    """The same with gurobipy, as published: a relative gap of 0.01."""
    import gurobipy  # pyright: ignore[reportMissingImports]

    model = gurobipy.Model()
    model.Params.OutputFlag, model.Params.MIPGap, model.Params.TimeLimit = 0, 0.01, limit
    x, z = model.addVars(len(samples), vtype="B"), model.addVar()
    total = gurobipy.quicksum(value * x[i] for i, value in enumerate(samples))
    model.addConstr(target - total <= z)
    model.addConstr(total - target <= z)
    model.setObjective(z)
    model.optimize()
    return abs(target - sum(value * round(x[i].X) for i, value in enumerate(samples)))


def _growth(out: Path, repeats: int, device: str) -> None:
    """A CSV and a figure of the seconds a target takes, against n and against the number of targets."""
    rows = []
    for question, (own, options) in QUESTIONS.items():
        by_n = [("n", n, max(8, min(1000, 2 ** (24 - n // 2)))) for n in range(10, 41, 2)]
        for axis, n, count in by_n + [("targets", 21, 10**power) for power in range(6)]:
            targets, samples = (
                _uniform(count, seed=n).to(device),
                _uniform(count if own else 1, n, seed=n + 1).to(device),
            )
            ask = partial(subset_sum, targets, samples if own else samples[0], **options)
            seconds = _median(ask, repeats, device)
            rows.append((question, axis, n, count, seconds, seconds / count))
            print(
                f"{question}: n = {n}, {count} targets: {seconds:.4f} s, {seconds / count:.3g} s a target", flush=True
            )
    out.mkdir(parents=True, exist_ok=True)
    with (out / "growth.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "axis", "n", "targets", "seconds", "seconds_per_target"), *rows])
    _draw(rows, out / "growth.png")


def _draw(rows: list[tuple[str, str, int, int, float, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name, place in ((axes[0], "n", 2), (axes[1], "targets", 3)):
        for question in QUESTIONS:
            points = [(row[place], row[5]) for row in rows if row[:2] == (question, name)]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=question)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].set(xlabel="samples in a set, n", ylabel="seconds a target", title="1000 targets, fewer from n = 30")
    axes[1].set(xlabel="targets", xscale="log", title="n = 21")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def _processor(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    return names[0] if file.exists() and names else platform.processor()


if __name__ == "__main__":
    main()
