"""The names that masks, tickets, patterns and reports go by: the plain network's, also where it is compiled.

`torch.compile(network)` wraps the network, so that torch calls its weights `_orig_mod.0.weight`; a ticket calls them
`0.weight`, and so applies to the compiled network and to the plain one. `network.compile()` renames nothing. The keys
of the module's own `state_dict` are left as they are.
"""

from torch import Tensor, nn

WRAPPED = "_orig_mod"  # the attribute in which torch.compile keeps the module that it wraps


def canonical(name: str) -> str:
    """`name` without the segments that `torch.compile` adds.

    >>> canonical("network._orig_mod.0.weight")
    'network.0.weight'
    """
    return ".".join(segment for segment in name.split(".") if segment != WRAPPED)


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its canonical name, in the module's own order; tied ones once, under their first name."""
    return {canonical(name): parameter for name, parameter in module.named_parameters()}


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Every buffer by its canonical name, in the module's own order; shared ones once, under their first name."""
    return {canonical(name): buffer for name, buffer in module.named_buffers()}


def further_names(module: nn.Module) -> set[str]:
    """The other names of tied parameters and shared buffers, under which they appear in a `state_dict` again."""
    everywhere = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {canonical(name) for name, _ in everywhere} - named_parameters(module).keys() - named_buffers(module).keys()


def plain_modules(module: nn.Module) -> list[nn.Module]:
    """`module` and all within, each once, without the wrappers of `torch.compile`."""
    return [part for part in module.modules() if WRAPPED not in part._modules]


def owners(module: nn.Module, parameter: nn.Parameter) -> list[nn.Module]:
    """The modules that hold `parameter` themselves: several where it is tied."""
    return [part for part in plain_modules(module) if any(own is parameter for own in part._parameters.values())]
