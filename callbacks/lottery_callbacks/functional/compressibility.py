"""Compressibility: how much of a layer can go for how much of its norm, after training and without any more of it.

Networks are mappings name -> weight, of which the caller chooses: by `hidden_weights`, or `Pruning(...).prunable`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lottery_callbacks.functional.masks import Masks

By = Literal["column", "magnitude", "singular_value"]
# More than float64 loses in a sum, and in a product: ties at a budget, and decimal ratios, are counted exactly.
SUM, PRODUCT = 1 + 1e-9, 1 + 1e-12
RATIOS = tuple(i / 10 for i in range(11))


def hidden_weights(weights: Mapping[str, Tensor], first_convolution: bool = True) -> dict[str, Tensor]:
    """Those of two or more dimensions but the last, which gives out the logits (arXiv 2306.08125).

    Args:
        weights: of the whole network, in the order of its layers, as `named_parameters` or a state dict give them.
        first_convolution: whether the first convolution belongs to them; the paper's code leaves it dense.
    """
    found = {name: weight for name, weight in weights.items() if weight.ndim >= 2}
    convolutions = [name for name, weight in found.items() if weight.ndim > 2]
    left = {*list(found)[-1:], *(() if first_convolution else convolutions[:1])}
    return {name: weight for name, weight in found.items() if name not in left}


def errors(weight: Tensor, by: By) -> Tensor:
    """The squared relative error ||W - W_k||_F^2 / ||W||_F^2 with the k smallest pieces removed, for k = 0, ..., n.

    Pieces are, of W as a matrix (out, in): "column" the incoming weights of a neuron, a filter of a convolution (the
    papers write W transposed; in torch it is a row); "magnitude" single weights; "singular_value" the terms of its
    singular value decomposition, of which those below max(out, in) * 2^-52 of the largest are 0.

    Returns:
        float64 (n + 1), on the weight's device: rises from 0 to exactly 1; all 0 for a weight of zeros.

    Cost: a sort of n numbers; one decomposition in float64 for singular values.

    Raises:
        ValueError: an unknown `by`, a weight of fewer than two dimensions, one that is empty or not finite.
    """
    return _errors(_energies(weight, by).sort().values)


def _errors(rising: Tensor) -> Tensor:
    removed = torch.cat([rising.new_zeros(1), rising.cumsum(0)])
    return removed / removed[-1] if removed[-1] else removed


def _energies(weight: Tensor, by: By) -> Tensor:
    """The squared norm of each piece, float64."""
    if by not in get_args(By):
        raise ValueError(f"by={by!r} is not known: choose one of {', '.join(get_args(By))}")
    if weight.ndim < 2 or not weight.numel():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is no layer's: give those of two or more dimensions")
    if not weight.isfinite().all():
        raise ValueError("the weights are not finite: did the training diverge?")
    matrix = weight.detach().double().flatten(1)
    if by == "singular_value":
        values = torch.linalg.svdvals(matrix)
        values[values <= max(matrix.shape) * torch.finfo(torch.float64).eps * values[0]] = 0
        return values.square()
    return matrix.square().sum(1) if by == "column" else matrix.square().flatten()


@dataclass(frozen=True)
class Layer:
    """A compressed layer.

    Attributes:
        weight: W_k, in the shape and type of W.
        mask: what is kept of W, True = kept; None for singular values.
        pieces: n, the number of columns, single weights or singular values.
        removed: k of them.
        error: ||W - W_k||_F^2 / ||W||_F^2.
        energy: ||W||_F^2.
        parameters: what is left: kept weights, or k (out + in) numbers of two factors where these are fewer than W's.
    """

    weight: Tensor
    mask: Tensor | None
    pieces: int
    removed: int
    error: float
    energy: float
    parameters: int

    @property
    def pruning_ratio(self) -> float:
        """The fraction of the layer's parameters that is removed."""
        return 1 - self.parameters / self.weight.numel()


