"""How far a network may be from its target on the unit ball: a bound that is proved, and the worst that is found.

Both are in float64 and of the Euclidean norm of the outputs. A layer W x + b of the target is approximated by
P x+ + N x- + c, where x = x+ - x-. The difference (P - W) x+ + (N + W) x- has norm delta |x| at most, with the spectral
norm delta = ||[P - W, N + W]||, since |x+|^2 + |x-|^2 = |x|^2. Let e bound the distance of the two networks before
layer i, and r the norm of the approximation's values there, e = 0 and r = the ball's radius at the input. After it

    e' = ||W|| e + delta r + |c - b|,    r' = (||W|| + delta) r + |c|.

Without biases this is sum_i delta_i prod_{j<i} (||W_j|| + delta_j) prod_{j>i} ||W_j||; a bias enters by what it adds to
r, and by its own error. Behind a ReLU x- = 0, and delta may be ||P - W|| alone, which is sharper. ReLU changes neither
e nor r, a pooling multiplies both by its Lipschitz constant; it is 0 at 0, and so must be what else declares such.

Of a convolution, ||W|| and delta are bounded by `convolution_norm`, and a bias is counted at each place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, cos, gcd, inf, pi, prod
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Approximated:
    """A layer of the target and what stands for it, in float64.

    Attributes:
        weight: W (out, in, ...) of the target.
        bias: b (out,), zeros where it has none.
        positive: P, in the shape of W.
        negative: N.
        constant: c (out,).
        product: the linear map: (values, W) -> W values.
        bound: W (out, in or 2 in, ...) -> an upper bound of its norm.
        nonnegative: whether inputs are known to be >= 0; then N plays no part.
    """

    weight: Tensor
    bias: Tensor
    positive: Tensor
    negative: Tensor
    constant: Tensor
    product: Callable[[Tensor, Tensor], Tensor]
    bound: Callable[[Tensor], float]
    nonnegative: bool

    def target(self, values: Tensor) -> Tensor:
        """What the target's layer computes."""
        values = self.product(values, self.weight)
        return values + self._shaped(self.bias, values)

    def approximation(self, values: Tensor) -> Tensor:
        """What stands for it computes."""
        sums = self.product(values.relu(), self.positive)
        if not self.nonnegative:
            sums = sums + self.product((-values).relu(), self.negative)
        return sums + self._shaped(self.constant, sums)

    def norm(self) -> float:
        """A bound of ||W||: the norm itself, for a matrix."""
        return self.bound(self.weight)

    def delta(self, nonnegative: bool) -> float:
        """A bound of ||[P - W, N + W]||, of ||P - W|| for inputs >= 0."""
        errors = [self.positive - self.weight]
        if not (self.nonnegative or nonnegative):
            errors.append(self.negative + self.weight)
        return self.bound(torch.cat(errors, dim=1))

    def _shaped(self, bias: Tensor, values: Tensor) -> Tensor:
        return bias.view(-1, *[1] * (values.ndim - 2)) if self.weight.ndim > 2 else bias


@dataclass(frozen=True)
class Error:
    """A distance of the rescaled networks' outputs.

    Attributes:
        value: the distance.
        norms: the bound of each layer's ||W||, as in the certificate.
        radius: of the ball of inputs.
    """

    value: float
    norms: tuple[float, ...]
    radius: float = 1.0

    @property
    def normalised(self) -> float:
        """Divided by the radius and the product of the norms: the same however the layers are scaled."""
        norms = self.radius * prod(self.norms)
        return self.value / norms if norms else inf if self.value else 0.0


def certificate(
    steps: Sequence[Approximated | nn.Module], shape: Sequence[int], behind_relu: bool = False, radius: float = 1.0
) -> Error:
    """An upper bound of the distance on all inputs of that norm or less; with >= 0, where inputs are known to be.

    Args:
        steps: approximated layers, and between them ReLU, pooling and flattening.
        shape: of one input.
        behind_relu: use that x- = 0 there, also in tickets that do not rely on it.
        radius: of the ball of inputs.
    """
    _check_radius(radius)
    error, reach, norms, nonnegative = 0.0, radius, [], False
    values = _zeros(steps, (1, *shape))
    for step in steps:
        before, values = values, step.target(values) if isinstance(step, Approximated) else step(values)
        if isinstance(step, Approximated):
            norm, delta, places = step.norm(), step.delta(nonnegative and behind_relu), values.numel() / len(step.bias)
            added = [places**0.5 * float(bias.norm()) for bias in (step.constant - step.bias, step.constant)]
            error, reach = norm * error + delta * reach + added[0], (norm + delta) * reach + added[1]
            norms.append(norm)
            nonnegative = False
        else:
            lipschitz = _lipschitz(step, before)
            error, reach = lipschitz * error, lipschitz * reach
            nonnegative |= isinstance(step, nn.ReLU)
    return Error(error, tuple(norms), radius)


