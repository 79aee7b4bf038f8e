"""Tickets of several kinds on one figure."""

from collections.abc import Mapping, Sequence

from lottery_lightning.figures.drawing import canvas, errorbar, png

Point = tuple[float, Sequence[float]]  # kept weights, and the accuracy of each trial


def comparison_figure(series: Mapping[str, Sequence[Point]], weights: int, title: str) -> bytes:
    """Test accuracy against kept weights, as a part of the trained network's: means, bars from min to max.

    Beyond 1 are tickets of larger networks.

    Args:
        series: the points of each kind of ticket, by its name.
        weights: of the trained network, dense.
        title: data and network.
    """
    figure = canvas(9, 5.5)
    axis = figure.subplots()
    for number, (name, points) in enumerate(series.items()):
        style = {"color": f"C{number}", "marker": "osD^vP*X"[number % 8]}
        points = sorted(points, key=lambda point: point[0])
        kept = [point[0] / weights for point in points]
        for x, (_, values) in zip(kept, points, strict=True):
            errorbar(axis, x, [100 * value for value in values], **style)
        middle = [100 * sum(values) / len(values) for _, values in points]
        axis.plot(kept, middle, lw=1, label=name, **style)
    axis.axvline(1, color="grey", lw=0.8)
    axis.set(
        xscale="log", xlabel="kept weights / weights of the dense network", ylabel="test accuracy (%)", title=title
    )
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return png(figure)
