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
from lottery_callbacks.functional.in_place import load
from lottery_callbacks.functional.landscape import Surface, grid_around, surface
from lottery_callbacks.functional.plane import Plane, plane
from lottery_callbacks.functional.random_plane import RandomPlane, random_plane
from lottery_callbacks.functional.running_statistics import Norms
from lottery_callbacks.functional.spectrum import diagonal, extremes, spectrum
from lottery_callbacks.messages import one_of
from lottery_lightning.experiments.finished import masks_of, weights_of
from lottery_lightning.experiments.setting import Setting
from lottery_lightning.experiments.store import PointFile

Row = dict[str, Any]
Tell = Callable[[int, int], object]
LANCZOS = 100  # products that the extreme eigenvalues take: about
FIGURES = (
    "coordinates", "examples", "products", "trace", "trace_error", "diagonal_mean", "diagonal_draws", "diagonal_error",
    "diagonal_median", "diagonal_95", "diagonal_99", "largest", "smallest",
)  # fmt: skip
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
    """Diagonal, trace, extreme eigenvalues and spectral density at a run's last weights, on those that it keeps.

    Where the run has diverged all figures are NaN, and there is neither histogram nor spectrum.
    """
    load(setting.model, weights_of(folder / "final.ckpt"))
    masks = masks_of(folder)
    loss, error = setting.on_training(setting.model)
    row: Row = {"kind": spectra.kind, "density": M.density(masks), "loss": loss, "error": error}
    if not math.isfinite(loss):
        return row | dict.fromkeys(FIGURES, math.nan) | {"histogram": None, "spectrum": None}
    matrix = Curvature(setting.model, setting.training, kind=spectra.kind, masks=masks)
    watched, generator = _Watched(matrix, tell, spectra.products), torch.Generator().manual_seed(seed)
    found = diagonal(watched, generator, spectra.draws)
    ends = extremes(watched, generator)
    density = spectrum(watched, generator, spectra.spectrum_draws, spectra.steps)
    trace, values = found.trace(), found.values.cpu()
    sizes = values[:: math.ceil(len(values) / 1e7)].abs()
    median, high, highest = torch.quantile(sizes, torch.tensor([0.5, 0.95, 0.99], dtype=sizes.dtype)).tolist()
    own = (matrix.shape[0], int(matrix.examples), matrix.products, trace.value, trace.error)
    own += (trace.value / matrix.shape[0], spectra.draws, float(found.errors.median()), median, high, highest)
    row |= dict(zip(FIGURES, (*own, float(ends.largest[0]), float(ends.smallest[0])), strict=True))
    lines = {"grid": density.grid.tolist(), "values": density.values.tolist(), "width": density.width}
    return row | {"histogram": _histogram(values), "spectrum": lines}


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
    """In numbers: the networks' mean loss, the part of the grid that has diverged, and how far the rest lies above it.

    `mean_rise` is over points with a finite loss: where some have none, it is no measure of flatness. `highest_rise` is
    inf there.
    """
    own = sum(point.loss for point in found.points) / len(found.points)
    losses = [loss for row in found.losses for loss in row]
    finite = [loss for loss in losses if math.isfinite(loss)]
    rise = sum(finite) / len(finite) - own if finite else math.nan
    highest = max(losses) - own if len(finite) == len(losses) else math.inf
    return {"loss": own, "diverged": 1 - len(finite) / len(losses), "mean_rise": rise, "highest_rise": highest}
