"""LeNet-5 for 28 x 28 images."""

from torch import Tensor, nn

from lottery_lightning.networks.initialisation import Initialisation, initialise


class LeNet5(nn.Module):
    """LeCun et al. (1998) with ReLU and max pooling, as in arXiv 2006.07990: 61,470 weights and 236 biases.

    Convolutions of 6 and 16 channels (5 x 5, the first padded to 32 x 32), then 400-120-84-classes; the last
    layer is `output`.

    Args:
        classes: number of logits.
        init: see `initialise`.
    """

    def __init__(self, classes: int = 10, init: Initialisation = "glorot_normal") -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
        self.output = nn.Linear(84, classes)
        self.init: Initialisation = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw all weights from the global random state."""
        initialise(self, self.init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 1, 28, 28)."""
        return self.output(self.hidden(self.features(images)))