@dataclass(frozen=True)
class Compressed:
    """Layers of a network, each compressed by itself; everything counts these alone, and no biases."""

    layers: dict[str, Layer]

    @property
    def pruning_ratio(self) -> float:
        """The fraction of the parameters of all these layers together that is removed.

        Layers that stay dense by choice count neither above nor below; the paper's code counts the first convolution
        as removed.
        """
        total = sum(layer.weight.numel() for layer in self.layers.values())
        return 1 - sum(layer.parameters for layer in self.layers.values()) / total

    @property
    def error(self) -> float:
        """The squared relative error of these layers taken as one vector."""
        lost = sum(layer.error * layer.energy for layer in self.layers.values())
        return lost and lost / sum(layer.energy for layer in self.layers.values())

    @property
    def masks(self) -> Masks:
        """What is kept of each layer, for tickets and `narrowed`; empty for singular values."""
        return {name: layer.mask for name, layer in self.layers.items() if layer.mask is not None}

    def state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A network's state with these weights in it, under all names of tied ones; everything else is as it was.

        ```python
        with preserved(network):  # accuracy after pruning, without retraining
            load(network, found.state(network.state_dict()))
            error = evaluate_on(batches)(network).error
        ```

        Raises:
            ValueError: names a layer that the state lacks.
        """
        if missing := self.layers.keys() - state.keys():
            raise ValueError(f"the state has no {min(missing)}: give that of the network whose weights were compressed")
        owners = {(state[name].data_ptr(), state[name].shape): name for name in self.layers}
        tied = {name: owners.get((tensor.data_ptr(), tensor.shape)) for name, tensor in state.items()}
        return {name: self.layers[own].weight if (own := tied[name]) else tensor for name, tensor in state.items()}


def compressed(
    weights: Mapping[str, Tensor], by: By = "column", *, budget: float | None = None, ratio: float | None = None
) -> Compressed:
    """Compress each of `weights` by removing its smallest pieces, of equal ones those of the lowest index first.

    With a budget a layer keeps the fewest pieces with which its squared relative error is at most that (0.1 in Wan et
    al., arXiv 2306.08125, criterion "mce"; with 0 exactly the zeros go). With a ratio it loses floor(ratio * n) of its
    n pieces, so 0.29 of 100 are 29. Nothing else stays: with ratio=1 the whole layer goes.

    Deviations from the paper's code: a layer of zeros goes whole, which its argmax keeps; the budget may be passed by a
    billionth of it, so that rounding decides no ties.

    Raises:
        ValueError: neither or both of budget in [0, 1) and ratio in [0, 1], no weights, or what `errors` refuses, by
            name.
    """
    if (budget is None) == (ratio is None):
        raise ValueError(
            "give one of budget, the squared relative error allowed, and ratio, the part of pieces removed"
        )
    if budget is not None and not 0 <= budget < 1:
        raise ValueError(f"budget={budget} is outside [0, 1): it is the part of the squared norm that may go")
    if not weights:
        raise ValueError("there is no weight to compress: name the layers")
    layers = {}
    for name, weight in weights.items():
        try:
            energies = _energies(weight, by)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        rising, order = energies.sort(stable=True)
        lost = _errors(rising)
        allowed = 0 if budget is None else int((lost <= budget * SUM).sum()) - 1
        removed = allowed if ratio is None else _count(ratio, len(order))
        left, mask, parameters = _without(weight.detach(), by, order[:removed])
        energy = float(energies.sum())
        layers[name] = Layer(left, mask, len(order), removed, float(lost[removed]), energy, parameters)
    return Compressed(layers)


class Point(NamedTuple):
    """One point of `curve`: the ratio asked for, and what all layers together lose at it."""

    ratio: float
    pruning_ratio: float
    error: float


def curve(weights: Mapping[str, Tensor], by: By = "column", ratios: Sequence[float] = RATIOS) -> list[Point]:
    """Squared relative error against the ratio: the `pruning_ratio` and `error` of `compressed` at each of `ratios`.

    The finest curve of one layer is `errors`. Cost: `compressed` for each ratio.

    Raises:
        ValueError: as `compressed`.
    """
    found = [(ratio, compressed(weights, by, ratio=ratio)) for ratio in ratios]
    return [Point(ratio, one.pruning_ratio, one.error) for ratio, one in found]


def _count(ratio: float, pieces: int) -> int:
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio} is outside [0, 1]: it is the part of columns, weights or values removed")
    return min(pieces, int(ratio * pieces * PRODUCT))


def _without(weight: Tensor, by: By, gone: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """The weight without the pieces of those indices, its mask, and its parameters."""
    if by == "singular_value":
        u, s, v = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
        s[gone] = 0
        factors = (len(s) - len(gone)) * (len(u) + v.shape[1])
        return ((u * s) @ v).view(weight.shape).to(weight.dtype), None, min(factors, weight.numel())
    pieces = len(weight) if by == "column" else weight.numel()
    kept = torch.ones(pieces, dtype=torch.bool, device=weight.device)
    kept[gone] = False
    size = weight.numel() // pieces
    mask = kept.view(-1, 1).expand(-1, size).reshape(weight.shape)
    return torch.where(mask, weight, 0), mask, (pieces - len(gone)) * size
