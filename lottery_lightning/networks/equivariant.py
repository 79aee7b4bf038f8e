"""Group-equivariant convolutional networks, for rotations by 90 degrees (C4) and with reflections (D4)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lottery_lightning.networks.groups import Group, check_grid, expanded, filter_table, order
from lottery_lightning.networks.initialisation import Initialisation, initialise, reset_norms
from lottery_lightning.networks.strong_equivariant import StrongGroupConv2d, StrongLiftingConv2d


class GroupConv2d(nn.Conv2d):
    """Convolution of feature maps on the group (Cohen & Welling, arXiv 1602.07576, equation 11).

        out[o, g](x) = bias[o] + sum_{i, h, y} weight[o, i, g^-1 h](g^-1 y) in[i, h](x + y)

    `weight` (out, in, |G|, kernel, kernel) is the canonical filter bank: the |G| transformed filters are gathered
    from it in every forward, so that any mask on `weight` keeps the layer exactly equivariant. One bias per output
    channel. Fans, and so initialisation, are those of `weight`: fan_in = in |G| kernel^2.

    Args:
        in_channels: channels of the input, (batch, in, |G|, size, size).
        out_channels: channels of the output, (batch, out, |G|, size', size').
        kernel: size of the square window.
        group: "C4" or "D4".
        stride: of the windows.
        padding: zeros on each side.
        bias: whether there is one.

    Raises:
        ValueError: an unknown group; in forward, a grid that the group does not map onto itself (see `check_grid`).

    Cost: a convolution of (out |G|, in |G|, kernel, kernel), and a gather of as many weights.
    """

    lifting = False
    strong_form: type[StrongGroupConv2d] = StrongGroupConv2d
    index: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        group: Group = "C4",
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding, bias=bias)
        planes = [] if self.lifting else [order(group)]
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *planes, kernel, kernel))
        self.register_buffer("index", filter_table(group, kernel, self.lifting), persistent=False)
        self.grid = (kernel, stride, padding)
        self.reset_parameters()

    def expanded(self) -> Tensor:
        """The filters of all group elements, (out |G|, in |G|, kernel, kernel); of a lifting (out |G|, in, ...)."""
        return expanded(self.weight, self.index)

    def forward(self, input: Tensor) -> Tensor:
        """Feature maps (batch, out, |G|, size', size')."""
        check_grid(input.shape, *self.grid)
        bias = None if self.bias is None else self.bias.repeat_interleave(len(self.index))
        maps = self._conv_forward(input.flatten(1, -3), self.expanded(), bias)
        return maps.unflatten(1, (-1, len(self.index)))


class LiftingConv2d(GroupConv2d):
    """Convolution that lifts images to feature maps on the group (arXiv 1602.07576, equation 10).

        out[o, g](x) = bias[o] + sum_{i, y} weight[o, i](g^-1 y) in[i](x + y)

    `weight` is (out, in, kernel, kernel) and the input (batch, in, size, size); else as `GroupConv2d`.
    """

    lifting = True
    strong_form = StrongLiftingConv2d


class GroupMaxPool2d(nn.Module):
    """Maximum over windows of `kernel` x `kernel` at a stride of `kernel`, in each plane of the group by itself.

    Raises:
        ValueError: in forward, a size that `kernel` does not divide.
    """

    lipschitz = 1.0  # no place is in two windows

    def __init__(self, kernel: int = 2) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, features: Tensor) -> Tensor:
        """Feature maps (batch, channels, |G|, size / kernel, size / kernel)."""
        check_grid(features.shape, self.kernel, self.kernel, 0)
        return F.max_pool2d(features.flatten(1, 2), self.kernel).unflatten(1, features.shape[1:3])

    def extra_repr(self) -> str:
        return str(self.kernel)


class GroupCNN(nn.Module):
    """Images to logits that no element of the group changes; by default P4CNN for rotated MNIST (arXiv 1602.07576).

    A lifting and then group convolutions without padding, each with batch norm (one affine pair a channel, shared
    by the group) and ReLU; the maximum over group and space; the linear layer `output`. Default: seven layers of
    10 channels, 28 -> 26 -> 24, pooled to 12 -> 10 -> 8 -> 6 -> 4 -> 1; 24,590 weights and 150 biases and norms.
    Deviation: the paper reads logits from the seventh convolution, without norm, ReLU and linear layer.

    Args:
        group: "C4" (the paper's p4) or "D4" (p4m).
        channels: of each layer.
        kernels: of each layer.
        pool_after: layers, counted from 1, that a 2 x 2 max pooling follows; it needs an even size.
        classes: number of logits.
        init: see `initialise`.

    Raises:
        ValueError: arguments that do not fit together; in forward, a grid that the group does not map onto itself.
    """

    def __init__(
        self,
        group: Group = "C4",
        channels: Sequence[int] = (10, 10, 10, 10, 10, 10, 10),
        kernels: Sequence[int] = (3, 3, 3, 3, 3, 3, 4),
        pool_after: Sequence[int] = (2,),
        classes: int = 10,
        init: Initialisation = "glorot_normal",
    ) -> None:
        super().__init__()
        depth = len(channels)
        if not depth or depth != len(kernels):
            raise ValueError(f"{depth} channels and {len(kernels)} kernels: give one of each a layer, at least one")
        if wrong := set(pool_after) - set(range(1, depth + 1)):
            raise ValueError(f"pool_after names {sorted(wrong)}: layers are counted from 1 to {depth}")
        layers: list[nn.Module] = []
        for number, (width, kernel) in enumerate(zip(channels, kernels, strict=True), start=1):
            before, convolution = (channels[number - 2], GroupConv2d) if number > 1 else (1, LiftingConv2d)
            layers += [convolution(before, width, kernel, group, bias=False), nn.BatchNorm3d(width), nn.ReLU()]
            layers += [GroupMaxPool2d()] if number in pool_after else []
        self.features = nn.Sequential(*layers)
        self.output = nn.Linear(channels[-1], classes)
        self.init: Initialisation = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw all weights from the global random state; norm layers begin anew."""
        reset_norms(self)
        initialise(self, self.init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 1, 28, 28), or of another size that the layers fit."""
        return self.output(self.features(images).amax((2, 3, 4)))
