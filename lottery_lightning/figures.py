"""Figures from finished runs; each function gives the bytes of a PNG."""

import io
from collections.abc import Sequence
from statistics import mean
from typing import Any

# label, colour, marker, line, and a factor on x that keeps the bars of the arms apart
STYLE = {
    "ticket": ("winning ticket", "tab:blue", "o", "-", 1.0),
    "reinit": ("random reinitialisation", "tab:orange", "s", "--", 1.03),
    "random": ("random mask", "tab:green", "^", ":", 0.97),
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
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
        ticks = sorted({round(100 * row["density"], 1) for row in rows}, reverse=True)[::2]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("density: weights kept (%)")
        axis.set_ylabel(label)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, loc="lower left")
    figure.suptitle(f"{max_steps:,} iterations a level; trials: {trials}; mean, bars from min to max; grey: dense")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
