"""The features of a network: what its last linear layer reads."""

import torch
from torch import Tensor, nn


def features(network: nn.Module, images: Tensor) -> Tensor:
    """The input (batch, features) of the network's last `nn.Linear` on `images`; modes and gradients as they are set.

    Embedding of distribution matching, herding and k-means. Last is meant in the order of `network.modules()`. Cost: a
    forward pass.

    Raises:
        ValueError: the network has no linear layer, does not call its last one, or not with one row an image.
    """
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(network).__name__} has no Linear layer: features are the input of the last one")
    found: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        network(images)
    finally:
        hook.remove()
    if not found:
        raise ValueError(f"{type(network).__name__} does not call its last Linear layer: there are no features")
    if (rows := len(found[-1])) != len(images):
        raise ValueError(
            f"{type(network).__name__} gives its last Linear layer {rows} rows of {len(images)} images: "
            "features need one an image"
        )
    return torch.flatten(found[-1], 1)
