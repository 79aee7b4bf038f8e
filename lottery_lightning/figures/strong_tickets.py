"""Figures of strong tickets."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from lottery_callbacks.functional.bounds import malach_corner, pensia_corner, trade_off
from lottery_lightning.figures.drawing import canvas, errorbar, png

Row = dict[str, Any]
EPS = 0.01  # of the theorems' curve and corners


def strong_ticket_figure(cells: Sequence[Sequence[Row]]) -> bytes:
    """Density against overparameterisation beside the theorems; errors, and accuracy, against kept weights.

    The first panel is figure 1 of arXiv 2410.14754 with our tickets on its axes. Its curve (theorem 3) and its ends
    (Malach et al., Pensia et al.) are of a target of as many layers and weights of one width, eps = 0.01, with their
    open constants at 1: they are sufficient sizes for all targets at once.

    Args:
        cells: of each arm the rows of the experiment's `results.csv`, one a trial.
    """
    figure = canvas(16, 5)
    trade, errors, accuracy = figure.subplots(1, 3)
    _draw_theory(trade, cells[0][0])
    for number, cell in enumerate(cells):
        style = {"color": f"C{number % 10}", "marker": "osD^vP*X"[number % 8]}
        name, kept = cell[0]["question"], mean(row["kept_ratio"] for row in cell)
        density = mean(row["density"] for row in cell)
        trade.plot([density], [cell[0]["overparameterisation"]], ls="", label=name, **style)
        errorbar(errors, kept, [row["certified"] for row in cell], **style)
        if cell[0]["found"] is not None:
            errorbar(errors, kept, [row["found"] for row in cell], fillstyle="none", **style)
        errorbar(accuracy, kept, [100 * row["accuracy_minus_target"] for row in cell], **style)
    trade.legend(frameon=False, fontsize=7, loc="lower left")
    trade.set(xscale="log", yscale="log", xlabel="density of the ticket", ylabel="overparameterisation m / m_t")
    errors.set(xscale="log", yscale="log", xlabel="kept, in weights of the target")
    errors.set_ylabel("error on inputs of norm 1 / product of norms\ncertified (full), found by search (open)")
    accuracy.axhline(0, color="grey", lw=0.8)
    accuracy.set(xscale="log", xlabel="kept, in weights of the target", ylabel="test accuracy - the target's (points)")
    for axis in (trade, errors, accuracy):
        axis.grid(alpha=0.25)
    figure.suptitle(f"strong tickets; trials: {len(cells[0])}; mean, bars from min to max")
    return png(figure)


def _draw_theory(axis: Any, row: Row) -> None:
    depth, m_t = row["layers"], row["weights"]
    width = max(1, round((m_t / depth) ** 0.5))
    densities = [0.5 * 10 ** (-step / 4) for step in range(17)]
    sizes = [trade_off(width, depth, EPS, density) for density in densities]
    axis.plot(densities, sizes, color="black", lw=1, label=f"theorem 3, eps = {EPS:g}, constants 1")
    density, size = pensia_corner(m_t, EPS)
    axis.plot([density], [size], ">", color="black", label="Pensia et al.")
    axis.set_xlim(densities[-1], 1)
    density, size = malach_corner(m_t, EPS)  # far beyond: drawn, it would leave no room for all others
    axis.text(
        0.02, 0.98, f"Malach et al.: at {density:.0e}, {size:.0e}", va="top", fontsize=8, transform=axis.transAxes
    )
