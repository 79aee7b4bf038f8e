"""Figures of the distilled pruning experiment."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from lottery_lightning.figures.drawing import canvas, png

Row = dict[str, Any]
MARKERS = "osD^vP*X"
PANELS = (
    ("test_acc", "test accuracy on real data (%)"),
    ("instability", "instability (points of test error)"),
)


def distilled_pruning_figure(found: Sequence[Row]) -> bytes:
    """Accuracy and instability on real data, and the training points of finding the ticket, against density.

    Means over copies or pairs of all trials, bars from min to max; grey: the dense network, with its range. Points are
    those trained on (decoded), dotted the stored ones where they are fewer.

    Args:
        found: a row a route and level: `route`, `level`, `density`, `test_acc`, `instability`, each with `_min` and
            `_max`, and, of what was found by training, `decoded_points` and `stored_points`.
    """
    figure = canvas(15, 4.6)
    axes = figure.subplots(1, 3)
    tickets, dense = [cell for cell in found if cell["level"]], found[0]
    routes = list(dict.fromkeys(cell["route"] for cell in tickets))
    for number, route in enumerate(routes):
        own = [cell for cell in tickets if cell["route"] == route]
        shift = 1 + 0.02 * (number - (len(routes) - 1) / 2)  # keeps bars apart
        x = [100 * shift * cell["density"] for cell in own]
        style = {"color": f"C{number}", "marker": MARKERS[number % 8], "ms": 5, "lw": 1.4}
        for axis, (key, _) in zip(axes, PANELS, strict=False):
            middle = [100 * cell[key] for cell in own]
            low = [100 * (cell[key] - cell[f"{key}_min"]) for cell in own]
            high = [100 * (cell[f"{key}_max"] - cell[key]) for cell in own]
            axis.errorbar(x, middle, [low, high], capsize=2, label=route, **style)
        if "decoded_points" in own[0]:
            axes[2].plot(x, [cell["decoded_points"] for cell in own], label=route, **style)
            if any(cell["stored_points"] < cell["decoded_points"] for cell in own):
                stored = [cell["stored_points"] for cell in own]
                axes[2].plot(x, stored, ls=":", label=f"{route}, stored", **style)
    for axis, (key, label) in zip(axes, PANELS, strict=False):
        axis.axhline(100 * dense[key], color="grey", lw=0.8, zorder=0, label="dense")
        axis.axhspan(100 * dense[f"{key}_min"], 100 * dense[f"{key}_max"], color="grey", alpha=0.15, lw=0, zorder=0)
        axis.set_ylabel(label)
    axes[1].axhline(2, color="grey", ls="--", lw=1)
    axes[2].set(yscale="log", ylabel="training points to find the ticket")
    ticks = sorted({round(100 * cell["density"], 1) for cell in tickets}, reverse=True)
    for axis in axes:
        axis.set_xscale("log")
        axis.invert_xaxis()
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("density: weights kept (%)")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    told = f"trials: {dense['trials']}, copies: {dense['copies']}, pairs: {dense['pairs']}"
    figure.suptitle(f"tickets trained on real data; {told}; means, bars and band from min to max; dashed: 2 points")
    return png(figure)


def distilled_lines_figure(rows: Sequence[Row]) -> bytes:
    """Mean test error along the lines between copies, a panel a level, a line a route; grey: the dense network.

    Args:
        rows: a row a pair of copies: `route`, `level`, `density`, and `lines` by name.
    """
    levels = sorted({row["level"] for row in rows} - {0})
    routes = list(dict.fromkeys(row["route"] for row in rows if row["level"]))
    figure = canvas(1 + 5 * len(levels), 4.6)
    for axis, level in zip(figure.subplots(1, len(levels), squeeze=False, sharey=True)[0], levels, strict=True):
        own = [row for row in rows if row["level"] == level]
        for name in (None, *routes):
            lines = [
                row["lines"]["plain"]
                for row in (own if name else rows)
                if (row["route"] == name if name else not row["level"])
            ]
            errors = [100 * mean(at) for at in zip(*(line.errors for line in lines), strict=True)]
            number = routes.index(name) if name else 0
            style = {"color": f"C{number}", "marker": MARKERS[number % 8], "ms": 4} if name else {"color": "grey"}
            axis.plot(lines[0].t, errors, lw=1.4, label=name or "dense", **style)
        axis.set(title=f"{100 * own[0]['density']:.3g} % of the weights", xlabel="t: 0 is one copy, 1 the other")
        axis.set_ylabel("test error (%)")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle("between copies that differ in SGD's noise on real data; means over pairs and trials")
    return png(figure)
