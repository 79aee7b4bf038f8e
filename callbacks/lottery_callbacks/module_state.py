"""The persistent state of a module, as a rewind point holds it: parameters, persistent buffers and extra state.

Non-persistent buffers are caches. They are neither captured nor restored: what a forward pass keeps in one stays there.
A module that trains such a buffer must register it as persistent.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lottery_callbacks.buffers import (
    ABSENT,
    cache_names,
    changed_presence,
    first_presence,
    modules_by_name,
    persistent_buffers,
    presence,
    set_presence,
)
from lottery_callbacks.messages import describe, inform, warn
from lottery_callbacks.names import canonical, further_names, named_buffers, named_parameters
from lottery_callbacks.primitives import fits_a_file, primitive

EXTRA = "_extra_state"  # torch's key, after the module's name


def require_capturable(module: nn.Module) -> None:
    """Refuse, before a fit, a module whose state no rewind point can hold or put back.

    Raises:
        ValueError: one line that names the parameters or buffers and says what to do.
    """
    parameters = named_parameters(module)
    lazy = [name for name, tensor in (parameters | named_buffers(module)).items() if is_lazy(tensor)]
    if lazy:
        raise ValueError(f"{describe(lazy)} have no shape yet: run the module on one batch before the fit")
    made = [name for name, parameter in parameters.items() if parameter.is_inference()]
    _refuse(made, "made in inference mode", "build the module outside torch.inference_mode()")
    state = parameters | persistent_buffers(module)
    strange = [f"{name} ({_kind(tensor)})" for name, tensor in state.items() if not fits_a_file(tensor)]
    _refuse(strange, "of a kind that no ticket holds", "make it a dense tensor, or a buffer with persistent=False")
    wide = [name for name, parameter in parameters.items() if parameter.requires_grad and not writable(parameter)]
    _refuse(wide, "expanded, and cannot be trained", "make it a tensor of its own by clone()")
    first_presence(module)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """CPU copies of all parameters and persistent buffers by name, tied ones once.

    Raises:
        ValueError: see `require_capturable`.
    """
    require_capturable(module)
    tensors = named_parameters(module) | persistent_buffers(module)
    return {name: tensor.detach().cpu().resolve_conj().resolve_neg().clone() for name, tensor in tensors.items()}


def further_state(module: nn.Module) -> dict[str, dict[str, Any]]:
    """What `snapshot` leaves out of the persistent state; empty for most modules.

    Returns:
        "extra_state": of each module with `get_extra_state`, if it is made of tensors and primitives; a warning names
            the others, which are not rewound.
        "buffers": those that came or went since the fit began, as a module of a later level has them when it is new:
            "tensor", "None" or "absent".
    """
    states, lost = {}, []
    for name, part in _with_extra_state(module).items():
        try:
            states[name] = primitive(part.get_extra_state(), name)
        except ValueError:
            lost.append(name)
    own = named_parameters(module).keys() | named_buffers(module).keys() | further_names(module)
    places = {_place(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for key, value in module.state_dict().items():
        if canonical(key, module) not in own and not key.endswith(EXTRA) and _place(value) not in places:
            lost.append(key)
    if lost:
        warn(f"a rewind point cannot hold the state of {describe(lost)}: it is not rewound")
    began, now = first_presence(module), presence(module)
    changed = {n: now.get(n, ABSENT) for n in sorted(began | now) if now.get(n, ABSENT) != began.get(n, ABSENT)}
    found = {"extra_state": states, "buffers": changed}
    return {key: value for key, value in found.items() if value}


def load_snapshot(
    module: nn.Module, tensors: Mapping[str, Tensor], further: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Put `tensors` into the module's parameters and persistent buffers, and what `further_state` gave beside them.

    Parameters are written in place. A buffer is too, unless it has another shape now, is expanded or was made in
    inference mode: then the module gets a new tensor. A buffer that came or went since the fit began goes back.

    Tied tensors may come under each of their names, as in a `state_dict`; of them the first one counts. Buffers that
    a `state_dict` leaves out may be absent, and keep their values; so do non-persistent ones, which older files hold.
    As in `load_state_dict` a tensor takes the module's own dtype: exactly where that is wider, rounded to nearest
    where it is narrower, and a line says so.

    Raises:
        ValueError: names, or shapes of parameters, differ from the module's.
    """
    further = further or {}
    require_capturable(module)
    parameters, buffers = named_parameters(module), persistent_buffers(module)
    ignored = (further_names(module) | cache_names(module)) - buffers.keys()
    given = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    wanted = changed_presence(module, given, further.get("buffers", {}))
    own = parameters | {
        name: buffer for name, buffer in buffers.items() if name in given or not _left_out(module, name)
    }
    check_same_architecture(
        {name: tensor.shape for name, tensor in given.items() if name not in wanted},
        {
            name: given[name].shape if name in buffers and name in given else tensor.shape
            for name, tensor in own.items()
            if name not in wanted
        },
    )
    extra = _with_extra_state(module)
    if unknown := [name for name in further.get("extra_state", {}) if name not in extra]:
        raise ValueError(f"the ticket holds {describe(unknown)}, which the network has no place for")
    _say_what_differs(own, given)
    with torch.no_grad():
        for name, there in wanted.items():
            set_presence(module, name, there, given.get(name))
        for name, tensor in own.items():
            if name not in wanted:
                _write(module, tensor, given[name])
    for name, state in further.get("extra_state", {}).items():
        extra[name].set_extra_state(copy.deepcopy(state))


