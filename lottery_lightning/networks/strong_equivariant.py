"""The strong tickets of group convolutions (arXiv 2410.14754, theorem 4): masks act on equivariant coefficients."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lottery_callbacks.functional.strong_layer import StrongLayer
from lottery_callbacks.strong_modules import StrongConv2d
from lottery_lightning.networks.groups import check_grid, expanded


class StrongGroupConv2d(StrongConv2d):
    """The ticket of a `GroupConv2d`: hidden channels by the identity's coefficient, ReLU, then a group convolution.

    Hidden features u_r x[j] keep every input feature's place and group element, so that they turn with it; their
    positive and negative parts are split by the sign of u_r, since the group permutes values and changes no sign. The
    second layer's coefficients v are the core's outputs (channel, shift, tap), and its filters are gathered from them
    as the target's are: whatever is kept, the layer is exactly equivariant. A random weight is one coefficient.

    Deviation: the first random layer has but the identity's coefficient for each pair of channels, a 1 x 1 convolution,
    as the proofs for plain convolutions have it. With all coefficients, of which the theorem's proof prunes the others,
    it would have as many times more weights, and a ticket a lower density than the one that is counted here.
    """

    dimensions = 5
    index: Tensor

    def __init__(self, name: str, ticket: StrongLayer, size: int | None, scale: float, like: Any) -> None:
        super().__init__(name, ticket, size, scale, like)
        self.register_buffer("index", like.index, persistent=False)

    @property
    def kind(self) -> str:
        return f"{super().kind} of {len(self.index)} group elements"

    def convolved(self, padded: Tensor, kernel: Tensor) -> Tensor:
        check_grid(padded.shape, self.kernel_size[0], self.stride[0], 0)
        return F.conv2d(padded.flatten(1, -3), self.unrolled(kernel), stride=self.stride).unflatten(
            1, (-1, len(self.index))
        )

    def unrolled(self, kernel: Tensor) -> Tensor:
        return expanded(kernel, self.index.to(kernel.device))


class StrongLiftingConv2d(StrongGroupConv2d):
    """The ticket of a `LiftingConv2d`: as `StrongGroupConv2d`, from images."""

    dimensions = 4
