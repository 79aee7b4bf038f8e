"""What distillation draws: from a seed and its purpose alone, so that a resumed fit draws what an unbroken one does."""

import random

import torch
from torch import nn

from lottery_callbacks.apply_ticket import reinitialise


def derived_seed(*parts: object) -> int:
    """A seed that all of `parts` decide together."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def generator(*parts: object) -> torch.Generator:
    """A generator on the CPU, seeded by all of `parts` together."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def draw_network(network: nn.Module, *parts: object) -> None:
    """Redraw all of a frozen network by its `reset_parameters`, from `parts` and its device alone; it stays frozen.

    Raises:
        ValueError: a parameter belongs to no module with `reset_parameters`.
    """
    network.requires_grad_(True)  # frozen parameters are left as they are
    reinitialise(network, derived_seed(*parts))
    network.requires_grad_(False)
