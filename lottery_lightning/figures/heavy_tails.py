"""Figure of the heavy tails experiment."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from lottery_lightning.figures.drawing import canvas, errorbar, png

Row = dict[str, Any]
HALF = 0.5  # the ratio at which networks of several widths are compared


def heavy_tails_figure(rows: Sequence[Row]) -> bytes:
    """Compressibility by columns against alpha and the ratio, accuracy after pruning, and error against width.

    Means over trials, bars from least to greatest. The first panel has all networks; the second and third the last
    network, dotted the single weights instead of columns; the fourth, where there are several networks, the relative
    error ||W - W_k|| / ||W|| at half the columns against the width, if that ratio is among the curves'.

    Args:
        rows: a row a run: `network`, `alpha`, `width`, `column_ratio`, `curves`; those without curves have diverged,
            and are not drawn.

    Raises:
        ValueError: none is left.
    """
    rows = [row for row in rows if row["curves"]]
    if not rows:
        raise ValueError("all networks have diverged: there is nothing to draw; choose a smaller scale of noise")
    networks = list(dict.fromkeys(row["network"] for row in rows))
    alphas = list(dict.fromkeys(row["alpha"] for row in rows))
    several = len(networks) > 1 and all(_at(row, HALF) is not None for row in rows)
    figure = canvas(18 if several else 14, 4.6)
    panels = figure.subplots(1, 4 if several else 3)
    against, errors, accuracies = panels[:3]
    for number, network in enumerate(networks):
        style = {"color": f"C{number % 10}", "marker": "osD^vP*X"[number % 8]}
        values = {place: _of(rows, network, alpha) for place, alpha in enumerate(alphas)}
        values = {place: [100 * row["column_ratio"] for row in own] for place, own in values.items() if own}
        for place, some in values.items():
            errorbar(against, place, some, **style)
        against.plot(list(values), [mean(some) for some in values.values()], **style, lw=1.2, label=network)
    against.set_xticks(range(len(alphas)), [_name(alpha) for alpha in alphas])
    against.set(xlabel="noise", ylabel="columns pruned at the budget of error (%)")
    for number, alpha in enumerate(alphas):
        own, style = _of(rows, networks[-1], alpha), {"color": f"C{number % 10}"}
        for by, dash in (("column", "-"), ("magnitude", ":")) if own else ():
            curves = [[point for point in row["curves"] if point["by"] == by] for row in own]
            ratios = [100 * point["ratio"] for point in curves[0]]
            label = _name(alpha) if by == "column" else None
            for axis, key in ((errors, "error"), (accuracies, "test_acc")):
                middle = [mean(100 * curve[place][key] for curve in curves) for place in range(len(ratios))]
                axis.plot(ratios, middle, dash, **style, lw=1.4, label=label)
    errors.set(xlabel=f"removed of each layer of {networks[-1]} (%)", ylabel="squared relative error (%)")
    accuracies.set(xlabel="removed of each layer (%)", ylabel="test accuracy, no retraining (%)")
    if several:
        wide = panels[3]
        for number, alpha in enumerate(alphas):
            style = {"color": f"C{number % 10}", "marker": "osD^vP*X"[number % 8]}
            found: dict[int, list[float]] = {}
            for row in rows:
                if row["alpha"] == alpha:
                    found.setdefault(row["width"], []).append(100 * (_at(row, HALF) or 0.0) ** 0.5)
            for width, some in sorted(found.items()):
                errorbar(wide, width, some, **style)
            wide.plot(sorted(found), [mean(found[width]) for width in sorted(found)], **style, label=_name(alpha))
        widths = sorted({row["width"] for row in rows})
        wide.set_xscale("log")
        wide.set_xticks(widths, [f"{width:,}" for width in widths])
        wide.set_xticks([], minor=True)
        wide.set(xlabel="width", ylabel=f"relative error, {100 * HALF:.0f} % of columns removed (%)")
    for axis in panels:
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    trials = len({row["trial"] for row in rows})
    figure.suptitle(f"networks trained with alpha-stable noise, trials: {trials}; lines of columns, dotted of weights")
    return png(figure)


def _of(rows: Sequence[Row], network: str, alpha: float | None) -> list[Row]:
    return [row for row in rows if (row["network"], row["alpha"]) == (network, alpha)]


def _at(row: Row, ratio: float) -> float | None:
    """The squared error of columns at the ratio; None where it was not asked for."""
    points = {point["ratio"]: point["error"] for point in row["curves"] if point["by"] == "column"}
    return points.get(ratio)


def _name(alpha: float | None) -> str:
    return "none" if alpha is None else f"{alpha:g}"
