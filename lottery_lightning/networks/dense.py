"""Dense networks of any widths."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from lottery_lightning.networks.initialisation import Initialisation, initialise


class Dense(nn.Module):
    """Fully connected ReLU network; images of any shape are flattened.

    `Dense([784, 300, 100, 10])` is LeNet-300-100 of arXiv 1803.03635: 266,200 weights and 410 biases;
    `Dense([784, 500, 10], bias=False)` is the target of arXiv 2006.07990: 397,000 weights.
    The last layer is `output`, those before it `hidden.0`, `hidden.1`, ...

    Args:
        widths: sizes from the input to the output.
        bias: whether layers have one.
        init: see `initialise`.
    """

    def __init__(self, widths: Sequence[int], bias: bool = True, init: Initialisation = "glorot_normal") -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths={list(widths)} makes no layer: give input and output, as in [784, 300, 100, 10]")
        inner = list(widths[:-1])
        self.hidden = nn.ModuleList(nn.Linear(i, o, bias) for i, o in itertools.pairwise(inner))
        self.output = nn.Linear(inner[-1], widths[-1], bias)
        self.init: Initialisation = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw all weights from the global random state."""
        initialise(self, self.init)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, widths[-1]) of images (batch, ...)."""
        values = images.flatten(1)
        for layer in self.hidden:
            values = layer(values).relu()
        return self.output(values)
