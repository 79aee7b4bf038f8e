"""The groups C4 and D4: their tables, and how they act on images, feature maps and filters.

Element g = i + 4 j is r^i m^j: m reflects the last axis (left and right change places), then r turns by 90 degrees
counterclockwise i times. C4 is {0, ..., 3}, D4 is {0, ..., 7}, and 0 is the identity.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Group = Literal["C4", "D4"]
ORDERS: dict[str, int] = {"C4": 4, "D4": 8}


def order(group: str) -> int:
    """Number of elements, |G|.

    Raises:
        ValueError: an unknown group.
    """
    if group not in ORDERS:
        raise ValueError(f"group={group!r} is not known: choose {' or '.join(ORDERS)}")
    return ORDERS[group]


def compose(g: int, h: int) -> int:
    """The element g h, which acts as h and then g; from m r = r^-1 m.

    >>> compose(4, 1), compose(1, 4)
    (7, 5)
    """
    turns = g + (-h if g >= 4 else h)
    return turns % 4 + 4 * ((g // 4 + h // 4) % 2)


def inverse(g: int) -> int:
    """The element that undoes g: r^-i of a rotation; a reflection undoes itself."""
    return g if g >= 4 else -g % 4


def transform(images: Tensor, g: int) -> Tensor:
    """The action on images (..., size, size): (g f)(x) = f(g^-1 x)."""
    return (images.flip(-1) if g >= 4 else images).rot90(g % 4, (-2, -1))


def transform_features(features: Tensor, g: int) -> Tensor:
    """The action on feature maps (..., |G|, size, size): (g f)[h](x) = f[g^-1 h](g^-1 x)."""
    return transform(features[..., _shifted(g, features.shape[-3]), :, :], g)


def filter_table(group: str, kernel: int, lifting: bool) -> Tensor:
    """Where each tap of the |G| transformed filters lies in the flat canonical filter.

    Row g of the table (|G|, taps) takes a filter psi of kernel^2 taps (lifting) or |G| kernel^2 taps to g psi; the
    group acts on the taps as on images or on feature maps. Each row is a permutation.
    """
    planes = [] if lifting else [order(group)]
    taps = torch.arange(kernel**2 * (1 if lifting else order(group))).view(*planes, kernel, kernel)
    act = transform if lifting else transform_features
    return torch.stack([act(taps, g).reshape(-1) for g in range(order(group))])


def expanded(weight: Tensor, table: Tensor) -> Tensor:
    """The filters of all group elements from a canonical bank (out, in, ...), by the table of `filter_table`.

    (out |G|, in |G|, kernel, kernel) of (out, in, |G|, kernel, kernel); of a lifting (out |G|, in, kernel, kernel).
    """
    taps = weight.flatten(2).unsqueeze(1)  # (out, 1, in, taps)
    shape = (len(taps), len(table), *taps.shape[2:])
    # Rows are permutations: no two gradients meet in the gather, whose backward is thus deterministic everywhere.
    filters = taps.expand(shape).gather(3, table.unsqueeze(1).expand(shape))
    return filters.reshape(shape[0] * shape[1], -1, *weight.shape[-2:])


def check_grid(shape: Sequence[int], kernel: int, stride: int, padding: int) -> None:
    """Refuse windows on images (..., height, width) whose grid the group does not map onto itself.

    Raises:
        ValueError: the image is not square, or (size + 2 padding - kernel) is no multiple of the stride: the last
            pixels would be left out on one side only.
    """
    height, width = shape[-2:]
    if height != width:
        raise ValueError(f"a quarter turn does not map a grid of {height} x {width} onto itself: pad or crop to square")
    if (rest := height + 2 * padding - kernel) < 0 or rest % stride:
        raise ValueError(
            f"windows of {kernel} at stride {stride}, padding {padding}, do not cover a grid of {height} x {width} "
            f"evenly: size + 2 padding - kernel = {rest} must be a multiple of the stride, 0 or more; change one of "
            "them, or the image's size"
        )


def _shifted(g: int, planes: int) -> list[int]:
    return [compose(inverse(g), h) for h in range(planes)]