def searched_error(
    steps: Sequence[Approximated | nn.Module],
    shape: Sequence[int],
    count: int,
    restarts: int,
    seed: int,
    radius: float = 1.0,
) -> Error:
    """The largest distance that gradient ascent finds there: a lower bound of the largest that there is.

    `count` steps from each of `restarts` random inputs at once; a step has half the radius at first, 0.005 at the end.
    """
    _check_radius(radius)
    layers = [step for step in steps if isinstance(step, Approximated)]
    nonnegative, device = layers[0].nonnegative, layers[0].weight.device

    def into_ball(points: Tensor) -> Tensor:
        points = points.clamp(min=0.0) if nonnegative else points
        return points / (_norms(points) / radius).clamp(min=1.0)

    def distance(points: Tensor) -> Tensor:
        target = approximation = points
        for step in steps:
            target, approximation = (
                (step.target(target), step.approximation(approximation))
                if isinstance(step, Approximated)
                else (step(target), step(approximation))
            )
        return (target - approximation).flatten(1).norm(dim=1)

    points = torch.randn(restarts, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(
        device
    )
    points = into_ball(points * 1e3 * radius)
    largest = float(distance(torch.zeros_like(points[:1])))  # of the biases
    for turn in range(count + 1):
        points.requires_grad_()
        with torch.enable_grad():
            distances = distance(points)
            (slope,) = torch.autograd.grad(distances.sum(), points)
        largest = max(largest, float(distances.detach().max()))
        length = 0.5 * radius * 0.01 ** (turn / max(1, count))
        points = into_ball(points.detach() + length * slope / _norms(slope).clamp(min=1e-300))
    return Error(largest, tuple(layer.norm() for layer in layers), radius)


def overlaps(kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> int:
    """The most windows that one pixel is in.

    >>> overlaps((3, 3), (1, 1), (1, 1)), overlaps((3, 2), (2, 2), (1, 1)), overlaps((3, 3), (2, 2), (2, 2))
    (9, 2, 9)
    """
    return prod(ceil(k * gcd(s, d) / s) for k, s, d in zip(kernel, stride, dilation, strict=True))


def spectral_norm(weight: Tensor) -> float:
    """The largest singular value of (out, ...) as a matrix: the root of the greatest eigenvalue of its Gram matrix."""
    return _largest(weight.flatten(1))


def convolution_norm(kernel: Tensor, windows: int) -> float:
    """An upper bound of the norm of a convolution with zeros around, of any stride and dilation.

    The smaller of two bounds. One is the spectral norm of the kernel unrolled to (out, in * taps), times the root of
    the number of windows that a pixel is in. The other is the norm of the convolution on the whole plane, of which this
    one is a part: the largest ||K(w)|| over frequencies w, K(w) = sum_t K_t exp(i w t). It is taken over a grid of
    N = 16 (k - 1) frequencies for an axis of k taps: |u* K(w) v|^2 is a trigonometric polynomial of degree k - 1, which
    near its maximum falls no faster than a cosine (M. Riesz), so that the grid's exceeds cos(pi / 16) of it, an axis.
    Cost: a Hermitian eigenproblem of min(out, in) for half of the grid, 544 for 3 x 3 taps; 64 are held at once.

    Args:
        kernel: (out, in, height, width).
        windows: that a pixel is in, see `overlaps`.

    >>> round(convolution_norm(torch.ones(1, 1, 3, 3), 9), 2), round(convolution_norm(torch.ones(1, 1, 2, 2), 1), 2)
    (9.0, 2.0)
    """
    sizes = kernel.shape[2:]
    grid = [max(1, 16 * (taps - 1)) for taps in sizes]
    turns = [torch.arange(n).outer(torch.arange(taps)) / n for n, taps in zip(grid, sizes, strict=True)]
    turns[1] = turns[1][: grid[1] // 2 + 1]  # K(-w) is the conjugate
    angles = 2 * pi * (turns[0][:, None, :, None] + turns[1][None, :, None, :]).flatten(2).flatten(0, 1)
    angles = angles.to(kernel)
    phases, matrices = torch.polar(torch.ones_like(angles), angles), kernel.flatten(2).permute(2, 0, 1).flatten(1)
    largest = max(
        _largest((some @ matrices.to(some.dtype)).unflatten(1, kernel.shape[:2])) for some in phases.split(64)
    )
    slack = prod(cos(pi / 16) ** -0.5 for taps in sizes if taps > 1)
    return min(windows**0.5 * spectral_norm(kernel), slack * largest)


def _lipschitz(step: Any, before: Tensor) -> float:
    if hasattr(step, "lipschitz"):
        return step.lipschitz
    if isinstance(step, nn.MaxPool2d):
        kernel, stride, dilation = (_pair(size) for size in (step.kernel_size, step.stride, step.dilation))
        return overlaps(kernel, stride, dilation) ** 0.5
    if isinstance(step, nn.AvgPool2d | nn.AdaptiveAvgPool2d):  # linear, >= 0: the root of its 1-norm times its max-norm
        ones = torch.ones_like(before[:1], requires_grad=True)
        with torch.enable_grad():
            rows = step(ones)
            (columns,) = torch.autograd.grad(rows.sum(), ones)
        return float((rows.detach().max() * columns.max()).sqrt())
    return 1.0  # ReLU, Flatten


def _check_radius(radius: float) -> None:
    if not 0 < radius < inf:
        raise ValueError(f"radius={radius}: choose a number above 0")


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _largest(matrices: Tensor) -> float:
    """The largest singular value of (..., m, n): the root of the greatest eigenvalue of the smaller Gram matrix."""
    gram = matrices @ matrices.mH if matrices.shape[-2] <= matrices.shape[-1] else matrices.mH @ matrices
    return float(torch.linalg.eigvalsh(gram)[..., -1].max().clamp(min=0.0).sqrt())


def _norms(points: Tensor) -> Tensor:
    return points.flatten(1).norm(dim=1).view(-1, *[1] * (points.ndim - 1))


def _zeros(steps: Sequence[Approximated | nn.Module], shape: Sequence[int]) -> Tensor:
    device = next(step.weight.device for step in steps if isinstance(step, Approximated))
    return torch.zeros(*shape, dtype=torch.float64, device=device)
