"""What draws by itself: generators that a seed and a purpose alone decide, so that a resumed fit draws the same."""

import random

import torch


def derived_seed(*parts: object) -> int:
    """A seed that all of `parts` decide together."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def generator(*parts: object) -> torch.Generator:
    """A generator on the CPU, seeded by all of `parts` together."""
    return torch.Generator().manual_seed(derived_seed(*parts))
