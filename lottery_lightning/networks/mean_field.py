"""One hidden layer in the mean-field scaling: the network of the theory of heavy-tailed SGD."""

import torch
from torch import Tensor, nn


class MeanField(nn.Module):
    """f(x) = (1 / n) sum_i s_i relu(theta_i . x): n hidden units, whose output weights s_i stay as they are drawn.

    The setting of the theorems of arXiv 2306.08125 (section 2): the rows theta_i of `hidden.weight` are the columns of
    the paper's Theta, independent at the start, theta_i ~ N(0, I / inputs), and s_i in {-1, 1} for each class, fair
    coins. A step of SGD with learning rate eta is the paper's Theta - eta n grad R: the gradient of `hidden.weight` is
    n times that of f, which is as large as one unit's, so that eta means the same at every width. The value of f is
    not changed by that.

    Args:
        inputs: numbers in one example; examples of any shape are flattened.
        width: n, hidden units.
        classes: outputs.
    """

    def __init__(self, inputs: int, width: int, classes: int = 10) -> None:
        super().__init__()
        if inputs < 1 or width < 1 or classes < 1:
            raise ValueError(f"inputs={inputs}, width={width}, classes={classes}: all must be positive")
        self.hidden = nn.Linear(inputs, width, bias=False)
        self.signs: Tensor
        self.register_buffer("signs", torch.empty(classes, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw theta and s from the global random state."""
        nn.init.normal_(self.hidden.weight, std=self.hidden.in_features**-0.5)
        self.signs.bernoulli_(0.5).mul_(2).sub_(1)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs (batch, classes) of images (batch, ...)."""
        width = self.hidden.out_features
        values = self.hidden(images.flatten(1)).relu() @ self.signs.T / width
        return values + (width - 1) * (values - values.detach())
