"""Augmentation of whole batches on the device that they lie on."""

import torch
from torch import Tensor


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
