"""Networks on the plane around one network, along two random directions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lottery_callbacks.functional.in_place import State, tensors_of
from lottery_callbacks.functional.names import find_parameters
from lottery_callbacks.functional.unit_flow import NORMS


@dataclass(frozen=True)
class RandomPlane:
    """The plane theta + x d + y e around a network theta; built by `random_plane`.

    Attributes:
        states: theta alone, a copy.
        directions: d and e, of the tensors that move.
        coordinates: (x, y) of theta.
        unit: of x and y: a step of 1 along d or e moves each filter as far as it is long.
    """

    unit: ClassVar[str] = "filter norms"
    coordinates: ClassVar[list[tuple[float, float]]] = [(0.0, 0.0)]
    states: tuple[State]
    directions: tuple[State, State]

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """The state at (x, y): what does not move, and at (0, 0) everything, has the values of theta to the bit."""
        return {name: self._moved(name, tensor, x, y) for name, tensor in self.states[0].items()}

    def _moved(self, name: str, tensor: Tensor, x: float, y: float) -> Tensor:
        one, other = (direction.get(name) for direction in self.directions)
        if one is None or other is None:
            return tensor.clone()
        step = x * one + y * other
        return torch.where(step == 0, tensor, (tensor + step).to(tensor.dtype))


def random_plane(
    network: nn.Module, generator: torch.Generator, masks: Mapping[str, Tensor] | None = None, vectors: bool = False
) -> RandomPlane:
    """The plane around `network` along two filter-normalised random directions (Li et al., arXiv 1712.09913).

    Each filter of a direction is a Gaussian vector scaled to the norm of the network's own filter: d_j = g_j / |g_j|
    |theta_j|, where j is a row of dimension 0, the weights into one channel or neuron. Biases and the parameters of
    norm layers do not move, as under `biasbn` of the paper's code; nor do buffers. The directions are as drawn, not
    made orthogonal: in n weights the cosine between them is of the order of 1 / sqrt(n).

    So planes from one seed show the same surface for a network and its twin with layers of ReLU scaled against each
    other, or filters before a batch norm. Single neurons of ReLU are not undone: theirs are columns of the next layer.

    Two numbers a weight are drawn in float64. Memory: three copies of the network.

    Args:
        network: at (0, 0), with its present weights.
        generator: of the draws, on any device.
        masks: by names of parameters, True = kept: pruned weights have no part in norms, and stay as they are.
        vectors: whether tensors of fewer than two dimensions and norm layers move too; each entry of a vector is a
            filter then, and steps by its own size to either side (in the paper's code always away from 0).

    Raises:
        ValueError: a mask that fits no parameter; nothing moves.
    """
    masks = masks or {}
    masked = find_parameters(network, masks)
    for name, mask in masks.items():
        if name not in masked or masked[name].shape != mask.shape:
            raise ValueError(f"the mask {name} {tuple(mask.shape)} fits no parameter: name and shape it as its weight")
    mask_of = {masked[name]: mask for name, mask in masks.items()}
    everywhere = {n: t for n, t in tensors_of(network).items() if isinstance(t, nn.Parameter)}  # tied ones move alike
    within = {p for part in network.modules() if isinstance(part, NORMS) for p in part.parameters(recurse=False)}
    moving = [p for p in dict.fromkeys(everywhere.values()) if vectors or (p.ndim > 1 and p not in within)]

    def direction() -> dict[str, Tensor]:
        drawn = {p: _filters(p.detach(), mask_of.get(p), generator) for p in moving}
        return {name: drawn[p] for name, p in everywhere.items() if p in drawn}

    directions = direction(), direction()
    if not any(tensor.any() for tensor in directions[0].values()):
        raise ValueError("no weight moves: the network has no filters but zeros, or vectors=True is needed")
    state = {name: tensor.detach().clone() for name, tensor in tensors_of(network).items()}
    return RandomPlane((state,), directions)


def _filters(weight: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """A Gaussian tensor of which each row has the norm of the weight's: +0.0 where pruned, or where that norm is 0."""
    wide = torch.promote_types(weight.dtype, torch.float64)
    drawn = torch.randn(weight.shape, dtype=wide, device=generator.device, generator=generator).cpu()
    kept = torch.ones((), dtype=torch.bool) if mask is None else mask.cpu()
    rows, own = (torch.where(kept, t, 0).reshape(*t.shape[:1], -1) for t in (drawn, weight.to("cpu", wide)))
    scaled = F.normalize(rows, dim=-1) * torch.linalg.vector_norm(own, dim=-1, keepdim=True)
    return scaled.reshape(weight.shape).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
