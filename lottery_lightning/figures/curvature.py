"""Figure of the curvature of networks."""

from collections.abc import Sequence
from typing import Any

from lottery_lightning.figures.drawing import canvas, errorbar, png

Row = dict[str, Any]


def curvature_figure(rows: Sequence[Row]) -> bytes:
    """The diagonal's distribution and the spectral density of each network, and the trace of all trials.

    Left: parts of the diagonal's entries by size, those below 0 dotted; a dash at the top is the median standard error
    of an entry: what is smaller is noise of the estimate. Middle: spectral density, logarithmic. Both of trial 0.
    Right: trace and largest eigenvalue, means over trials with bars from least to greatest.

    Args:
        rows: a row a network and trial, as in `geometry_measures.curvature_of`, with its `name` and `trial`.
    """
    figure = canvas(15, 4.6)
    entries, density, ends = figure.subplots(1, 3)
    names = list(dict.fromkeys(row["name"] for row in rows))
    for number, name in enumerate(names):
        own = [row for row in rows if row["name"] == name]
        style, first = {"color": f"C{number % 10}"}, own[0]
        histogram = first["histogram"]
        middles = [(low + high) / 2 for low, high in zip(histogram["edges"], histogram["edges"][1:], strict=False)]
        label = f"{name}, {100 * first['density']:.3g} %"
        for sign, dash in (("positive", "-"), ("negative", ":")):
            heights = [100 * height for height in histogram[sign]]
            entries.plot([10**m for m in middles], heights, dash, **style, label=label if dash == "-" else None, lw=1.4)
        if first["diagonal_error"] > 0:
            entries.axvline(first["diagonal_error"], ymin=0.94, **style, lw=2)
        spectrum = first["spectrum"]
        density.semilogy(spectrum["grid"], spectrum["values"], **style, label=label, lw=1.4)
        for offset, key, marker in ((-0.1, "trace", "o"), (0.1, "largest", "^")):
            errorbar(ends, number + offset, [row[key] for row in own], **style, marker=marker)
    entries.set(xscale="log", xlabel="|entry of the diagonal| (dotted: below 0)", ylabel="% of kept weights, a bin")
    occupied = [value for row in rows for value in _occupied(row["histogram"])]
    entries.set_xlim(min(occupied), max(occupied))
    kind = "Hessian" if rows[0]["kind"] == "hessian" else "Gauss-Newton matrix"
    density.set(xlabel=f"eigenvalue of the {kind}", ylabel="spectral density")
    top = max(value for row in rows for value in row["spectrum"]["values"])
    density.set_ylim(top * 1e-9, top * 3)
    density.set_xscale("symlog", linthresh=max(row["spectrum"]["width"] for row in rows))
    ends.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    ends.set(ylabel=f"trace (o) and largest eigenvalue (^) of the {kind}")
    if min(row[key] for row in rows for key in ("trace", "largest")) > 0:
        ends.set_yscale("log")
    else:
        ends.set_yscale("symlog", linthresh=max(abs(row["trace"]) for row in rows) / 100)
    for axis in (entries, density, ends):
        axis.grid(alpha=0.25)
    entries.legend(frameon=False)
    figure.suptitle(f"curvature of the training loss over {rows[0]['examples']:,} examples, on kept weights")
    return png(figure)


def _occupied(histogram: Row) -> list[float]:
    """The ends of the range in which a bin holds a thousandth or more."""
    edges = histogram["edges"]
    held = [i for sign in ("positive", "negative") for i, part in enumerate(histogram[sign]) if part >= 1e-3]
    return [10 ** edges[min(held)], 10 ** edges[max(held) + 1]] if held else [10 ** edges[0], 10 ** edges[-1]]
