"""What makes network inputs of pixels: normalisation by channel, then perhaps whitening."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CHUNK = 1000  # images whitened at a time: 12 MB of CIFAR-10


@dataclass(frozen=True, eq=False)
class Whitening:
    """The linear map x -> (x - mean) @ matrix of flattened, normalised images; see `whitening.zca`.

    Attributes:
        mean: (d,) float32.
        matrix: (d, d) float32, symmetric and invertible.
    """

    mean: Tensor
    matrix: Tensor

    @cached_property
    def inverse(self) -> Tensor:
        """The inverse matrix, (d, d); computed once, a second of CPU for CIFAR-10."""
        return torch.linalg.inv(self.matrix.double()).to(self.matrix.dtype)


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """From pixels in [0, 1] to what a network is given: (x - mean) / deviation by channel, then the whitening.

    Attributes:
        mean: one number a channel.
        deviation: one number a channel, positive.
        whitening: applied last; None for none.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    whitening: Whitening | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Images (n, channels, height, width) in [0, 1], on any device, preprocessed: a new tensor."""
        mean, deviation = self._by_channel(pixels)
        images = (pixels - mean).div_(deviation)
        if self.whitening is not None:
            center, matrix = self.whitening.mean.to(images), self.whitening.matrix.to(images)
            for chunk in images.split(CHUNK):  # flattened one by one: all at once may be a copy
                chunk.copy_(((chunk.flatten(1) - center) @ matrix).view(chunk.shape))
        return images

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse, clamped to [0, 1], for pictures: preprocessed images (n, channels, height, width) as pixels."""
        if self.whitening is not None:
            flat = images.flatten(1) @ self.whitening.inverse.to(images) + self.whitening.mean.to(images)
            images = flat.view(images.shape)
        mean, deviation = self._by_channel(images)
        return (images * deviation + mean).clamp(0, 1)

    def difference(self, other: "Preprocessing") -> str | None:
        """What differs in `other`, as a phrase for a message; None if nothing does.

        Whitenings are equal up to 0.1 % or 1e-4 a number: computed anew on another machine they are not the same bits.
        """
        if (self.mean, self.deviation) != (other.mean, other.deviation):
            return (
                f"normalised by mean {self.mean} and deviation {self.deviation}, "
                f"not by mean {other.mean} and deviation {other.deviation}"
            )
        mine, theirs = self.whitening, other.whitening
        if mine is None or theirs is None:
            return None if mine is theirs else "whitened, not left as they are" if mine else "not whitened"
        pairs = ((mine.mean, theirs.mean), (mine.matrix, theirs.matrix))
        if all(a.shape == b.shape and torch.allclose(a, b.to(a), rtol=1e-3, atol=1e-4) for a, b in pairs):
            return None
        return "whitened by another matrix"

    def _by_channel(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = (torch.tensor(values).to(images).view(1, -1, 1, 1) for values in (self.mean, self.deviation))
        return mean, deviation
