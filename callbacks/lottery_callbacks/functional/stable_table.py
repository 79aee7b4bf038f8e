"""Symmetric alpha-stable variates by the million: quantiles by straight lines from a table."""

import math

import torch
from torch import Tensor

from lottery_callbacks.functional.alpha_stable import over_cosine, symmetric

PIECE = 1 << 16  # numbers worked on at once on a CPU
CELLS = 7  # of float32's bits behind the exponent: 2^7 cells from one power of 2 to the next
NEAREST = 0.05  # of alpha to 1: the integrand of `quantiles` becomes a step, and takes many points


class StableTable:
    """Draws what `alpha_stable.symmetric` draws, about 4 times as fast on a CPU.

    A random integer k of -2^31 to 2^31 - 1 stands for the quantile with |k| / 2^32 beyond it, on the side of its sign.
    The leading bits of k as a float are the number of a cell, a 128th of a power of 2, over which the quantile x is a
    straight line. It is wrong by some (1 / alpha)(1 + 1 / alpha) 2^-17 (1 + |x|) at most, where the factor is 7e-6 at
    alpha = 1.75 and 5e-5 at 0.5, and in probability by less than 5e-6; the tail ends at one draw in 2^31. There is no
    table at alpha = 2, below 0.5, and nearer to 1 than 0.05 but not at it: there `symmetric` draws.

    Cost of making one: a twentieth of a second to half a second, the most near alpha = 1, and 512 KiB.

    Args:
        alpha: the stability index, in (0, 2].
        device: where the table lies; generators must be there.
    """

    def __init__(self, alpha: float, device: torch.device | str = "cpu") -> None:
        self.alpha = alpha
        self._lines: tuple[Tensor, Tensor] | None = None
        if 0.5 <= alpha < 2 and (alpha == 1 or abs(alpha - 1) >= NEAREST):
            start, slope = (line.to(device) for line in _lines(alpha))
            self._lines = start, slope

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, out: Tensor | None = None) -> Tensor:
        """Independent variates, float32, in `out` if it is given."""
        if self._lines is None:
            return symmetric(self.alpha, shape, generator, out)
        values = torch.empty(shape, device=generator.device) if out is None else out
        for piece in values.view(-1).split(PIECE if values.device.type == "cpu" else max(1, values.numel())):
            drawn = torch.empty((len(piece) + 1) // 2, dtype=torch.int64, device=generator.device)
            words = drawn.random_(-(2**63), None, generator=generator).view(torch.int32)
            self.quantile(words[: len(piece)], piece)
        return values

    def quantile(self, integers: Tensor, out: Tensor | None = None) -> Tensor:
        """What each integer (int32, 1-dimensional) stands for; 0 and -2^31 are 0.

        Raises:
            ValueError: there is no table at this alpha.
        """
        if self._lines is None:
            raise ValueError(f"there is no table at alpha={self.alpha}: draw from it")
        start, slope = self._lines
        number = integers.float()
        cell = (number.view(torch.int32) >> (23 - CELLS)).add_(1 << (8 + CELLS))  # negative numbers come first
        number *= slope.index_select(0, cell)
        return torch.add(start.index_select(0, cell), number, out=out)


def _lines(alpha: float) -> tuple[Tensor, Tensor]:
    """Start and slope of every cell, by the leading bits of a float; 0 where no integer leads."""
    across = 1 << CELLS
    powers = torch.arange(31, dtype=torch.float64).exp2().unsqueeze(1)
    nodes = (powers * (1 + torch.arange(across) / across)).flatten()
    nodes = torch.cat([nodes, nodes.new_tensor([2.0**31])])
    values = quantiles(alpha, nodes / 2**32)
    slopes = values.diff() / nodes.diff()
    start, slope = torch.zeros(2, 2 << (8 + CELLS))
    first = 127 << CELLS  # the bits of 1.0
    for sign, half in ((-1, 0), (1, 1 << (8 + CELLS))):
        inside = slice(half + first, half + first + len(slopes))
        start[inside], slope[inside] = sign * (values[:-1] - slopes * nodes[:-1]), slopes
    return start, slope


def quantiles(alpha: float, tails: Tensor) -> Tensor:
    """The x with P(X > x) = tail of the symmetric alpha-stable law, alpha in [0.5, 2], in float64.

    |X| = f(U) E^-p with p = (1 - alpha) / alpha is that of `symmetric`. Given U the tail is E's; over U it is summed by
    the trapezoidal rule in the logit of 2 U / pi, exact but for rounding since all falls off at both ends. In between
    log x is a cubic (Hermite) of the logit of P(|X| > x). Relative error: below 1e-6.

    Args:
        alpha: 1, or not nearer to it than 0.01; the time grows as 1 / |alpha - 1|.
        tails: probabilities in [2^-33, 1/2]; 1/2 has the quantile 0.
    """
    if alpha == 1:
        return (math.pi * (0.5 - tails)).tan()
    power = alpha / (1 - alpha)
    t = torch.arange(-25, 40, 0.4 / max(abs(power), 4), dtype=torch.float64)
    weight = (t[1] - t[0]) * t.sigmoid() * (-t).sigmoid()
    sine, cosine = over_cosine(alpha, 0.5 * (-t).sigmoid())
    scale = sine.clamp_min(1e-300).log() + cosine.log() / power
    at = torch.arange(-10, 24 / alpha + 2, 0.04, dtype=torch.float64)  # log x
    above, below, falling = (torch.empty_like(at) for _ in range(3))
    for some in torch.arange(len(at)).split(64):
        rate = (
            ((scale - at[some].unsqueeze(1)) * power).exp().clamp_max_(1e300)
        )  # P(E < rate) is P(|X| > x) if alpha < 1, else the rest
        within, beyond = (-(-rate).expm1()) @ weight, (-rate).exp() @ weight
        above[some], below[some] = (within, beyond) if alpha < 1 else (beyond, within)
        falling[some] = abs(power) * ((rate * (-rate).exp()) @ weight)
    logit, slope = below.log() - above.log(), falling / (above * below)  # ascending, and its derivative
    wanted = ((1 - 2 * tails) / (2 * tails)).log()
    right = torch.searchsorted(logit, wanted).clamp(1, len(at) - 1)
    left, width = right - 1, logit[right] - logit[right - 1]
    s = (wanted - logit[left]) / width
    rest = 1 - s
    ends = at[left] * rest**2 * (1 + 2 * s) + at[right] * s**2 * (1 + 2 * rest)
    tilts = width * s * rest * (rest / slope[left] - s / slope[right])
    return torch.where(tails < 0.5, (ends + tilts).exp(), 0.0)
