"""How images lie in memory."""

import torch
from torch import Tensor


def channels_last(images: Tensor) -> Tensor:
    """The images (batch, channels, height, width) with channels last in memory, which convolutions and poolings like.

    Under `torch.func.vmap`, which knows no such layout, they stay as they are.
    """
    try:
        return images.contiguous(memory_format=torch.channels_last)
    except RuntimeError:
        return images
