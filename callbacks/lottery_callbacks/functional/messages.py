"""Small helpers for messages of one line that name the culprit and say what to do."""

from collections.abc import Sequence
from typing import Any


def describe(names: Sequence[str], most: int = 8) -> str:
    """Names as a list, cut after `most`.

    >>> describe(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_of(name: str, value: str, choices: Sequence[str]) -> Any:
    """`value`, or a ValueError that lists the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(choices)}")
    return value
