"""Residual networks for CIFAR."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lottery_lightning.networks.initialisation import Initialisation, initialise, reset_norms
from lottery_lightning.networks.layout import channels_last

Shortcut = Literal["projection", "padding"]


class ResNet(nn.Module):
    """Residual network of basic blocks with batch norm and ReLU (He et al., arXiv 1512.03385, section 4.2).

    A 3 x 3 convolution to widths[0], no max pooling; stages of `blocks` blocks each, every stage but the first
    begins with stride 2; global average pooling; `output`. Convolutions have no bias. In a config write
    `lottery_lightning.networks.ResNet`, because torchvision has a ResNet too.

    Args:
        widths: channels of each stage.
        blocks: blocks in each stage.
        shortcut: around a block that changes the shape: "projection" is a 1 x 1 convolution with batch norm (option
            B), "padding" takes every other pixel and adds channels of zeros (option A, no parameters).
        classes: number of logits.
        init: see `initialise`; norm layers begin at scale 1 and shift 0.
    """

    def __init__(
        self,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 3,
        shortcut: Shortcut = "projection",
        classes: int = 10,
        init: Initialisation = "kaiming_normal",
    ) -> None:
        super().__init__()
        if not widths or blocks < 1:
            raise ValueError(f"widths={list(widths)}, blocks={blocks} makes no stage: give widths, as in [16, 32, 64]")
        if shortcut not in ("projection", "padding"):
            raise ValueError(f"shortcut={shortcut!r} is not known: choose projection or padding")
        self.conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(Block(before, width, 2 if stage and not block else 1, shortcut))
                before = width
        self.blocks = nn.Sequential(*layers)
        self.output = nn.Linear(before, classes)
        self.init: Initialisation = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw all weights from the global random state; norm layers begin anew, running statistics too."""
        reset_norms(self)
        initialise(self, self.init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 3, height, width)."""
        values = self.norm(self.conv(channels_last(images))).relu()
        return self.output(self.blocks(values).mean((2, 3)))


class Block(nn.Module):
    """relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x)))))) with 3 x 3 convolutions, the first of the given stride.

    The shortcut is the identity where the shape stays.
    """

    def __init__(self, before: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            if shortcut == "projection":
                self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            else:
                self.shortcut = Padding(width - before, stride)

    def forward(self, values: Tensor) -> Tensor:
        """(batch, before, h, w) to (batch, width, h / stride, w / stride), rounded up."""
        residual = self.norm1(self.conv1(values)).relu()
        return (self.shortcut(values) + self.norm2(self.conv2(residual))).relu()


class Padding(nn.Module):
    """Every `stride`-th pixel, and `extra` channels of zeros after the others: the shortcut without parameters."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, values: Tensor) -> Tensor:
        """(batch, channels, h, w) to (batch, channels + extra, h / stride, w / stride), rounded up."""
        return F.pad(values[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class ResNet20(ResNet):
    """ResNet-20: widths w, 2w, 4w, three blocks a stage.

    At w = 16, with projections, 272,474 parameters, of which 270,256 in convolutions (2,560 of them in shortcuts);
    with padding, as in arXiv 1512.03385, 269,722 and 267,696.

    The lottery ticket paper (arXiv 1803.03635) calls it ResNet-18, with 274K parameters of which 270K in
    convolutions: that is the network with projections, 274,042 with its norm layers' running statistics. Its
    densities (41.7, 27.1, 11.8 %) are of all weights, with neither shortcuts nor `output` pruned.

    Args:
        shortcut: see `ResNet`.
        classes: number of logits.
        init: see `initialise`.
        width: w, channels of the first stage.
    """

    def __init__(
        self,
        shortcut: Shortcut = "projection",
        classes: int = 10,
        init: Initialisation = "glorot_normal",
        width: int = 16,
    ) -> None:
        super().__init__([width * factor for factor in (1, 2, 4)], 3, shortcut, classes, init)


class ResNet18(ResNet):
    """ResNet-18 for small images: widths w, 2w, 4w, 8w, two blocks a stage, projections.

    11,173,962 parameters at w = 64; 2,797,610 at w = 32, which is what the code of arXiv 2310.18769 (after Kim et
    al., arXiv 2205.14959) trains on CIFAR.

    Args:
        width: w, channels of the first stage.
        classes: number of logits.
        init: see `initialise`; the default is that of the same code.
    """

    def __init__(self, width: int = 64, classes: int = 10, init: Initialisation = "kaiming_normal_fan_out") -> None:
        super().__init__([width * factor for factor in (1, 2, 4, 8)], 2, "projection", classes, init)


class ResNet10(ResNet):
    """ResNet-10: `ResNet18` with one block a stage; 4,903,242 parameters at w = 64 and 1,228,970 at w = 32.

    Args:
        width: w, channels of the first stage.
        classes: number of logits.
        init: see `initialise`.
    """

    def __init__(self, width: int = 64, classes: int = 10, init: Initialisation = "kaiming_normal_fan_out") -> None:
        super().__init__([width * factor for factor in (1, 2, 4, 8)], 1, "projection", classes, init)
