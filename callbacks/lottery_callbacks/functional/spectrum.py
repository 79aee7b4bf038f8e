"""Diagonal, trace, extreme eigenvalues and spectral density of a symmetric matrix that is known by its products.

The matrix A is n x n: a `Curvature`, a dense tensor, or whatever has `shape`, `dtype`, `device` and `A @ vectors` for
vectors [n] and [n, k]. Costs are counted in products, one for each vector; `seconds` says what these will take.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Symmetric(Protocol):
    """A symmetric matrix."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __matmul__(self, vectors: Tensor, /) -> Tensor: ...


class Estimate(NamedTuple):
    """A mean over draws and its standard error: 0 where it is exact, NaN where there was one draw."""

    value: float
    error: float


@dataclass(frozen=True)
class Diagonal:
    """The diagonal of A, and its trace.

    Attributes:
        values: [n], float64.
        errors: [n], the standard error of each from the draws; 0 where exact, NaN of one draw.
        sums: [draws, parts], the sum of v * Av over each part in each draw; one row where exact.
        products: what it took.
    """

    values: Tensor
    errors: Tensor
    sums: Tensor
    products: int

    def trace(self, part: int | None = None) -> Estimate:
        """The trace of A or of the diagonal block of a part: Hutchinson's (1989) mean of v'Av, from the same draws."""
        draws = (self.sums.sum(1) if part is None else self.sums[:, part]).cpu()
        if len(draws) == 1:
            return Estimate(float(draws), float(self.errors[0]))  # exact, or unknown, as each of these is
        return Estimate(float(draws.mean()), float(draws.std() / math.sqrt(len(draws))))


