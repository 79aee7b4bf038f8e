"""The convolutional network of the dataset distillation literature."""

from torch import Tensor, nn

from lottery_lightning.networks.initialisation import Initialisation, initialise, reset_norms


class ConvNet(nn.Module):
    """ConvNet-3 of arXiv 2310.18769 (as in the code of Kim et al., arXiv 2205.14959): 320,010 parameters.

    `depth` times: 3 x 3 convolution, instance norm with scale and shift, ReLU, 2 x 2 average pooling; then
    `output` on all that is left of the image. 318,848 of the parameters are prunable weights, 298,368 of them
    convolutional. Instance norm is `GroupNorm(width, width)`: it has no running statistics.

    Args:
        depth: number of convolutions.
        width: channels of each.
        size: height and width of the images, at least 2 ** depth.
        classes: number of logits.
        init: see `initialise`; the paper's code leaves torch's. Norm layers begin at scale 1 and shift 0.
        channels: of the images; 1 for MNIST, with size=28.
    """

    def __init__(
        self,
        depth: int = 3,
        width: int = 128,
        size: int = 32,
        classes: int = 10,
        init: Initialisation = "default",
        channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 1 or size < 2**depth:
            raise ValueError(f"depth={depth} poolings leave nothing of size={size}: give at least 1 and {2**depth}")
        layers: list[nn.Module] = []
        before = channels
        for _ in range(depth):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
            before = width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.output = nn.Linear(width * (size // 2**depth) ** 2, classes)
        self.init: Initialisation = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw all weights from the global random state; norm layers begin anew."""
        reset_norms(self)
        initialise(self, self.init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, size, size)."""
        # Group norm in bf16 takes three times as long on a CPU where augmentation leaves channels last in memory.
        return self.output(self.features(images.contiguous()))
