"""Scores of the user's own: what they need, found before the first step, and what they return, checked by name."""

import functools
from collections.abc import Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from lottery_callbacks import random_state
from lottery_callbacks.functional.masks import Masks
from lottery_callbacks.functional.scores import Evidence, Score, Tensors
from lottery_callbacks.messages import describe

COLLECTED = {"gradient", "hessian_vector", "losses", "flow", "movement"}  # the parts of Evidence that need a marker
WRAPPERS = {functools.partial, MethodType, classmethod, staticmethod}
LIBRARIES = {"builtins", "lightning", "numpy", "pytorch_lightning", "torch"}  # whose code uses no Evidence


class Unmarked(ValueError):
    """A score that uses what is collected for marked scores alone."""

    def __init__(self, score: Score, what: str) -> None:
        thing = "the movement of the weights" if what == "movement" else "training batches (their loss, gradient, flow)"
        super().__init__(
            f"score {title(score)} uses {thing}, which a fit collects for marked scores alone: mark it by "
            f'@needs("{what}") of lottery_callbacks.functional.scores, or give needs("{what}")(score)'
        )


def title(score: Score) -> str:
    """The name of a function, or of what a partial calls, or of a callable object's class."""
    while isinstance(score, functools.partial):
        score = score.func
    return getattr(score, "__qualname__", type(score).__name__).rpartition("<locals>.")[2]


def needed(score: Score) -> str | None:
    """The marker of a score, also of what a partial calls, and of the `__call__` of an object."""
    if marker := getattr(score, "needs", None):
        return marker
    return needed(score.func) if isinstance(score, functools.partial) else getattr(score.__call__, "needs", None)


def require_marker(score: Score, weights: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> None:
    """Try a score without a marker whose code mentions what needs one, on copies of `weights`, with its `options`.

    A score that mentions nothing of that kind is not called. Global random states are put back; errors of the score's
    own are left to the first pruning.

    Raises:
        ValueError: the score uses batches or movement, or returns something else than a score for each weight.
    """
    if needed(score) or not _mentions(score, set()):
        return

    def batches(**_: Any) -> NoReturn:
        raise Unmarked(score, "batches")

    for movement in (None, _Trap(score)):  # None, as in the fit: a score may do without
        copies = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        evidence = Evidence(copies, torch.Generator().manual_seed(0), losses=batches, flow=batches, movement=movement)
        try:
            with random_state.forked(), torch.enable_grad():
                found = score(evidence, **(options or {}))  # pyright: ignore[reportCallIssue]
        except Unmarked:
            raise
        except Exception:
            continue
        checked(score, found, {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()})
        return


def checked(score: Score, found: Any, masks: Masks) -> Tensors:
    """The scores of the weights of `masks`, detached; more of them are left out.

    Raises:
        ValueError: a weight has none, or one that is no real tensor of its shape, or not finite where it is kept.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"score {title(score)} returned a {type(found).__name__}: return a dict, name -> tensor")
    if missing := [name for name in masks if name not in found]:
        raise ValueError(f"score {title(score)} gives none for {describe(missing)}: score every name of weights")
    for name, mask in masks.items():
        value = found[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"score {title(score)} gives a {type(value).__name__} for {name}: give a tensor")
        if value.layout != torch.strided:
            raise ValueError(f"score {title(score)} gives a {value.layout} tensor for {name}: return its to_dense()")
        if value.shape != mask.shape:
            own, shape = tuple(value.shape), tuple(mask.shape)
            raise ValueError(f"score {title(score)} has the shape {own} for {name}: give it the weight's, {shape}")
        if value.is_complex():
            raise ValueError(f"scores of {name} are complex, and have no order: return their abs() in {title(score)}")
        if not torch.isfinite(value[mask.to(value.device)]).all():
            raise ValueError(
                f"score {title(score)} is not finite for {name}: did the training diverge, or does it divide by 0?"
            )
    return {name: found[name].detach() for name in masks}


class _Trap(Mapping[str, Tensor]):
    """Movement that nobody collected: looking at it raises `Unmarked`."""

    def __init__(self, score: Score) -> None:
        self.score = score

    def __getitem__(self, name: str) -> NoReturn:
        raise Unmarked(self.score, "movement")

    def __iter__(self) -> NoReturn:
        raise Unmarked(self.score, "movement")

    def __len__(self) -> NoReturn:
        raise Unmarked(self.score, "movement")


def _mentions(value: Any, seen: set[int]) -> bool:
    """Whether code that `value` runs names a part of `COLLECTED`, or a score that is marked."""
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(getattr(value, "needs", None), str):
        return True
    if _of_library(value if isinstance(value, FunctionType | type) else type(value)):
        return False
    return not COLLECTED.isdisjoint(_names(value)) or any(_mentions(part, seen) for part in _parts(value))


def _of_library(value: Any) -> bool:
    return str(value.__module__).partition(".")[0] in LIBRARIES and value not in WRAPPERS


def _names(value: Any) -> set[str]:
    """The names and strings in a function's code."""
    names, codes = set(), [value.__code__] if isinstance(value, FunctionType) else []
    while codes:
        code = codes.pop()
        names |= {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names


def _parts(value: Any) -> list[Any]:
    """What a function, partial, method or callable object may call in its turn."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, classmethod | staticmethod):
        return [value.__func__]
    if isinstance(value, FunctionType):
        names = _names(value)
        used = [value.__globals__[name] for name in names if name in value.__globals__]
        used += [vars(m)[name] for m in used if isinstance(m, ModuleType) for name in names if name in vars(m)]
        used += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        return [part for part in used if callable(part)]
    own = () if isinstance(value, type) else getattr(value, "__dict__", {}).values()
    kinds = (value if isinstance(value, type) else type(value)).__mro__
    return [*own, *(part for kind in kinds if not _of_library(kind) for part in vars(kind).values())]


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
