"""Persistent buffers by name, also those that come and go while a module trains."""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lottery_callbacks.names import canonical, named_buffers, named_parameters

TENSOR, NONE, ABSENT = "tensor", "None", "absent"

_begun: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()  # see `first_presence`


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Every buffer that `state_dict` holds by its canonical name; shared ones once."""
    kept = {id(b) for part in module.modules() for n, b in part._buffers.items() if _persists(part, n)}
    return {name: buffer for name, buffer in named_buffers(module).items() if id(buffer) in kept}


def _persists(part: nn.Module, name: str) -> bool:
    return name not in part._non_persistent_buffers_set


def cache_names(module: nn.Module) -> set[str]:
    """The names of non-persistent buffers, tensors and None."""
    return {
        canonical(f"{prefix}.{name}" if prefix else name, module)
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }


def presence(module: nn.Module) -> dict[str, str]:
    """Of each persistent buffer, whether it is a tensor or None."""
    return {
        canonical(f"{prefix}.{name}" if prefix else name, module): NONE if buffer is None else TENSOR
        for prefix, part in module.named_modules()
        for name, buffer in part._buffers.items()
        if _persists(part, name)
    }


def first_presence(module: nn.Module) -> dict[str, str]:
    """`presence` when a fit of this module was first seen, so that what its forward registered later is known."""
    return _begun.setdefault(module, presence(module))


def changed_presence(module: nn.Module, given: Mapping[str, Tensor], saved: Mapping[str, str]) -> dict[str, str]:
    """What becomes of the buffers that are present on one side alone, where the fit itself made the difference."""
    began, now, wanted = first_presence(module), presence(module), {}
    places, parameters = modules_by_name(module), named_parameters(module)
    for name in sorted({*began, *now, *saved} - parameters.keys()):
        there = TENSOR if name in given else saved.get(name, began.get(name, ABSENT))
        explained = name in saved or began.get(name, ABSENT) == there
        possible = name.rpartition(".")[0] in places and (there != TENSOR or name in given)
        if explained and possible and now.get(name, ABSENT) != there:
            wanted[name] = there
    return wanted


def modules_by_name(module: nn.Module) -> dict[str, nn.Module]:
    """`named_modules` by canonical name."""
    return {canonical(name, module): part for name, part in module.named_modules()}


def set_presence(module: nn.Module, name: str, presence: str, value: Tensor | None) -> None:
    """Register the buffer `name` with a copy of `value`, or as None, or delete it."""
    owner, _, attribute = name.rpartition(".")
    part = modules_by_name(module)[owner]
    if presence == ABSENT:
        delattr(part, attribute)
    elif value is None:
        part.register_buffer(attribute, None)
    else:
        device = next((tensor.device for tensor in (*part.parameters(), *module.parameters())), value.device)
        part.register_buffer(attribute, value.to(device, copy=True))
