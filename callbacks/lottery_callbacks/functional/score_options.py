"""Options of a score: its parameters after the evidence, each with a default, checked before anything is trained."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

Positive = Annotated[float, "> 0"]
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def score_options(score: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not the score's own defaults, in the order of its parameters.

    What equals a default is left out, so that a rule that spells it is the same rule. A parameter that is annotated as
    `Literal` takes its values, and one as `Positive` finite numbers above 0; others take anything.

    >>> def score(evidence, mode: Literal["a", "b"] = "a", temperature: Positive = 1.0): ...
    >>> score_options(score, {"temperature": 200, "mode": "a"})
    {'temperature': 200.0}

    Raises:
        ValueError: an option that the score does not have, or a value that it does not take.
    """
    if not options:
        return {}
    parameters = list(inspect.signature(score).parameters.items())[1:]
    own = {name: parameter for name, parameter in parameters if parameter.kind in NAMED}
    for name in options:
        if name not in own:
            known = ", ".join(f"{n} ({_choices(p.annotation)})" for n, p in own.items())
            called = getattr(score, "__name__", "custom")
            raise ValueError(
                f"score {called} has no option {name!r}: " + (f"choose {known}" if known else "it has none")
            )
    given = {name: _checked(name, options[name], own[name].annotation) for name in own if name in options}
    return {name: value for name, value in given.items() if value != own[name].default}


def _checked(name: str, value: Any, kind: Any) -> Any:
    if kind == Positive:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        value, valid = (float(value), 0 < value < float("inf")) if number else (value, False)
    else:
        valid = get_origin(kind) is not Literal or value in get_args(kind)
    if not valid:
        raise ValueError(f"{name}={value!r} is not known: choose {_choices(kind)}")
    return value


def _choices(kind: Any) -> str:
    if kind == Positive:
        return "a finite number above 0"
    return " or ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else "any value"
