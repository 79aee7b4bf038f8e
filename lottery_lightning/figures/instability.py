"""Figure of the instability experiment."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from lottery_callbacks.functional.interpolation import Line
from lottery_lightning.figures.drawing import canvas, errorbar, png

Row = dict[str, Any]
Key = tuple[str, float, int, str]
KINDS = {"plain": ("-", ""), "aligned": (":", ", matched")}


def instability_figure(rows: Sequence[Row]) -> bytes:
    """Instability against the step k (log axis from the first k > 0 on), and the error along the lines.

    Left: means over pairs, bars from min to max, dashed the 2 % below which a network is stable. Right: the mean error
    at each t, of each network and step. Dotted: after weight matching.

    Args:
        rows: a row a pair of copies: its `network`, `density`, `k`, and `lines` by name.
    """
    figure = canvas(13, 4.8)
    against, along = figure.subplots(1, 2)
    groups = _groups(rows)
    networks = list(dict.fromkeys((network, density) for network, density, *_ in groups))
    steps = sorted({k for *_, k, _ in groups})
    for number, (network, density) in enumerate(networks):
        style = {"color": f"C{number % 10}", "marker": "osD^vP*X"[number % 8]}
        for kind, (dash, told) in KINDS.items():
            own = {k: groups[network, density, k, kind] for k in steps if (network, density, k, kind) in groups}
            values = {k: [100 * line.instability for line in lines] for k, lines in sorted(own.items())}
            for k, some in values.items():
                errorbar(against, k, some, **style)
            if values:
                label = f"{network}, {100 * density:.3g} %{told}"
                against.plot(list(values), [mean(some) for some in values.values()], dash, **style, label=label)
            for k, lines in own.items():
                shade = {"color": style["color"], "alpha": 0.35 + 0.65 * (steps.index(k) + 1) / len(steps)}
                errors = [100 * mean(at) for at in zip(*(line.errors for line in lines), strict=True)]
                along.plot(lines[0].t, errors, dash, **shade, lw=1.4, label=f"{network}, k = {k:,}{told}")
    against.axhline(2, color="grey", ls="--", lw=1)
    if steps[-1] > 0:
        against.set_xscale("symlog", linthresh=next(k for k in steps if k))
        against.set_xticks(steps, [f"{k:,}" for k in steps], minor=False)
        against.set_xticks([], minor=True)
    against.set(xlabel="k: the step that copies start from", ylabel="instability (points of test error)")
    along.set(xlabel="t: 0 is one copy, 1 the other", ylabel="test error (%)")
    for axis in (against, along):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    norms = rows[0]["lines"]["plain"].norms
    pairs = len(next(iter(groups.values())))
    figure.suptitle(f"copies that differ in SGD's noise, pairs: {pairs}; statistics of batch norm: {norms}")
    return png(figure)


def _groups(rows: Sequence[Row]) -> Mapping[Key, list[Line]]:
    """The lines of all pairs of each network, step and kind; the density is that of its first pair."""
    groups: dict[Key, list[Line]] = {}
    density = {row["network"]: row["density"] for row in reversed(rows)}
    for row in rows:
        for kind, line in row["lines"].items():
            groups.setdefault((row["network"], density[row["network"]], row["k"], kind), []).append(line)
    return groups
