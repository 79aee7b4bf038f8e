"""Optimizer state by parameter name: an optimizer that lists the same parameters in another order gets the right state.

`Optimizer.load_state_dict` goes by position. A rewind point and a checkpoint therefore keep the names beside the state.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lottery_callbacks.messages import describe
from lottery_callbacks.names import named_parameters

Groups = list[list[str]]  # the names of an optimizer's parameters, by parameter group

REWIND = ("the rewind point", "train it with those that it was captured from, or rewind to '0it'")
CHECKPOINT = ("the checkpoint", "resume it with those that it was trained with, or start without ckpt_path")

OF_PARAMETERS = {"params", "param_names"}  # of a group; its other entries are hyperparameters
# Entries of a scheduler's state with one item a parameter group, and lists that have nothing to do with groups
OF_GROUPS = {"base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums"}
OF_SCHEDULERS = {"_schedulers", "_milestones", "milestones", "_schedule_phases"}


def parameter_names(optimizers: Sequence[Optimizer], module: nn.Module) -> list[Groups]:
    """The canonical name of each parameter, by optimizer and group.

    A parameter that the module does not hold has its number among those of its optimizer: "parameter 0 outside the
    module". Such parameters are matched by their order.
    """
    own = {parameter: name for name, parameter in named_parameters(module).items()}
    names = []
    for optimizer in optimizers:
        outside = (f"parameter {number} outside the module" for number in count())
        names.append(
            [[own[p] if p in own else next(outside) for p in group["params"]] for group in optimizer.param_groups]
        )
    return names


def states_by_name(
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    module: nn.Module,
    optimizer_states: Sequence[Mapping[str, Any]],
    scheduler_states: Sequence[Mapping[str, Any]],
    there: Sequence[Groups] | None,
    source: tuple[str, str] = REWIND,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The saved states in the order of `optimizers`, ready for their `load_state_dict`, and those of `schedulers`.

    State goes by the parameter's name, hyperparameters by the set of names in a group, and what a scheduler keeps a
    group goes with the group. Nothing is copied or changed.

    Args:
        optimizers: those that will load the state.
        schedulers: theirs; one of another optimizer keeps its order.
        module: what the parameters are named in.
        optimizer_states: `Optimizer.state_dict()` of each.
        scheduler_states: of each scheduler.
        there: `parameter_names` when the states were saved; None for files without names, which go by position.
        source: what holds the states, and what to do if they do not fit, for messages.

    Raises:
        ValueError: other parameters, groups or shapes, by the name of the first one that differs; or another kind or
            number of optimizers or schedulers.
    """
    here = parameter_names(optimizers, module)
    _check_numbers(len(optimizer_states), len(optimizers), "optimizers", source)
    _check_numbers(len(scheduler_states), len(schedulers), "schedulers", source)
    states, orders = [], {}
    for number, (optimizer, saved) in enumerate(zip(optimizers, optimizer_states, strict=True)):
        label = f"optimizer {number} ({type(optimizer).__name__})"
        _check_kind(label, optimizer, saved, source)
        known = _by_position(label, saved, here[number], source) if there is None else there[number]
        order = group_order(known, here[number], label, source)
        orders[id(optimizer)] = order
        states.append(_reordered(label, optimizer, saved, known, here[number], order, source))
    schedules = []
    for number, (scheduler, saved) in enumerate(zip(schedulers, scheduler_states, strict=True)):
        label = f"scheduler {number} ({type(scheduler).__name__})"
        if lacking := [key for key in scheduler.state_dict() if key not in saved and not key.startswith("_")]:
            raise _other_kind(f"{label} has {describe(lacking)}, which is not in the saved state", source)
        order = orders.get(id(getattr(scheduler, "optimizer", None)), [])
        schedules.append(_of_groups(label, saved, order, source))
    return states, schedules


def group_order(there: Groups, here: Groups, label: str = "the optimizer", source: tuple[str, str] = REWIND) -> list:
    """The saved group of each present group: the one of the same names.

    Raises:
        ValueError: there is none; one line that names the first parameter which differs.
    """
    saved, own = ([name for group in groups for name in group] for groups in (there, here))
    if missing := [name for name in saved if name not in set(own)]:
        raise ValueError(f"{label} has no {missing[0]}, which {source[0]} has state of: {_parameters(source)}")
    if further := [name for name in own if name not in set(saved)]:
        raise ValueError(f"{label} has {further[0]}, which {source[0]} has no state of: {_parameters(source)}")
    order, sets, free = [], [set(group) for group in there], list(range(len(there)))
    for group in here:
        match = next((index for index in free if sets[index] == set(group)), None)
        if match is None:
            raise ValueError(
                f"{label} has {(group or ['nothing'])[0]} in another parameter group than {source[0]}: give it the "
                f"groups that it had, or {source[1].split(', or ')[1]}"
            )
        free.remove(match)
        order.append(match)
    if free:
        raise ValueError(f"{label} has {len(here)} parameter groups, and {source[0]} has {len(there)}: {source[1]}")
    return order


