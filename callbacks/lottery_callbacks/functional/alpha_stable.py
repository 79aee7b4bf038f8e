"""Alpha-stable random numbers and the noise of heavy-tailed SGD that is made of them (arXiv 2306.08125).

A symmetric alpha-stable X has the characteristic function E exp(itX) = exp(-|t|^alpha), 0 < alpha <= 2, so that N(0, 2)
is alpha = 2 and Cauchy's law alpha = 1. All is float32 on the device of the generator; nothing is copied to the host.

An angle is one of 2^32, an exponential variate one of 2^31, both fine where they are small, however near that is to a
pole. So the laws are exact up to rounding for all that happens once in 2^31 draws, and their tails end beyond it: |X|
stays below 6e5 at alpha = 1.75, 5e6 at 1.5, 3e9 at 1 and 2e28 at 0.5; at alpha = 2, with torch's own normal variates,
below 10. What would be larger than float32's largest number, 3.4e38, is that number, which happens below alpha = 0.5
alone. Nothing is ever infinite or NaN.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["neuron", "weight", "rotation"]
Draw = Callable[[tuple[int, ...], torch.Generator, Tensor | None], Tensor]  # shape, generator, out
PIECE = 1 << 15  # numbers worked on at once on a CPU, so that they stay in the cache


def symmetric(alpha: float, shape: tuple[int, ...], generator: torch.Generator, out: Tensor | None = None) -> Tensor:
    """Independent variates, in `out` if it is given, with the characteristic function exp(-|t|^alpha).

    By Chambers, Mallows and Stuck (1976) from U uniform on (-pi/2, pi/2) and E exponential,

        X = sin(alpha U) / cos U * (cos((1 - alpha) U) / (E cos U))^((1 - alpha) / alpha),

    which is tan U at alpha = 1; at alpha = 2 it would be Box and Muller's, and torch's own normal variates are drawn
    instead, times sqrt(2). `stable_table` draws faster.

    >>> symmetric(1.5, (2, 3), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])

    Raises:
        ValueError: alpha is outside (0, 2].
    """
    if not 0 < alpha <= 2:
        raise ValueError(f"alpha={alpha} is outside (0, 2]: 2 is Gaussian, 1 is Cauchy's law")
    values = torch.empty(shape, device=generator.device) if out is None else out
    if alpha == 2:
        return values.normal_(generator=generator).mul_(math.sqrt(2))
    for piece in _pieces(values):
        angle, other = _words(len(piece), generator)
        sine, cosine = over_cosine(alpha, angle.abs().mul_(2.0**-32))
        if alpha != 1:
            exponential = _log_of(other, small=alpha < 1)
            sine *= cosine.div_(exponential).pow_((1 - alpha) / alpha)
        torch.copysign(sine, angle, out=piece)
    return values if alpha >= 0.5 else values.nan_to_num_()


def over_cosine(alpha: float, edge: Tensor) -> tuple[Tensor, Tensor]:
    """sin(alpha U) / cos U and cos((1 - alpha) U) / cos U, U = pi (1/2 - edge), exact also where U is nearly pi/2."""
    cosine = edge.mul(math.pi).sin_()
    if alpha <= 1:
        sine = (0.5 - edge).mul_(alpha * math.pi).sin_()
    else:  # sin(alpha U) = sin(pi - alpha U)
        sine = edge.mul(alpha * math.pi).add_((1 - alpha / 2) * math.pi).sin_()
    slope = abs(1 - alpha)
    return sine.div_(cosine), edge.mul(slope * math.pi).add_((1 - slope) * math.pi / 2).sin_().div_(cosine)


def positive(index: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent A >= 0 with the Laplace transform E exp(-sA) = exp(-s^index), 0 < index <= 1; A = 1 at index 1.

    By Kanter (1975) from U uniform on (0, pi) and E exponential, with a the index,

        A = sin(a U) / sin U * (sin((1 - a) U) / (E sin U))^((1 - a) / a).

    sqrt(2 A) G, with G normal and a = alpha / 2, has the characteristic function exp(-|t|^alpha).

    Raises:
        ValueError: the index is outside (0, 1].
    """
    if not 0 < index <= 1:
        raise ValueError(f"index={index} is outside (0, 1]: of alpha-stable noise it is alpha / 2")
    values = torch.empty(shape, device=generator.device)
    for piece in _pieces(values):
        angle, other = _words(len(piece), generator)
        far = (angle < 0).float()  # whether the angle is counted from pi
        angle = angle.abs().mul_(math.pi * 2.0**-32)
        sine = angle.sin()
        first = _sine_of_part(index, angle, far).div_(sine)
        second = _sine_of_part(1 - index, angle, far).div_(sine)
        exponential = _log_of(other, small=True)
        torch.mul(first, second.div_(exponential).pow_((1 - index) / index), out=piece)
    return values if index >= 0.5 else values.nan_to_num_()


