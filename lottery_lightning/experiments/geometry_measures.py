"""What the geometry experiment measures of a finished network, or of a plane through several."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.curvature import Curvature, Kind
from lottery_callbacks.functional.interpolation import Norms, load
from lottery_callbacks.functional.landscape import Surface, grid_around, surface
from lottery_callbacks.functional.plane import Plane, plane
from lottery_callbacks.functional.random_plane import RandomPlane, random_plane
from lottery_callbacks.functional.spectrum import diagonal, extremes, spectrum
from lottery_callbacks.messages import one_of
from lottery_lightning.experiments.finished import masks_of, weights_of
from lottery_lightning.experiments.setting import Setting
from lottery_lightning.experiments.store import PointFile

Row = dict[str, Any]
Tell = Callable[[int, int], object]
LANCZOS = 100  # products that the extreme eigenvalues take: about
EDGES = torch.arange(-10, 4.01, 0.2, dtype=torch.float64)  # of the diagonal's histogram, in powers of 10


@dataclass(frozen=True)
class Spectra:
    """How the curvature of a network is measured.

    Args:
        kind: "hessian", or "ggn" for the generalised Gauss-Newton matrix.
        draws: products for the diagonal and the trace; as many as there are kept weights make it exact.
        spectrum_draws: vectors from which Lanczos is begun for the spectral density.
        steps: of Lanczos from each.
    """

    kind: Kind = "hessian"
    draws: int = 100
    spectrum_draws: int = 5
    steps: int = 60

    def __post_init__(self) -> None:
        one_of("spectra.kind", self.kind, ("hessian", "ggn"))
        if self.draws < 1 or self.spectrum_draws < 1 or self.steps < 2:
            told = f"draws={self.draws}, spectrum_draws={self.spectrum_draws}, steps={self.steps}"
            raise ValueError(f"{told}: choose 1, 1 and 2 at least")

    @property
    def products(self) -> int:
        """About how many a network takes."""
        return self.draws + LANCZOS + self.spectrum_draws * self.steps


@dataclass(frozen=True)
class Views:
    """How planes are evaluated.

    Args:
        points: on each axis of the grid.
        margin: how far the grid goes beyond the networks, of their extent; 0.5 is [-1, 1] filter norms around one.
        norms: batch norm statistics on the grid: "average" takes the plane's, "reestimate" computes them anew.
        around: whether to evaluate a random plane around each network, beside the planes that are named.
    """

    points: int = 21
    margin: float = 0.5
    norms: Norms = "average"
    around: bool = True

    def __post_init__(self) -> None:
        one_of("views.norms", self.norms, ("average", "reestimate"))
        grid_around([(0.0, 0.0)], self.points, self.margin)  # refuses what makes no grid


class _Watched:
    """A matrix that tells of each product."""

    def __init__(self, matrix: Curvature, tell: Tell, total: int) -> None:
        self.matrix, self.tell, self.total = matrix, tell, total
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        found = self.matrix @ vectors
        self.tell(self.matrix.products, self.total)
        return found


def curvature_of(setting: Setting, folder: Path, spectra: Spectra, seed: int, tell: Tell) -> Row:
    """Diagonal, trace, extreme eigenvalues and spectral density at a run's last weights, on those that it keeps."""
    load(setting.model, weights_of(folder / "final.ckpt"))
    masks = masks_of(folder)
    matrix = Curvature(setting.model, setting.training, kind=spectra.kind, masks=masks)
    watched, generator = _Watched(matrix, tell, spectra.products), torch.Generator().manual_seed(seed)
    found = diagonal(watched, generator, spectra.draws)
    ends = extremes(watched, generator)
    density = spectrum(watched, generator, spectra.spectrum_draws, spectra.steps)
    loss, error = setting.on_training(setting.model)
    trace = found.trace()
    quantiles = torch.quantile(
        found.values[:: math.ceil(len(found.values) / 1e7)].abs(), torch.tensor([0.5, 0.95, 0.99]).double()
    )
    negative = float((density.weights * (density.nodes < 0)).sum() / density.weights.sum())
    return {
        "kind": spectra.kind,
        "density": M.density(masks),
        "coordinates": matrix.shape[0],
        "examples": int(matrix.examples),
        "products": matrix.products,
        "loss": loss,
        "error": error,
        "trace": trace.value,
        "trace_error": trace.error,
        "diagonal_mean": trace.value / matrix.shape[0],
        "diagonal_draws": spectra.draws,
        "diagonal_error": float(found.errors.median()),
        "diagonal_median": float(quantiles[0]),
        "diagonal_95": float(quantiles[1]),
        "diagonal_99": float(quantiles[2]),
        "largest": float(ends.largest[0]),
        "smallest": float(ends.smallest[0]),
        "negative": negative,
        "histogram": _histogram(found.values),
        "spectrum": {"grid": density.grid.tolist(), "values": density.values.tolist(), "width": density.width},
    }


def _histogram(values: Tensor) -> dict[str, list[float]]:
    """Parts of all values by the size of those above and below 0; what lies beyond an end is in the last bin there."""
    parts = {}
    for name, some in (("positive", values[values > 0]), ("negative", -values[values < 0])):
        places = torch.bucketize(some.log10().clamp(EDGES[0], EDGES[-1]), EDGES[1:-1])
        parts[name] = (torch.bincount(places.cpu(), minlength=len(EDGES) - 1) / len(values)).tolist()
    return {"edges": EDGES.tolist()} | parts


def around(setting: Setting, folder: Path, views: Views, seed: int, kept: PointFile, tell: Tell) -> Row:
    """The loss on a random filter-normalised plane around a run's last weights."""
    load(setting.model, weights_of(folder / "final.ckpt"))
    directions = random_plane(setting.model, torch.Generator().manual_seed(seed), masks_of(folder))
    return _evaluated(setting, directions, views, kept, tell)


def through(setting: Setting, folders: Sequence[Path], views: Views, kept: PointFile, tell: Tell) -> Row:
    """The loss on the plane through the last weights of three or four runs."""
    return _evaluated(setting, plane(*(weights_of(folder / "final.ckpt") for folder in folders)), views, kept, tell)


def _evaluated(setting: Setting, on: Plane | RandomPlane, views: Views, kept: PointFile, tell: Tell) -> Row:
    grid = grid_around(on.coordinates, views.points, views.margin)
    done = kept.read()

    def keep(point: Sequence[float], left: int) -> None:
        kept.append(point)
        tell(views.points**2 - left, views.points**2)

    found = surface(setting.model, on, setting.on_training, grid, views.norms, setting.reestimate, done, keep)
    return {"surface": asdict(found), **summary(found)}


def summary(found: Surface) -> Row:
    """In numbers: the networks' mean loss, and how far the grid's mean and highest loss lie above it.

    NaN, where a point diverges, counts as the highest number; the mean is over numbers.
    """
    own = sum(point.loss for point in found.points) / len(found.points)
    losses = [loss for row in found.losses for loss in row if math.isfinite(loss)]
    if not losses:
        return {"loss": own, "mean_rise": math.nan, "highest_rise": math.nan}
    return {"loss": own, "mean_rise": sum(losses) / len(losses) - own, "highest_rise": max(losses) - own}