def _parameters(source: tuple[str, str]) -> str:
    return f"give it the parameters that it had, or {source[1].split(', or ')[1]}"


def _other_kind(what: str, source: tuple[str, str]) -> ValueError:
    return ValueError(f"{source[0]} holds the state of other optimizers or schedulers: {what}; {source[1]}")


def _check_numbers(there: int, here: int, what: str, source: tuple[str, str]) -> None:
    if there != here:
        raise _other_kind(f"{there} {what} there and {here} now", source)


def _check_kind(label: str, optimizer: Optimizer, saved: Mapping[str, Any], source: tuple[str, str]) -> None:
    there, here = (
        {key for group in groups for key in group} - OF_PARAMETERS
        for groups in (saved["param_groups"], optimizer.param_groups)
    )
    if there != here:
        said = [f"{describe(sorted(keys))} {where}" for keys, where in ((there - here, "there"), (here - there, "now"))]
        only = [text for text, keys in zip(said, (there - here, here - there), strict=True) if keys]
        raise _other_kind(f"the groups of {label} have {' and '.join(only)}", source)


def _by_position(label: str, saved: Mapping[str, Any], here: Groups, source: tuple[str, str]) -> Groups:
    """The names of a state that was saved without them: those of the present parameters."""
    there, own = [len(group["params"]) for group in saved["param_groups"]], [len(group) for group in here]
    if there != own:
        raise ValueError(
            f"{label} has groups of {describe(list(map(str, own)))} parameters, and {source[0]} of "
            f"{describe(list(map(str, there)))}: {_parameters(source)}"
        )
    return here


def _reordered(
    label: str,
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    there: Groups,
    here: Groups,
    order: list[int],
    source: tuple[str, str],
) -> dict[str, Any]:
    """`saved` with the indices of `optimizer`."""
    places = {
        name: index
        for names, group in zip(there, saved["param_groups"], strict=True)
        for name, index in zip(names, group["params"], strict=True)
    }
    own, groups, target, number = {}, [], {}, count()
    for names, group, match in zip(here, optimizer.param_groups, order, strict=True):
        indices = [next(number) for _ in names]
        own |= dict(zip(names, group["params"], strict=True))
        target |= {places[name]: (index, name) for name, index in zip(names, indices, strict=True)}
        settings = {key: value for key, value in saved["param_groups"][match].items() if key not in OF_PARAMETERS}
        kept = {"param_names": group["param_names"]} if "param_names" in group else {}
        groups.append(settings | kept | {"params": indices})
    state = {}
    for key, value in saved["state"].items():
        index, name = target.get(key, (key, None))  # some optimizers keep state of their own beside the parameters'
        if name is not None:
            _check_shapes(label, name, own[name], value, source)
        state[index] = value
    return {**saved, "state": state, "param_groups": groups}


def _check_shapes(label: str, name: str, parameter: Tensor, state: Any, source: tuple[str, str]) -> None:
    values = state.values() if isinstance(state, Mapping) else ()
    for value in values:
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
            raise ValueError(
                f"{label}: {source[0]} has state of shape {tuple(value.shape)} for {name}, which is "
                f"{tuple(parameter.shape)} now: {_parameters(source)}"
            )


def _of_groups(label: str, state: Mapping[str, Any], order: list[int], source: tuple[str, str]) -> dict[str, Any]:
    """A scheduler's state, what it keeps a group in the order of the present groups."""
    if order == sorted(order):
        return dict(state)
    turned: dict[str, Any] = {}
    for key, value in state.items():
        if key == "_schedulers":  # of SequentialLR and ChainedScheduler
            turned[key] = [_of_groups(label, inner, order, source) for inner in value]
        elif not isinstance(value, list | tuple) or len(value) != len(order) or key in OF_SCHEDULERS:
            turned[key] = value
        elif key in OF_GROUPS:
            turned[key] = type(value)(value[index] for index in order)
        else:
            raise ValueError(
                f"{label} keeps {key}, which may go by parameter group: list the groups in the order of {source[0]}"
            )
    return turned
