"""Figures of the lottery ticket experiment."""

import math
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lottery_callbacks import Ticket
from lottery_callbacks.functional import masks as M
from lottery_lightning.figures.drawing import canvas, png

# label, colour, marker, line, and a factor on x that keeps the bars of the arms apart
STYLE = {
    "ticket": ("winning ticket", "tab:blue", "o", "-", 1.0),
    "reinit": ("random reinitialisation", "tab:orange", "s", "--", 1.03),
    "layerwise_random": ("layerwise random mask", "tab:green", "^", ":", 0.97),
    "global_random": ("global random mask", "tab:purple", "v", (0, (1, 3)), 0.985),
    "one_shot": ("one-shot", "tab:red", "D", "-.", 1.015),
}
PANELS = (
    ("test_acc_early_stop", "test accuracy at the early stop (%)", 100),
    ("test_acc_end", "test accuracy at the end (%)", 100),
    ("early_stop_iteration", "early-stop iteration", 1),
)


def lottery_figure(rows: Sequence[dict[str, Any]], max_steps: int) -> bytes:
    """Accuracy and early-stop iteration against density (log axis), one line an arm, bars from min to max.

    Rows are those of `results.csv`; the dense network's mean is a thin horizontal line.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = canvas(15, 4.6)
    trials = len({row["trial"] for row in rows})
    axes = figure.subplots(1, len(PANELS))
    for axis, (key, label, scale) in zip(axes, PANELS, strict=True):
        for arm, (name, colour, marker, style, shift) in STYLE.items():
            levels = sorted({row["level"] for row in rows if row["arm"] == arm})
            if not levels:
                continue
            cells = [[row for row in rows if row["arm"] == arm and row["level"] == level] for level in levels]
            x = [100 * shift * cell[0]["density"] for cell in cells]
            values = [[scale * row[key] for row in cell] for cell in cells]
            middle = [mean(v) for v in values]
            bars = [
                [m - min(v) for m, v in zip(middle, values, strict=True)],
                [max(v) - m for m, v in zip(middle, values, strict=True)],
            ]
            axis.errorbar(x, middle, bars, label=name, color=colour, marker=marker, ls=style, ms=4, lw=1.4, capsize=2)
        dense = mean(scale * row[key] for row in rows if row["level"] == 0)
        axis.axhline(dense, color="grey", lw=0.8, zorder=0)
        axis.set_xscale("log")
        axis.invert_xaxis()
        ticks = sorted({round(100 * row["density"], 1) for row in rows}, reverse=True)
        ticks = ticks[:: 2 if len(ticks) > 8 else 1]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("density: weights kept (%)")
        axis.set_ylabel(label)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, loc="lower left")
    figure.suptitle(f"{max_steps:,} iterations a level; trials: {trials}; mean, bars from min to max; grey: dense")
    return png(figure)


def mask_figure(tickets: Iterable[tuple[int, Ticket]], maps: int = 4) -> bytes:
    """Where tickets keep their weights: density per layer against level, and maps of the first layer.

    Left, one colour a layer (of many, every n-th is named) and one line a trial, density on a log axis. Right,
    `kept_map` of the first pruned layer at up to `maps` levels of one trial, in even steps up to the last.

    Args:
        tickets: (trial, ticket); read one at a time, so that a generator keeps one of them in memory.
        maps: how many maps are drawn at most; they are of the first trial given.

    Raises:
        ValueError: there are no tickets.
    """
    densities: dict[str, dict[int, dict[int, float]]] = {}  # layer -> trial -> level -> density
    first: dict[int, Tensor] = {}  # level -> mask of the first layer
    shown = None
    for trial, ticket in tickets:
        kept = M.kept(ticket.masks)
        for name, mask in ticket.masks.items():
            densities.setdefault(name, {}).setdefault(trial, {})[ticket.level] = kept[name] / mask.numel()
        if shown in (None, trial):
            shown, first[ticket.level] = trial, next(iter(ticket.masks.values()))
    if not first:
        raise ValueError("there are no tickets to draw: give those of a run's tickets/ folder")
    levels = _spread(sorted(first), maps)
    figure = canvas(6 + 3 * len(levels), 4.6)
    lines, *images = figure.subplots(1, 1 + len(levels), width_ratios=[2, *([1] * len(levels))])
    _draw_densities(lines, densities)
    for axis, level in zip(images, levels, strict=True):
        _draw_map(axis, first[level])
        axis.set_title(f"level {level}: {100 * first[level].float().mean():.3g} % kept", fontsize=10)
    layer, trials = next(iter(densities.items()))
    figure.suptitle(f"trials: {len(trials)}; maps: where {layer} keeps its weights in trial {shown}")
    return png(figure)


def kept_map(mask: Tensor, most: int = 150) -> Tensor:
    """The kept fraction of a layer's weights as an image, float in [0, 1].

    A dense layer that reads square images of c = 1 or 3 channels, (units, c * s * s), gives (s, s): of all weights
    that read a pixel, the fraction kept. Any other layer gives its bitmap, (units, all else flattened), averaged over
    blocks so that no side is above `most`.
    """
    bits = mask.reshape(mask.shape[0], -1).float()
    if side := _side(mask):
        return bits.view(-1, side, side).mean(0)
    size = (min(bits.shape[0], most), min(bits.shape[1], most))
    return torch.nn.functional.adaptive_avg_pool2d(bits[None], size)[0]


def _side(mask: Tensor) -> int | None:
    """The side of the square images that a dense layer reads, if their number of values is one."""
    sides = {channels: math.isqrt(mask[0].numel() // channels) for channels in (1, 3)}
    square = [side for channels, side in sides.items() if channels * side * side == mask[0].numel()]
    return square[0] if square and mask.ndim == 2 else None


def _spread(levels: Sequence[int], count: int) -> list[int]:
    """At most `count` levels in even steps up to the last; the dense one only where there is no other."""
    pruned = levels[1:] or levels
    return sorted({pruned[math.ceil(len(pruned) * part / count) - 1] for part in range(1, count + 1)})


def _draw_densities(axis: Any, densities: dict[str, dict[int, dict[int, float]]]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    every = math.ceil(len(densities) / 10)  # layers a name in the legend
    for number, (layer, trials) in enumerate(densities.items()):
        colour = f"C{number}" if every == 1 else colormaps["viridis"](number / (len(densities) - 1))
        for place, levels in enumerate(trials.values()):
            x = sorted(levels)
            label = layer if place == 0 and number % every == 0 else None
            style = ("-", "--", ":")[number % 3]  # of layers of equal density each is seen
            axis.plot(x, [100 * levels[level] for level in x], style, color=colour, marker="o", ms=3, label=label)
    values = [value for trials in densities.values() for levels in trials.values() for value in levels.values()]
    lowest = min((value for value in values if value), default=1.0)  # a log axis leaves out a layer that is empty
    axis.set_yscale("log")
    margin = 1.02 * lowest**-0.05
    axis.set_ylim(100 * lowest / margin, 100 * margin)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if lowest < 0.2 else range(1, 10)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlim(
        -0.5, max(level for trials in densities.values() for levels in trials.values() for level in levels) + 0.5
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel("level")
    axis.set_ylabel("density of the layer: weights kept (%)")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="lower left", fontsize=8)


def _draw_map(axis: Any, mask: Tensor) -> None:
    side = _side(mask)
    picture = 100 * kept_map(mask)
    aspect = "equal" if side else "auto"
    extent = (0, side or mask[0].numel(), side or mask.shape[0], 0)
    image = axis.imshow(picture.numpy(), cmap="magma", vmin=0, aspect=aspect, interpolation="nearest", extent=extent)
    axis.set_xlabel("pixel column" if side else "weight of the unit")
    axis.set_ylabel("pixel row" if side else "unit")
    axis.figure.colorbar(image, ax=axis, location="bottom", shrink=0.9, label="weights kept (%)")
