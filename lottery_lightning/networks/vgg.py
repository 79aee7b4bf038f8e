"""VGG networks for CIFAR: 3 x 3 convolutions, one linear layer."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from lottery_lightning.networks.initialisation import Initialisation, initialise, reset_norms


class VGG(nn.Module):
    """3 x 3 convolutions with ReLU in the order of a plan, global average pooling, `output`.

    Convolutions have no bias. Deviation: the published VGG-16 and VGG-19 (open_lth) have one, which batch norm
    cancels; that adds 4,224 and 5,504 parameters. In a config write `lottery_lightning.networks.VGG`, because
    torchvision has a VGG too.

    Args:
        plan: channels of each convolution, and "M" for 2 x 2 max pooling.
        batch_norm: after each convolution.
        bias: of `output`.
        classes: number of logits.
        init: see `initialise`; norm layers begin at scale 1 and shift 0.
    """

    def __init__(
        self,
        plan: Sequence[int | Literal["M"]],
        batch_norm: bool = True,
        bias: bool = True,
        classes: int = 10,
        init: Initialisation = "kaiming_normal",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for step in plan:
            if step == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(before, step, 3, padding=1, bias=False))
            if batch_norm:
                layers.append(nn.BatchNorm2d(step))
            layers.append(nn.ReLU())
            before = step
        if not layers:
            raise ValueError("plan=[] makes no layer: give channels and poolings, as in [64, 64, 'M', 128, 128]")
        self.features = nn.Sequential(*layers)
        self.output = nn.Linear(before, classes, bias)
        self.init: Initialisation = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw all weights from the global random state; norm layers begin anew, running statistics too."""
        reset_norms(self)
        initialise(self, self.init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 3, height, width), sides of 2 ** poolings at least."""
        return self.output(self.features(images).mean((2, 3)))


def pooled(*stages: Sequence[int]) -> list[int | Literal["M"]]:
    """The plan of stages with a max pooling between each two."""
    plan: list[int | Literal["M"]] = []
    for stage in stages:
        plan += ["M", *stage] if plan else stage
    return plan


class VGG16(VGG):
    """VGG-16 of arXiv 1912.05671: 14,724,042 parameters, 14,710,464 of them in 13 convolutions; batch norm.

    Arguments: see `VGG`.
    """

    def __init__(self, classes: int = 10, init: Initialisation = "kaiming_normal") -> None:
        plan = pooled([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3)
        super().__init__(plan, classes=classes, init=init)


class VGG19(VGG):
    """VGG-19 of arXiv 1803.03635: 20,035,018 parameters, 20,018,880 of them in 16 convolutions; batch norm.

    Arguments: see `VGG`.
    """

    def __init__(self, classes: int = 10, init: Initialisation = "glorot_normal") -> None:
        plan = pooled([64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4)
        super().__init__(plan, classes=classes, init=init)


class VGG11Wide(VGG):
    """The wide VGG-11 of arXiv 2306.08125: 36,877,696 weights, neither biases nor batch norm.

    Eight convolutions of 128 to 1,024 channels with a max pooling after the last as well. Arguments: see `VGG`.
    """

    def __init__(self, classes: int = 10, init: Initialisation = "kaiming_normal_fan_out") -> None:
        plan = [*pooled([128], [256], [512] * 2, [1024] * 2, [1024] * 2), "M"]
        super().__init__(plan, batch_norm=False, bias=False, classes=classes, init=init)