def _sine_of_part(part: float, angle: Tensor, far: Tensor) -> Tensor:
    """sin(part U) of U = angle or, where far is 1, pi - angle; never of a number near pi by subtraction."""
    if part <= 0.5:
        return (far * math.pi - angle).abs_().mul_(part).sin_()
    return (angle * part).add_(far, alpha=(1 - part) * math.pi).sin_()


def lengths(alpha: float, shape: tuple[int, ...], generator: torch.Generator, out: Tensor | None = None) -> Tensor:
    """sqrt(2 A) with A of `positive` at alpha / 2: what makes a row of normal variates rotationally invariant noise.

    Below alpha = 1 it ends at 2.6e19, where A is float32's largest number.
    """
    values = positive(alpha / 2, shape, generator).sqrt_().mul_(math.sqrt(2))
    return values if out is None else out.copy_(values)


def normal(shape: tuple[int, ...], generator: torch.Generator, out: Tensor | None = None) -> Tensor:
    """Independent N(0, 1)."""
    return (torch.empty(shape, device=generator.device) if out is None else out).normal_(generator=generator)


def factors(
    kind: Kind, alpha: float, shape: tuple[int, ...], kernels: bool = False, draw: Draw | None = None
) -> list[tuple[tuple[int, ...], Draw]]:
    """The paper's noise on a weight of `shape` in one step as independent factors: their shapes and what draws them.

    The noise is their product, of the first one's shape, and is broadcast to the weight.

    - "neuron": one variate for all weights of a neuron, which dimension 0 counts;
    - "weight": independent variates;
    - "rotation": sub-Gaussian noise sqrt(2 A) G, an A for each neuron and a G for each weight. Its characteristic
      function is exp(-|t|^alpha), |t| the Euclidean norm over a neuron: each number alone has the law of `symmetric`,
      and those of a neuron are large together. Deviation: the published code leaves the 2 out, which makes its noise
      of this kind smaller than that of the others by sqrt(2).

    Args:
        kind: as above.
        alpha: the stability index.
        shape: of the weight, (out, in) or (out, in, height, width).
        kernels: a neuron of a convolution is one kernel (out, in) instead of a filter (out).
        draw: what draws "weight" instead of `symmetric`.
    """
    rows = rows_of(shape, kernels)
    if kind == "rotation":
        return [(shape, normal), (rows, partial(lengths, alpha))]
    return [(rows, partial(symmetric, alpha))] if kind == "neuron" else [(shape, draw or partial(symmetric, alpha))]


def noise(
    kind: Kind, alpha: float, shape: tuple[int, ...], generator: torch.Generator, kernels: bool = False
) -> Tensor:
    """The noise of one step, the product of its `factors`, to be broadcast to the weight.

    >>> generator = torch.Generator().manual_seed(0)
    >>> [tuple(noise(kind, 1.75, (6, 3, 5, 5), generator).shape) for kind in ("neuron", "weight", "rotation")]
    [(6, 1, 1, 1), (6, 3, 5, 5), (6, 3, 5, 5)]
    """
    first, *others = (draw(size, generator, None) for size, draw in factors(kind, alpha, shape, kernels))
    for other in others:
        first *= other
    return first


def rows_of(shape: tuple[int, ...], kernels: bool = False) -> tuple[int, ...]:
    """The shape, with ones, of one number a neuron, or a kernel.

    >>> rows_of((6, 3, 5, 5)), rows_of((6, 3, 5, 5), kernels=True), rows_of((4, 7), kernels=True)
    ((6, 1, 1, 1), (6, 3, 1, 1), (4, 1))
    """
    kept = 2 if kernels and len(shape) > 2 else 1
    return (*shape[:kept], *(1 for _ in shape[kept:]))


def _pieces(values: Tensor) -> tuple[Tensor, ...]:
    return values.view(-1).split(PIECE if values.device.type == "cpu" else max(1, values.numel()))


def _words(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two times `count` odd halves, -2^31 + 1/2 to 2^31 - 1/2, rounded to float32: symmetric, and never 0."""
    drawn = torch.empty(count, dtype=torch.int64, device=generator.device).random_(-(2**63), None, generator=generator)
    first, second = drawn.view(torch.int32).view(-1, 2).unbind(1)
    return first.float().add_(0.5), second.float().add_(0.5)


def _log_of(word: Tensor, small: bool) -> Tensor:
    """An exponential variate of an odd half, fine where it is small or where it is large.

    Where rounding makes it infinite (small) or 0, a power of it is 0 in all that is made of it here.
    """
    uniform = word.abs_().mul_(2.0**-31)  # in (0, 1], 1 by rounding
    return uniform.neg_().log1p_().neg_() if small else uniform.log_().neg_()
