"""Figure of linear mode connectivity."""

from collections.abc import Mapping

from lottery_callbacks.functional.interpolation import Line
from lottery_lightning.figures.drawing import canvas, png


def connectivity_figure(results: Mapping[str, Line]) -> bytes:
    """Loss, and error (%), along the lines between networks: t = 0 is the first network, t = 1 the other.

    The legends give the loss barrier and the instability of each line; dotted is what these are measured from, the
    chord between the losses at the ends and the mean of the errors there. The title names the statistics of batch norm.

    Args:
        results: the lines by name, as `LinearModeConnectivity.results`.

    Raises:
        ValueError: there are no lines.
    """
    if not results:
        raise ValueError("there are no lines to draw: the first level has none before it, and no checkpoint was given")
    figure = canvas(12, 4.6)
    losses, errors = figure.subplots(1, 2)
    for number, (name, line) in enumerate(results.items()):
        style = {"color": f"C{number % 10}", "marker": "osD^vP*X"[number % 8], "ms": 3, "lw": 1.4}
        percent = [100 * error for error in line.errors]
        losses.plot(line.t, line.losses, **style, label=f"{name}: barrier {line.barrier:.3g}")
        errors.plot(line.t, percent, **style, label=f"{name}: instability {100 * line.instability:.3g} points")
        middle = (percent[0] + percent[-1]) / 2
        for axis, ends in ((losses, (line.losses[0], line.losses[-1])), (errors, (middle, middle))):
            axis.plot((0, 1), ends, ":", color=style["color"], lw=1)
    for axis, label in ((losses, "loss"), (errors, "error (%)")):
        axis.set(xlabel="t: 0 is the first network, 1 the other", ylabel=label)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    norms = ", ".join(dict.fromkeys(line.norms for line in results.values()))
    figure.suptitle(f"straight lines between networks; statistics of batch norm: {norms}")
    return png(figure)
