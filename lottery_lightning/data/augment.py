"""Augmentation of whole batches on the device that they lie on."""

import math

import torch
from torch import Tensor, nn


def crop_and_flip(images: Tensor, generator: torch.Generator, fill: Tensor, padding: int = 4) -> Tensor:
    """Each image padded, cropped back to its size at a random place, and mirrored with probability 1/2.

    The augmentation of CIFAR-10 (He et al., arXiv 1512.03385), one gather for the batch.

    Args:
        images: (batch, _, height, width).
        generator: on the CPU; the same draws on every device. Three a batch: rows, columns, mirrors.
        fill: (channels,) value of the padding: what a black pixel is after normalisation.
        padding: pixels added on each side, the largest shift.
    """
    batch, _, height, width = images.shape
    black = fill.to(images).view(1, -1, 1, 1)
    padded = black.repeat(batch, 1, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    down, right = (torch.randint(2 * padding + 1, (batch, 1), generator=generator) for _ in range(2))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    which = torch.arange(batch, device=images.device).view(-1, 1, 1)
    rows, columns = rows.to(images.device).unsqueeze(2), columns.to(images.device).unsqueeze(1)
    return padded.movedim(1, -1)[which, rows, columns].movedim(-1, 1)


class SiameseAugmentation:
    """One randomly drawn operation on a batch, differentiable in the images (DSA, arXiv 2102.08259).

    One of the strategy's operations is drawn for the batch, its parameters for each image, or once for all with
    `same`. Two calls with equal generators and `same` do the same to two batches of any sizes: that is what makes it
    siamese. Strengths are those of the published code, on preprocessed images, whatever their channels and size:

    - "color": brightness x + U(-0.5, 0.5); then saturation, the distance from the mean of the channels times U(0, 2);
      then contrast, the distance from the image's mean times U(0.5, 1.5).
    - "crop": moved by up to 1/8 of the size in each direction; zeros come in.
    - "cutout": a square of half the size, centred anywhere, becomes 0.
    - "flip": mirrored with probability 1/2.
    - "scale": height and width divided by U(1 / 1.2, 1.2) each, bilinearly; zeros around.
    - "rotate": by U(-15, 15) degrees, bilinearly; zeros around.

    Args:
        strategy: operations joined by "_", e.g. "color_crop_cutout_flip_scale_rotate"; "" leaves images as they are.

    Raises:
        ValueError: an operation is not known.
    """

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self.operations = strategy.split("_") if strategy else []
        if unknown := [name for name in self.operations if name not in _OPERATIONS]:
            known = ", ".join(_OPERATIONS)
            raise ValueError(f"augmentation {strategy!r} names {unknown[0]!r}: join some of {known} by _")

    def __call__(self, images: Tensor, generator: torch.Generator, same: bool = False) -> Tensor:
        """New images of the shape of `images`, (batch, channels, height, width); the generator is on the CPU."""
        if not self.operations:
            return images
        name = self.operations[int(torch.randint(len(self.operations), (), generator=generator))]
        return _OPERATIONS[name](images, 1 if same else len(images), generator)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _color(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    ranges = ((-0.5, 0.5), (0.0, 2.0), (0.5, 1.5))
    shift, saturation, contrast = (
        _uniform(count, low, high, generator).to(images).view(-1, 1, 1, 1) for low, high in ranges
    )
    images = images + shift
    grey = images.mean(1, keepdim=True)
    images = grey + saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + contrast * (images - mean)


def _crop(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    height, width = images.shape[2:]
    reach = int(height / 8 + 0.5), int(width / 8 + 0.5)
    down, right = (torch.randint(2 * most + 1, (count, 1), generator=generator) for most in reach)
    rows, columns = ((down + torch.arange(height)).unsqueeze(2), (right + torch.arange(width)).unsqueeze(1))
    padded = nn.functional.pad(images, (reach[1], reach[1], reach[0], reach[0])).movedim(1, -1)
    which = torch.arange(len(images)).view(-1, 1, 1)
    return padded[tuple(index.to(images.device) for index in (which, rows, columns))].movedim(-1, 1)


def _cutout(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    inside = []
    for size in images.shape[2:]:
        side = int(size / 2 + 0.5)
        first = torch.randint(size + 1 - side % 2, (count, 1), generator=generator) - side // 2
        places = torch.arange(size)
        inside.append((places >= first) & (places < first + side))
    hole = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
    return images.masked_fill(hole.unsqueeze(1).to(images.device), 0)


def _flip(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored.to(images.device), images.flip(3), images)


def _scale(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    across, down = (_uniform(count, 1 / 1.2, 1.2, generator) for _ in range(2))
    zero = torch.zeros(count)
    return _affine(images, torch.stack([across, zero, zero, zero, down, zero], 1))


def _rotate(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    angle = _uniform(count, -math.pi / 12, math.pi / 12, generator)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(count)
    return _affine(images, torch.stack([cos, -sin, zero, sin, cos, zero], 1))


def _affine(images: Tensor, maps: Tensor) -> Tensor:
    """Bilinear samples at the places that each 2 x 3 map, a row of `maps`, gives for the pixels; 0 beyond the edge."""
    maps = maps.to(images).view(-1, 2, 3).expand(len(images), 2, 3)
    grid = nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


_OPERATIONS = {"color": _color, "crop": _crop, "cutout": _cutout, "flip": _flip, "scale": _scale, "rotate": _rotate}
