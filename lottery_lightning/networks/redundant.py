"""Dense networks with the redundant layers of Pensia et al., from which a subset is kept."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Copies(nn.Module):
    """`redundancy` weighted copies of each input: out[j r + s] = weight[j r + s] in[j], (batch, in r) of (batch, in).

    `weight` is (in r, 1): each copy has one input.
    """

    def __init__(self, inputs: int, redundancy: int) -> None:
        super().__init__()
        self.redundancy = redundancy
        self.weight = nn.Parameter(torch.empty(inputs * redundancy, 1))

    def forward(self, values: Tensor) -> Tensor:
        copies = values.unsqueeze(-1) * self.weight.view(-1, self.redundancy)
        return copies.flatten(-2)

    def extra_repr(self) -> str:
        return f"{len(self.weight) // self.redundancy}, redundancy={self.redundancy}"


class RedundantDense(nn.Module):
    """A ReLU network, each of whose layers W x is redundant: V ReLU(u * copies of x), or V (u * copies of x).

    The structure of the subset sum proofs (arXiv 2006.07990, its second experiment): every input has `redundancy`
    weighted copies, `copies.i`, and every output a weight for each of them, `layers.i`. A mask on both can make W_oj
    out of a subset of the products v_or u_r; with the ReLU inside, as the proofs have it, only for inputs of the sign
    of u_r. No biases. u ~ N(0, 2) and v ~ N(0, 2 / in), as in the published code: the variance of v does not fall with
    the redundancy, and EdgePopup's `weights="module"` keeps it so.

    Args:
        widths: sizes from the input to the output, of the network that is hidden in it.
        redundancy: copies of each input of a layer.
        relu: whether a ReLU follows the copies.
    """

    def __init__(self, widths: Sequence[int], redundancy: int = 5, relu: bool = True) -> None:
        super().__init__()
        if len(widths) < 2 or redundancy < 1:
            raise ValueError(
                f"widths={list(widths)}, redundancy={redundancy} make no layer: give two widths and one copy or more"
            )
        self.copies = nn.ModuleList(Copies(width, redundancy) for width in widths[:-1])
        self.layers = nn.ModuleList(nn.Linear(redundancy * i, o, bias=False) for i, o in pairwise(widths))
        self.relu, self.redundancy = relu, redundancy
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw all weights from the global random state."""
        for copies in self.copies.parameters():
            nn.init.normal_(copies, std=2**0.5)
        for weight in self.layers.parameters():
            nn.init.normal_(weight, std=(2 * self.redundancy / weight.shape[1]) ** 0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, widths[-1]) of images (batch, ...)."""
        values = images.flatten(1)
        for number, (copies, layer) in enumerate(zip(self.copies, self.layers, strict=True)):
            hidden = copies(values.relu() if number else values)
            values = layer(hidden.relu() if self.relu else hidden)
        return values
