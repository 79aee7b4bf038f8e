"""The names that masks, tickets, patterns and reports go by: the plain network's, also where it is wrapped.

A wrapper adds a segment to each name below it: `torch.compile(network)` calls the weight `0.weight` of the network
`_orig_mod.0.weight`. A ticket calls it `0.weight`, and so applies to the plain network and to the wrapped one.
`WRAPPERS` is the table of what is known. A wrapper is recognised by its class, so a network may own a submodule
called `module`. The keys of a module's own `state_dict` are left as they are.

`torch.nn.utils.parametrize` is no wrapper. The layer computes `weight` from `parametrizations.weight.original`, or,
as `weight_norm` does, from `original0` and `original1`. These are other tensors than `weight`: a mask of the one is
no mask of the other. So each keeps its full name, and `computed_from` gives the name of the computed tensor.
"""

from collections.abc import Iterable

from torch import Tensor, nn

# Class (by its module and name, so that nothing is imported) -> the attributes that hold the wrapped module. The last
# one is the module whose names the wrapper's state_dict has, where that leaves the segment out.
WRAPPERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): ("_orig_mod",),
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): ("module",),
    ("torch.nn.parallel.data_parallel", "DataParallel"): ("module",),
    ("torch.optim.swa_utils", "AveragedModel"): ("module",),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): (
        "_checkpoint_wrapped_module",
    ),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): ("_fsdp_wrapped_module",),
    ("lightning.fabric.wrappers", "_FabricModule"): ("_forward_module", "_original_module"),
    ("lightning_fabric.wrappers", "_FabricModule"): ("_forward_module", "_original_module"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine"): ("module",),
}
SEGMENTS = {name for attributes in WRAPPERS.values() for name in attributes} - {"module"}  # no network's own names
AVERAGED = "n_averaged"  # AveragedModel's count, a buffer of the wrapper itself
PARAMETRIZED = "parametrizations"


def canonical(name: str, module: nn.Module | None = None) -> str:
    """`name` without the segments that wrappers add.

    Args:
        name: a name from `named_parameters`, or a key of a `state_dict`, of `module`.
        module: with it, a segment is left out where a wrapper's class adds it. Without it, the text decides: each
            segment of the table is left out but `module`, which a network may own.

    >>> canonical("network._orig_mod.0._checkpoint_wrapped_module.weight")
    'network.0.weight'
    >>> canonical("module.0.weight"), canonical("module.0.weight", nn.DataParallel(nn.Sequential(nn.Linear(2, 2))))
    ('module.0.weight', '0.weight')
    """
    segments = name.split(".")
    if module is None:
        return ".".join(segment for segment in segments if segment not in SEGMENTS)
    part, kept = module, []
    for segment in segments:
        while part is not None and (attributes := _attributes(part)):
            if segment in attributes or segment in part._buffers:
                break
            part = part._modules[attributes[-1]]  # activation checkpointing and Fabric hide the segment
        if part is None or segment not in _attributes(part):
            kept.append(segment)
        inner = part._modules if part is not None else {}
        part = inner[segment] if segment in inner else None  # noqa: SIM401 (scripted modules have no `get` there)
    return ".".join(kept)


def _attributes(module: nn.Module) -> tuple[str, ...]:
    """The attributes that hold the wrapped module; none where `module` is no wrapper."""
    for kind in type(module).__mro__:
        if attributes := WRAPPERS.get((kind.__module__, kind.__qualname__)):
            return attributes
    return ()


def unwrapped(module: nn.Module) -> nn.Module:
    """The network itself: `module` without the wrappers around it; those of its submodules stay."""
    while attributes := _attributes(module):
        module = module.get_submodule(attributes[-1])
    return module


def computed_from(name: str) -> str | None:
    """The tensor that a parametrised layer computes from the parameter `name`; None where it is another parameter.

    >>> computed_from("0.parametrizations.weight.original1"), computed_from("0.weight")
    ('0.weight', None)
    """
    *layer, kind, tensor, original = ["", "", *name.split(".")]
    if kind != PARAMETRIZED or original.rstrip("0123456789") != "original":
        return None
    return ".".join([*layer[2:], tensor])


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its canonical name, in the module's own order; tied ones once, under their first name."""
    return {canonical(name, module): parameter for name, parameter in module.named_parameters()}


def find_parameters(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of `names`, canonical or the module's own, any of a tied one's; unknown names are left out."""
    own = dict(module.named_parameters(remove_duplicate=False))
    known = own | {canonical(name, module): parameter for name, parameter in own.items()}
    return {name: known[name] for name in names if name in known}


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Every buffer by its canonical name, in the module's own order; shared ones once, under their first name."""
    counts = _counts(module)
    return {canonical(name, module): b for name, b in module.named_buffers() if id(b) not in counts}


def further_names(module: nn.Module) -> set[str]:
    """The other names of tied parameters and shared buffers, under which they appear in a `state_dict` again."""
    counts = _counts(module)
    everywhere = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    names = {canonical(name, module) for name, tensor in everywhere if id(tensor) not in counts}
    return names - named_parameters(module).keys() - named_buffers(module).keys()


def _counts(module: nn.Module) -> set[int]:
    """The buffers that wrappers add themselves: `n_averaged` of each AveragedModel."""
    return {id(part._buffers[AVERAGED]) for part in module.modules() if _attributes(part) and AVERAGED in part._buffers}


def plain_modules(module: nn.Module) -> list[nn.Module]:
    """`module` and all within, each once, without the wrappers."""
    return [part for part in module.modules() if not _attributes(part)]


def owners(module: nn.Module, parameter: nn.Parameter) -> list[nn.Module]:
    """The modules that hold `parameter` themselves: several where it is tied."""
    return [part for part in plain_modules(module) if any(own is parameter for own in part._parameters.values())]
