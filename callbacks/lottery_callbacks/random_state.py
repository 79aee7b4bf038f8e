"""The global random state of Python, NumPy (where loaded) and torch, as tensors and primitives."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def collect() -> dict[str, Any]:
    """A copy of the present state; draws nothing."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    return state


def restore(state: dict[str, Any]) -> None:
    """Go back to a state that `collect` gave."""
    torch.set_rng_state(state["torch"].cpu())
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])


def is_generator(value: Any) -> bool:
    """Whether `value` is a random generator of its own, of torch, Python or NumPy."""
    if isinstance(value, torch.Generator | random.Random):
        return not isinstance(value, random.SystemRandom)
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)


def of_generator(generator: Any) -> Any:
    """The state of a generator, as tensors and primitives."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return _primitive(_numpy_state(generator))


def set_generator(generator: Any, state: Any) -> None:
    """Go back to a state that `of_generator` gave."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        version, keys, gauss = state
        generator.setstate((version, tuple(keys), gauss))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _numpy_state(generator: Any) -> Any:
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)  # of a RandomState, with its waiting Gaussian


def _primitive(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _primitive(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def seed_all(seed: int) -> None:
    """Seed what `collect` collects, and no device that is not in use yet, whose state would not be put back."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def forked() -> Iterator[None]:
    """A block that may draw as it likes: the state is put back after it."""
    state = collect()
    try:
        yield
    finally:
        restore(state)