def diagonal(
    matrix: Symmetric,
    generator: torch.Generator,
    draws: int = 100,
    parts: Sequence[int] | None = None,
    chunk: int = 8,
) -> Diagonal:
    """The mean over draws of v * Av with v of random signs (Bekas et al., 2007): unbiased, and exact once draws >= n.

    Var of one draw at i is the sum over j != i of A_ij^2: small entries of a diagonal drown in large rows, and the
    quantiles of such estimates are spread by their errors. Sums are float64.

    Args:
        matrix: A.
        generator: on the CPU; each draw takes n signs of it, whatever the chunk.
        draws: so many products; n, by `exact_diagonal`, where they are as many.
        parts: consecutive lengths of which the traces are told apart (a `Curvature`'s `sizes.values()`); they sum to n.
        chunk: vectors multiplied at once: as many are in memory.

    Raises:
        ValueError: no draw.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} tell nothing: choose 1 or more, 2 for a standard error")
    size, parts = matrix.shape[0], list(parts or matrix.shape[:1])
    if draws >= size:
        return exact_diagonal(matrix, size, parts, chunk)
    mean = torch.zeros(size, dtype=torch.float64, device=matrix.device)
    squares, sums = torch.zeros_like(mean), []
    for first in range(0, draws, chunk):
        signs = torch.stack([_signs(matrix, generator) for _ in range(first, min(draws, first + chunk))], 1)
        for sample in (signs * (matrix @ signs)).double().unbind(1):
            sums.append(torch.stack([part.sum() for part in sample.split(parts)]))
            off = sample - mean  # Welford's update: no difference of large squares
            mean += off / len(sums)
            squares += off * (sample - mean)
    errors = (squares / (draws - 1) / draws).sqrt() if draws > 1 else torch.full_like(mean, math.nan)
    return Diagonal(mean, errors, torch.stack(sums), draws)


def exact_diagonal(
    matrix: Symmetric, limit: int = 20_000, parts: Sequence[int] | None = None, chunk: int = 8
) -> Diagonal:
    """The diagonal itself: a product a coordinate, n in all.

    Raises:
        ValueError: n is above `limit`.
    """
    size = matrix.shape[0]
    if size > limit:
        raise ValueError(f"an exact diagonal of {size} takes as many products: use diagonal(), or limit={size}")
    values = torch.cat([rows.diagonal(first).double() for first, rows in _rows(matrix, chunk)])
    sums = torch.stack([part.sum() for part in values.split(list(parts or [size]))])
    return Diagonal(values, torch.zeros_like(values), sums.unsqueeze(0), size)


class Extremes(NamedTuple):
    """The smallest eigenvalues, rising, and the largest, falling, float64 on the CPU; and the products that it took."""

    smallest: Tensor
    largest: Tensor
    products: int


def extremes(
    matrix: Symmetric, generator: torch.Generator, count: int = 1, tolerance: float = 1e-4, most: int = 1000
) -> Extremes:
    """The extreme eigenvalues by implicitly restarted Lanczos (ARPACK, `scipy.sparse.linalg.eigsh`).

    The matrix is shifted by twice its spectral radius, as 10 steps of Lanczos see it, so that `tolerance` is relative
    to that radius: relative to an eigenvalue near 0, as the smallest of a GGN, it would never be reached. A matrix of
    up to 64 is made dense, in n products. An eigenvalue that comes several times may be found once. All are NaN where a
    product is not finite: training has diverged.

    Cost: 40 to 100 products as a rule, `most` at most; memory 20 vectors of float64 on the CPU.

    Args:
        matrix: A.
        generator: on the CPU, for the first vector.
        count: how many of either end.
        tolerance: of the eigenvalues; below 1e-6 only in float64.
        most: products after which it gives up.

    Raises:
        ValueError: there are fewer than `count` eigenvalues.
        RuntimeError: the eigenvalues have not converged in `most` products.
        ModuleNotFoundError: scipy is missing.
    """
    size, done = matrix.shape[0], 0
    if not 1 <= count <= size:
        raise ValueError(f"there are {size} eigenvalues: choose a count from 1 to {size}")
    if size <= max(64, 4 * count):
        dense = torch.cat([rows for _, rows in _rows(matrix)]).double().cpu()
        finite = bool(dense.isfinite().all())
        found = torch.linalg.eigvalsh((dense + dense.T) / 2) if finite else torch.full((size,), math.nan).double()
        return Extremes(found[:count], found.flip(0)[:count], size)
    start = _signs(matrix, generator)
    ritz, _ = _quadrature(matrix, start, 10)
    done = len(ritz)
    radius = float(ritz.abs().max())
    if not radius or math.isnan(radius):
        same = torch.full((count,), radius, dtype=torch.float64)
        return Extremes(same, same, done)
    operator, eigsh = _of_scipy()

    def product(vector: Any) -> Any:
        nonlocal done
        if done >= most:
            raise RuntimeError(
                f"the eigenvalues have not converged in {most} products: give more, or a tolerance above {tolerance:g}"
            )
        done += 1
        column = torch.from_numpy(vector.reshape(-1)).to(matrix.device, matrix.dtype)
        return (matrix @ column).double().cpu().numpy() + 2 * radius * vector.reshape(-1)

    found = eigsh(
        operator(shape=(size, size), matvec=product, dtype="float64"),
        k=2 * count,
        which="BE",  # half from either end
        v0=start.double().cpu().numpy(),
        tol=tolerance,
        return_eigenvectors=False,
    )
    found = torch.from_numpy(found).sort().values - 2 * radius
    return Extremes(found[:count], found.flip(0)[:count], done)


@dataclass(frozen=True)
class Spectrum:
    """The spectral density of A, p(x) = 1/n sum of delta(x - eigenvalue), each delta widened to a Gaussian.

    Attributes:
        grid: [points], rising; all of these are float64 on the CPU.
        values: [points], p there; its integral is 1.
        errors: [points], standard errors over the draws; NaN of one.
        nodes: [draws, steps], the Ritz values of each draw;
        weights: [draws, steps], and what part of the eigenvalues each stands for; 0 where a draw needed fewer steps.
        width: the standard deviation of the Gaussians.
        products: what it took.
    """

    grid: Tensor
    values: Tensor
    errors: Tensor
    nodes: Tensor
    weights: Tensor
    width: float
    products: int


def spectrum(
    matrix: Symmetric,
    generator: torch.Generator,
    draws: int = 10,
    steps: int = 80,
    points: int = 1024,
    width: float | None = None,
) -> Spectrum:
    """The spectral density by stochastic Lanczos quadrature (Ubaru et al., 2017; Ghorbani et al., arXiv 1901.10159).

    Each draw is a vector of random signs, from which `steps` steps of Lanczos, with full reorthogonalisation, give
    nodes and weights: the eigenvalues of the tridiagonal matrix, and the squared first entries of its eigenvectors.
    They integrate polynomials of degree up to 2 steps - 1 exactly for that vector. curvlinops, after Papyan (JMLR
    2020), does without reorthogonalisation, which leaves copies of eigenvalues that have converged, and draws globally.

    Cost: draws x min(steps, n) products; memory as many vectors as steps, in the type of A.

    Args:
        matrix: A.
        generator: on the CPU.
        draws: independent ones, averaged.
        steps: of Lanczos.
        points: of the grid, even, from 4 widths below the least node to 4 above the greatest.
        width: of the Gaussians; by default Papyan's, (greatest - least node) / (2.96 (steps - 1)).

    Raises:
        ValueError: no draw, or fewer than two steps or points; a product is not finite.
    """
    if draws < 1 or steps < 2 or points < 2:
        raise ValueError(f"draws={draws}, steps={steps}, points={points}: choose 1 draw, 2 steps and 2 points at least")
    nodes, weights, products = (
        torch.zeros(draws, steps, dtype=torch.float64),
        torch.zeros(draws, steps, dtype=torch.float64),
        0,
    )
    for draw in range(draws):
        found, part = _quadrature(matrix, _signs(matrix, generator), steps)
        if not found.isfinite().all():
            raise ValueError("a product with the matrix is not finite: did the training diverge?")
        products += len(found)
        nodes[draw], weights[draw] = found[-1], 0.0
        nodes[draw, : len(found)], weights[draw, : len(found)] = found, part
    low, high = float(nodes.min()), float(nodes.max())
    if width is None:
        width = (high - low) / (math.sqrt(8 * math.log(3)) * (steps - 1)) or 1e-3 * abs(high) or 1e-3
    grid = torch.linspace(low - 4 * width, high + 4 * width, points, dtype=torch.float64)
    bumps = torch.exp(-(((grid - nodes.unsqueeze(2)) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
    each = (weights.unsqueeze(2) * bumps).sum(1)
    errors = each.std(0) / math.sqrt(draws) if draws > 1 else torch.full_like(grid, math.nan)
    return Spectrum(grid, each.mean(0), errors, nodes, weights, width, products)


def seconds(matrix: Symmetric, products: int = 1) -> float:
    """How long so many products will take, one vector at a time: two are made, and the second is measured."""
    took, vector = 0.0, torch.ones(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    for _ in range(2):
        start = time.perf_counter()
        float((matrix @ vector).sum())  # waits for a device that works on its own
        took = time.perf_counter() - start
    return took * products


def _signs(matrix: Symmetric, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(2, (matrix.shape[0],), generator=generator, dtype=torch.int8)
    return drawn.to(matrix.device, matrix.dtype).mul_(2).sub_(1)


def _rows(matrix: Symmetric, chunk: int = 8) -> Iterator[tuple[int, Tensor]]:
    """Rows of the matrix from each `first` on, by its symmetry."""
    size = matrix.shape[0]
    for first in range(0, size, chunk):
        columns = torch.zeros(size, min(chunk, size - first), dtype=matrix.dtype, device=matrix.device)
        columns[first:].fill_diagonal_(1)
        yield first, (matrix @ columns).T


def _quadrature(matrix: Symmetric, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss quadrature from Lanczos, rising; fewer where `start` spans no larger Krylov space."""
    steps = min(steps, len(start))
    basis, on, off = start.new_zeros(steps, len(start)), [], []
    vector = start / start.norm()
    for step in range(steps):
        basis[step] = vector
        following = matrix @ vector
        on.append(float((following * vector).sum(dtype=torch.float64)))
        if not math.isfinite(on[-1]):
            return torch.tensor([math.nan]), torch.tensor([math.nan])
        for _ in range(2):  # twice is enough (Parlett, 1980)
            following = following - basis[: step + 1].T @ (basis[: step + 1] @ following)
        off.append(float(following.double().norm()))
        largest = max(map(abs, on + off[:-1]))
        if off[-1] <= 100 * torch.finfo(start.dtype).eps * largest:
            break
        vector = following / off[-1]
    rest = torch.tensor(off[: len(on) - 1], dtype=torch.float64)
    nodes, vectors = torch.linalg.eigh(torch.diag(torch.tensor(on, dtype=torch.float64)) + rest.diag(1) + rest.diag(-1))
    return nodes, vectors[0] ** 2


def _of_scipy() -> tuple[Any, Any]:
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'extreme eigenvalues need scipy: pip install "lottery-lightning[curvature]"', name=error.name
        ) from None
    return LinearOperator, eigsh
