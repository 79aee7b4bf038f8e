"""State as tensors and primitives, which is all that a ticket file holds."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from lottery_callbacks.functional.tensor_bytes import NAMES


def primitive(value: Any, path: str) -> Any:
    """A deep copy of `value` with its tensors on the CPU, NumPy scalars as Python's, and plain containers.

    Args:
        value: nested dicts, lists and tuples of tensors, numbers, strings and None.
        path: where it is, for messages.

    Raises:
        ValueError: something else is in it; one line that names its place.
    """
    if isinstance(value, Tensor) and fits_a_file(value):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        copied = {_key(key, path): primitive(item, f"{path}/{key}") for key, item in value.items()}
        return Counter(copied) if isinstance(value, Counter) else copied  # the milestones of MultiStepLR
    if isinstance(value, list | tuple):
        items = [primitive(item, f"{path}/{index}") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    value = _scalar(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = f"a {value.layout} tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise ValueError(
        f"the state at {path} is {kind.replace('torch.', '')}, and a ticket holds dense tensors and primitives only; "
        "rewind to '0it', or make that optimizer's or scheduler's state such"
    )


def fits_a_file(tensor: Tensor) -> bool:
    """Whether safetensors writes it: dense, with values, and of a dtype that the format knows."""
    return not (tensor.is_nested or tensor.is_meta) and tensor.layout == torch.strided and tensor.dtype in NAMES


def _key(key: Any, path: str) -> Any:
    key = _scalar(key)
    if key is None or isinstance(key, bool | int | float | str):
        return key
    raise ValueError(
        f"the state at {path} has a {type(key).__name__} as key, and a ticket holds tensors and primitives only; "
        "rewind to '0it', or make that optimizer's or scheduler's state primitive"
    )


def _scalar(value: Any) -> Any:
    """A NumPy scalar as the Python number that equals it."""
    of_numpy = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if of_numpy else value