def check_same_architecture(ticket: Mapping[str, torch.Size], module: Mapping[str, torch.Size]) -> None:
    """Compare names and shapes, ticket against module.

    Raises:
        ValueError: one line that names the first difference.
    """
    for name in [*module, *ticket]:
        if ticket.get(name) != module.get(name):
            there, here = (tuple(s[name]) if name in s else "absent" for s in (ticket, module))
            raise ValueError(
                f"the ticket is for another architecture: {name} is {there} in the ticket and {here} in the network; "
                "build the network that the ticket was found on"
            )


# ---- what can be held


def _refuse(names: list[str], what: str, remedy: str) -> None:
    if names:
        raise ValueError(f"{describe(names)} is {what}: {remedy}")


def writable(tensor: Tensor) -> bool:
    """Whether each entry has a place of its own, which may be written to."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_inference():  # a nested one has no strides
        return False
    return all(step or size < 2 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _kind(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "nested"
    if tensor.is_meta:
        return "on the meta device"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return str(tensor.dtype).removeprefix("torch.")


# ---- writing


def _place(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) and fits_a_file(value) else id(value)


def _left_out(module: nn.Module, name: str) -> bool:
    """Whether the module's own `state_dict` leaves out a buffer that is persistent."""
    return name not in {canonical(key, module) for key in module.state_dict()}


def _say_what_differs(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    both = {name: (given[name], tensor) for name, tensor in own.items() if name in given}
    if rounded := [name for name, (there, here) in both.items() if _rounds(there.dtype, here.dtype)]:
        there, here = (tensor.dtype for tensor in both[rounded[0]])
        inform(f"rounded to the network's precision, {there} to {here}: {describe(rounded)}")
    if resized := [name for name, (there, here) in both.items() if there.shape != here.shape]:
        inform(f"buffers of another shape take the rewind point's: {describe(resized)}")


def _rounds(source: torch.dtype, target: torch.dtype) -> bool:
    return source != target and torch.promote_types(source, target) != target


def _write(module: nn.Module, tensor: Tensor, value: Tensor) -> None:
    if writable(tensor) and tensor.shape == value.shape:
        tensor.copy_(value)
        return
    new = value.to(tensor.device, tensor.dtype, copy=True)
    if isinstance(tensor, nn.Parameter):
        tensor.data = new  # frozen and expanded
        return
    for part in module.modules():
        part._buffers.update({name: new for name, buffer in part._buffers.items() if buffer is tensor})


def _with_extra_state(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that give extra state, by its key in a `state_dict`."""
    default = nn.Module.get_extra_state
    return {
        f"{name}.{EXTRA}".removeprefix("."): part
        for name, part in modules_by_name(module).items()
        if type(part).get_extra_state is not default
    }
