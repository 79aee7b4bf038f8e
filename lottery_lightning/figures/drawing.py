"""What all figures share; matplotlib is imported when the first is drawn."""

import io
from collections.abc import Sequence
from statistics import mean
from typing import Any


def canvas(width: float, height: float) -> Any:
    """An empty figure, in inches, that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """The same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def errorbar(axis: Any, x: float, values: Sequence[float], **style: Any) -> None:
    """One point: the mean, with a bar from the least to the greatest value."""
    middle = mean(values)
    ends = [[middle - min(values)], [max(values) - middle]]
    axis.errorbar([x], [middle], ends, ls="", ms=5, capsize=2, **style)
