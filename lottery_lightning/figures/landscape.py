"""Figures of loss landscapes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lottery_callbacks.functional.landscape import Surface
from lottery_lightning.figures.drawing import canvas, png

What = Literal["loss", "error"]
Surfaces = Mapping[str, Surface]
COLOURS = "viridis"
BANDS = 24
WIDE = 20  # a greater ratio of the highest to the lowest is drawn in logarithms
DECADES = 5  # what is so far below the highest looks alike


def landscape_figure(surfaces: Surfaces, names: Sequence[str] = (), what: What = "loss") -> bytes:
    """Filled contours of each surface, side by side in one scale of colours, with the networks marked.

    The scale is logarithmic where the highest value is more than 20 times the lowest, then of five decades at most.
    Grey is where a network gives no number. The title names the statistics of batch norm.

    Args:
        surfaces: of `functional.landscape.surface`, by title.
        names: of the networks, in the order of each surface's `points`; those without one are numbered.
        what: "loss", or "error" (%).

    Raises:
        ValueError: no surface has a value that is a number.
    """
    scale = _Scale(surfaces, what)
    figure, panels = _panels(surfaces, scale, 4.4, 4.4)
    filled: Any = None
    for axis, surface in zip(panels, surfaces.values(), strict=True):
        values = scale.grid(surface)
        filled = axis.contourf(surface.xs, surface.ys, values, scale.levels, cmap=COLOURS, norm=scale.norm)
        axis.contour(surface.xs, surface.ys, values, scale.levels[::3], colors="white", linewidths=0.5, alpha=0.5)
        for name, x, y, _ in scale.networks(surface, names):
            axis.plot([x], [y], "o", color="white", mec="black", ms=7)
            axis.annotate(name, (x, y), (0, 8), textcoords="offset points", ha="center", **_outlined())
        axis.set(facecolor="lightgrey", aspect="equal")
    _colour_bar(figure, panels, scale, filled)
    return png(figure)


def relief_figure(surfaces: Surfaces, names: Sequence[str] = (), what: What = "loss") -> bytes:
    """The same in three dimensions: heights and colours are the values, and contours of them lie on the ground.

    A line joins each network, at its own height, and the ground; a network is seen through what lies before it. What is
    no number is a hole, and a network on the ground.

    Args:
        surfaces: as of `landscape_figure`, and `names` and `what` too.
        names: likewise.
        what: likewise.

    Raises:
        ValueError: no surface has a value that is a number.
    """
    from matplotlib.cm import ScalarMappable

    scale = _Scale(surfaces, what)
    figure, panels = _panels(surfaces, scale, 5.2, 4.8, projection="3d", computed_zorder=False)
    bottom, top = scale.heights(scale.levels[[0, -1]])
    ground, style = bottom - 0.4 * (top - bottom), {"cmap": COLOURS, "vmin": bottom, "vmax": top}
    for axis, surface in zip(panels, surfaces.values(), strict=True):
        x, y = np.meshgrid(surface.xs, surface.ys)
        heights = scale.heights(scale.grid(surface))
        axis.contourf(x, y, heights, scale.heights(scale.levels), **style, zdir="z", offset=ground, alpha=0.6, zorder=0)
        axis.plot_surface(x, y, heights.filled(np.nan), **style, rstride=1, cstride=1, lw=0.2, edgecolor="#00000030")
        for name, *at, value in scale.networks(surface, names):
            place = [[coordinate] for coordinate in at]
            height = float(scale.heights(np.array(value))) if math.isfinite(value) else ground
            axis.plot(place[0] * 2, place[1] * 2, [ground, height], color="black", lw=0.8, zorder=5)
            axis.plot(*place, [height], "o", color="white", mec="black", ms=6, zorder=6)
            axis.text(*at, height + 0.07 * (top - bottom), name, ha="center", zorder=7, **_outlined())
        axis.set(zlim=(ground, top))  # what heights are is at the bar of colours
        axis.set_zticks(scale.heights(np.array(scale.ticks)), [f"{tick:.9g}" for tick in scale.ticks])
        axis.view_init(elev=32, azim=-58)
    _colour_bar(figure, panels, scale, ScalarMappable(scale.norm, COLOURS), shrink=0.7)
    return png(figure)


class _Scale:
    """One scale of values for all surfaces.

    Attributes:
        logarithmic: whether it is.
        levels: BANDS + 1, from the lowest value that it tells apart to the highest.
        norm: of matplotlib.
        ticks: round values within.
        label: what the values are.
    """

    def __init__(self, surfaces: Surfaces, what: What) -> None:
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.ticker import MaxNLocator

        self.what, self.lowest = what, -math.inf
        networks = [value for surface in surfaces.values() for *_, value in self.networks(surface, ())]
        values = np.concatenate([networks, *(self.grid(surface).compressed() for surface in surfaces.values())])
        values = values[np.isfinite(values)]
        if not len(values):
            raise ValueError(f"no {what} of these surfaces is a number: there is nothing to draw")
        low, high = float(values.min()), float(values.max())
        self.logarithmic = low >= 0 and high > WIDE * low
        if self.logarithmic:
            low = self.lowest = max(low, high / 10**DECADES)
        elif low == high:  # a plain has a colour too
            low, high = low - 0.5, high + 0.5
        self.levels = (np.geomspace if self.logarithmic else np.linspace)(low, high, BANDS + 1)
        self.norm: Any = (LogNorm if self.logarithmic else Normalize)(low, high)
        round_ones = MaxNLocator(6).tick_values(low, high)
        if self.logarithmic:
            steps = (1, 2, 5) if high < 1000 * low else (1,)
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            round_ones = [step * 10.0**decade for decade in decades for step in steps]
        self.ticks = [float(tick) for tick in round_ones if low <= tick <= high]
        self.label = "loss" if what == "loss" else "error (%)"

    def grid(self, surface: Surface) -> Any:
        """What is drawn of the surface: a row for each y, masked where it is no number."""
        values = np.array(surface.losses) if self.what == "loss" else 100 * np.array(surface.errors)
        return np.ma.masked_invalid(np.maximum(values, self.lowest))

    def networks(self, surface: Surface, names: Sequence[str]) -> Iterator[tuple[str, float, float, float]]:
        """Name, x, y and value of each."""
        for number, (x, y, loss, error) in enumerate(surface.points):
            value = loss if self.what == "loss" else 100 * error
            yield names[number] if number < len(names) else str(number + 1), x, y, max(value, self.lowest)

    def heights(self, values: Any) -> Any:
        return np.ma.log10(values) if self.logarithmic else values


def _panels(surfaces: Surfaces, scale: _Scale, width: float, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure with an axis for each surface, three in a row at most."""
    rows = math.ceil(len(surfaces) / 3)
    columns = math.ceil(len(surfaces) / rows)
    figure = canvas(width * columns + 1.2, height * rows + 0.4)
    panels = []
    for number, (title, surface) in enumerate(surfaces.items(), start=1):
        axis = figure.add_subplot(rows, columns, number, **options)
        axis.set(title=title, xlabel=f"x ({surface.unit})", ylabel=f"y ({surface.unit})")
        axis.locator_params(nbins=5)
        panels.append(axis)
    norms = ", ".join(dict.fromkeys(surface.norms for surface in surfaces.values()))
    figure.suptitle(f"{scale.label} on planes of networks; statistics of batch norm: {norms}")
    return figure, panels


def _colour_bar(figure: Any, panels: list[Any], scale: _Scale, drawn: Any, shrink: float = 1.0) -> None:
    aspect = 5 * shrink * figure.get_figheight()
    bar = figure.colorbar(drawn, ax=panels, ticks=scale.ticks, format="%.9g", shrink=shrink, aspect=aspect)
    bar.set_label(scale.label)
    bar.minorticks_off()


def _outlined() -> dict[str, Any]:
    """Black letters with a white rim, to be read on any colour."""
    from matplotlib.patheffects import withStroke

    return {"color": "black", "path_effects": [withStroke(linewidth=2.5, foreground="white")]}
