"""Figure of the edge-popup experiment."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from lottery_lightning.figures.drawing import canvas, png

Row = dict[str, Any]


def edge_popup_figure(cells: Sequence[Sequence[Row]]) -> bytes:
    """Test accuracy at the end against density, and against the number of kept weights (log axis).

    One line for each network and weights, bars from min to max; the trained dense network is a grey line in a band from
    min to max, and a mark at its own number of weights.

    Args:
        cells: of each arm the rows of the experiment's `results.csv`, one a trial; by ascending sparsity.
    """
    figure = canvas(13, 4.8)
    by_density, by_count = figure.subplots(1, 2, sharey=True)
    lines = list(dict.fromkeys((cell[0]["network"], cell[0]["weights"]) for cell in cells))
    for axis, key, scale in ((by_density, "density", 100), (by_count, "kept", 1)):
        searches = [line for line in lines if line[1] != "trained"]
        for number, line in enumerate(searches):
            own = [cell for cell in cells if (cell[0]["network"], cell[0]["weights"]) == line]
            style = {"color": f"C{number % 10}", "marker": "osD^vP*X"[number % 8], "ls": ("-", "--", ":")[number % 3]}
            _draw_line(axis, own, key, scale, label=", ".join(line), **style)
        for cell in cells:
            if cell[0]["weights"] == "trained":
                _draw_dense(axis, cell, key, scale)
        axis.grid(alpha=0.25)
    by_density.set(xlabel="density: weights kept (%)", ylabel="test accuracy at the end (%)", xlim=(0, 102))
    by_density.legend(frameon=False)
    by_count.set(xscale="log", xlabel="number of weights kept")
    figure.suptitle(f"random networks pruned by edge-popup; trials: {len(cells[0])}; mean, bars from min to max")
    return png(figure)


def _draw_line(axis: Any, cells: Sequence[Sequence[Row]], key: str, scale: float, **style: Any) -> None:
    values = [[100 * row["test_acc_end"] for row in cell] for cell in cells]
    middle = [mean(some) for some in values]
    bars = [
        [m - min(some) for m, some in zip(middle, values, strict=True)],
        [max(some) - m for m, some in zip(middle, values, strict=True)],
    ]
    x = [scale * mean(row[key] for row in cell) for cell in cells]
    axis.errorbar(x, middle, bars, ms=4, lw=1.4, capsize=2, **style)


def _draw_dense(axis: Any, cell: Sequence[Row], key: str, scale: float) -> None:
    accuracies = [100 * row["test_acc_end"] for row in cell]
    axis.axhspan(min(accuracies), max(accuracies), color="grey", alpha=0.2, lw=0, zorder=0)
    axis.axhline(mean(accuracies), color="grey", lw=0.8, zorder=0)
    axis.plot([scale * cell[0][key]], [mean(accuracies)], "*", color="grey", ms=9, label="trained, dense")
