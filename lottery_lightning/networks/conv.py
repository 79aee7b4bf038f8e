"""Conv-2, Conv-4 and Conv-6 for 32 x 32 colour images."""

from typing import Literal

from torch import Tensor, nn

from lottery_lightning.networks.initialisation import Initialisation, initialise
from lottery_lightning.networks.layout import channels_last


class Conv(nn.Module):
    """The small VGG-like networks of arXiv 1803.03635 (figure 2): pairs of 3 x 3 convolutions, each pair max-pooled.

    Pairs have 64, 128 and 256 channels; then come dense layers of 256 and 256 units and `output`. Weights (of which
    convolutional): Conv-2 4,300,992 (38,592), Conv-4 2,425,024 (259,776), Conv-6 2,261,184 (1,144,512).
    Deviation: the paper's table gives 1.7 M for Conv-6, which its own percentages and a 4,096-wide first dense layer
    contradict.

    Inside, channels are the last in memory: faster on a CPU, and max pooling then takes as long for a sparse
    network as for a dense one (results/training_speed.md).

    Args:
        depth: number of convolutions: 2, 4 or 6.
        classes: number of logits.
        init: see `initialise`.
    """

    def __init__(self, depth: Literal[2, 4, 6] = 2, classes: int = 10, init: Initialisation = "glorot_normal") -> None:
        super().__init__()
        if depth not in (2, 4, 6):
            raise ValueError(f"depth={depth} is none of the paper's networks: choose 2, 4 or 6")
        layers: list[nn.Module] = []
        before, size = 3, 32
        for channels in (64, 128, 256)[: depth // 2]:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            before, size = channels, size // 2
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(before * size**2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.output = nn.Linear(256, classes)
        self.init: Initialisation = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw all weights from the global random state."""
        initialise(self, self.init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 3, 32, 32)."""
        return self.output(self.hidden(self.features(channels_last(images))))
