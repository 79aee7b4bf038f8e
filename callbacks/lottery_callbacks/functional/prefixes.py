"""Two lists of names that differ by a prefix alone, as those of a network and of a module around it."""

from collections.abc import Mapping

import torch

Shapes = Mapping[str, torch.Size]


def below(prefix: str, shapes: Shapes) -> dict[str, torch.Size]:
    """The entries whose names begin with `prefix` and a dot, without these; all where it is empty."""
    start = f"{prefix}." if prefix else ""
    return {name.removeprefix(start): shape for name, shape in shapes.items() if name.startswith(start)}


def differing_prefixes(first: Shapes, second: Shapes) -> tuple[str, str] | None:
    """Prefixes, one for each, below which `second` has all names and shapes of `first`; None where there are none.

    The prefixes are those that differ for the first name of `first`, taken as short as possible.

    >>> shape = torch.Size([2])
    >>> differing_prefixes({"net.a.w": shape, "net.b.w": shape}, {"a.w": shape, "b.w": shape, "c.w": shape})
    ('net', '')
    """
    name = next(iter(first), "")
    for other in second:
        one, two = name.split("."), other.split(".")
        while one and two and one[-1] == two[-1]:
            one.pop()
            two.pop()
        prefixes = ".".join(one), ".".join(two)
        if prefixes[0] == prefixes[1] or ".".join(one) == name:
            continue
        inside, outside = below(prefixes[0], first), below(prefixes[1], second)
        if len(inside) == len(first) and all(outside.get(key) == shape for key, shape in inside.items()):
            return prefixes
    return None
