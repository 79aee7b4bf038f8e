"""Figures of the subset sum experiments."""

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from lottery_callbacks.functional.bounds import counting_size, rfss_size
from lottery_lightning.figures.drawing import canvas, errorbar, png

Row = dict[str, Any]


def subset_sum_figure(successes: Sequence[Row], errors: Sequence[Row]) -> bytes:
    """Success against n, a panel for each size, a colour for each eps; and the median error against n of all sizes.

    Rows are those of `success.csv` and `errors.csv`. Targets are uniform (line, band of the 95 % interval) or 0 (thin
    and dotted). Vertical lines of an eps' colour: n_c dashed, theorem 2's n with c_hyp = 1 dash-dotted.
    """
    sizes = sorted({row["size"] for row in successes if row["size"] != "any"})
    levels = sorted({row["eps"] for row in successes}, reverse=True)
    high = math.ceil((len(sizes) + 1) / 3)
    figure = canvas(14, 3.8 * high)
    panels = figure.subplots(high, 3, squeeze=False).flatten()
    for axis, size in zip(panels, sizes, strict=False):
        for number, eps in enumerate(levels):
            colour, some = f"C{number}", [row for row in successes if (row["size"], row["eps"]) == (size, eps)]
            _draw_success(axis, some, colour, f"eps = {eps:g}")
            axis.axvline(counting_size(size, eps), color=colour, ls="--", lw=0.8)
            axis.axvline(rfss_size(size, eps), color=colour, ls="-.", lw=0.8)
        ns = [row["n"] for row in successes if row["size"] == size]
        axis.set(xlim=(min(ns) - 0.5, max(ns) + 0.5), ylim=(-0.02, 1.02), xlabel="samples n", title=f"k = {size}")
        axis.set_ylabel("success: nearest sum within eps")
        axis.grid(alpha=0.25)
    panels[len(sizes) - 1].legend(frameon=False, fontsize=9, loc="center right")
    _draw_errors(panels[len(sizes)], errors, ["any", *sizes])
    for axis in panels[len(sizes) + 1 :]:
        axis.remove()
    trials = successes[0]["trials"]
    figure.suptitle(
        f"{trials:,} trials a point, bands of 95 %; targets uniform (lines) and 0 (thin, dotted); "
        "vertical, dashed: n_c, C(n, k) >= sqrt(k) / eps; dash-dotted: theorem 2, c_hyp = 1"
    )
    return png(figure)


def _draw_success(axis: Any, rows: Sequence[Row], colour: str, name: str) -> None:
    for target, style, width in (("uniform", "-", 1.5), ("zero", ":", 1.2)):
        points = sorted((r["n"], r["success"], r["low"], r["high"]) for r in rows if r["target"] == target)
        if points:
            n, rate, low, high = zip(*points, strict=True)
            axis.plot(n, rate, color=colour, ls=style, lw=width, label=name if target == "uniform" else None)
            axis.fill_between(n, low, high, color=colour, alpha=0.2, lw=0)


def _draw_errors(axis: Any, rows: Sequence[Row], sizes: Sequence[int | str]) -> None:
    from matplotlib import colormaps

    for number, size in enumerate(sizes):
        some = [row for row in rows if (row["size"], row["target"]) == (size, "uniform")]
        if not some:
            continue
        n, colour = [row["n"] for row in some], colormaps["viridis"](0.9 * number / len(sizes))
        name = "any size" if size == "any" else f"k = {size}"
        axis.plot(n, [row["median_error"] for row in some], color=colour, marker="o", ms=2.5, label=name)
        axis.plot(n, [row["error_90"] for row in some], color=colour, ls=":", lw=0.9)
        if size == "any":
            axis.plot(n, [2.0**-number for number in n], color="grey", ls="--", lw=0.9, label="2^-n")
    axis.plot([], [], color="grey", ls=":", lw=0.9, label="90th percentile")
    axis.set(yscale="log", xlabel="samples n", ylabel="median error of the nearest sum", title="uniform targets")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)


def network_figure(cells: Sequence[Sequence[Row]], n: int) -> bytes:
    """Errors and kept weights by question, and accuracy against kept weights; means over trials, bars min to max.

    Args:
        cells: of each question the rows of the experiment's `results.csv`, one a trial.
        n: samples of a set.
    """
    figure = canvas(15, 4.6)
    errors, kept, accuracy = figure.subplots(1, 3)
    names = [cell[0]["question"] for cell in cells]
    for place, cell in enumerate(cells):
        errorbar(errors, place, [row["median_error"] for row in cell], color="C0", marker="o")
        errorbar(errors, place, [row["max_error"] for row in cell], color="C1", marker="^")
        errorbar(kept, place, [row["kept_ratio"] for row in cell], color="C0", marker="o")
    for axis in (errors, kept):
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axis.grid(alpha=0.25)
    errors.set_yscale("symlog", linthresh=1e-7)  # half of the control's weights may have no error at all
    kept.set_yscale("log")
    errors.plot([], [], "o", color="C0", label="median")
    errors.plot([], [], "^", color="C1", label="largest")
    errors.legend(frameon=False)
    errors.set_ylabel("error of a weight")
    kept.set_ylabel(f"kept, in weights of the target (samples: {n})")
    groups = {
        "any": "any size",
        "size": "fixed size k",
        "smallest": "smallest",
        "magnitude": "control: magnitude pruning",
    }
    for number, (arm, name) in enumerate(groups.items()):
        style = {"color": f"C{number}", "marker": "*os^"[number]}
        for cell in cells:
            if cell[0]["name"] == arm:
                values = [100 * row["accuracy_minus_target"] for row in cell]
                errorbar(accuracy, mean(row["kept_ratio"] for row in cell), values, **style)
        accuracy.plot([], [], ls="", **style, label=name)
    accuracy.axhline(0, color="grey", lw=0.8)
    accuracy.set_yscale("symlog", linthresh=1)  # one sample a weight loses ten points and more
    accuracy.yaxis.set_major_formatter("{x:g}")
    accuracy.set(xscale="log", xlabel="kept, in weights of the target", ylabel="test accuracy - the target's (points)")
    accuracy.grid(alpha=0.25)
    accuracy.legend(frameon=False, fontsize=8)
    trials = len(cells[0])
    figure.suptitle(f"weights as sums of n = {n} samples; trials: {trials}; mean, bars from min to max")
    return png(figure)
