"""New initial weights: every trainable parameter of a module drawn again, from a seed alone."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lottery_callbacks import random_state
from lottery_callbacks.messages import describe
from lottery_callbacks.names import canonical, named_buffers, named_parameters, plain_modules

# Hooks that compute a weight before each forward pass, so that reset_parameters() never reaches what is trained.
HOOKS = {
    WeightNorm: "use torch.nn.utils.parametrizations.weight_norm instead of torch.nn.utils.weight_norm",
    SpectralNorm: "use torch.nn.utils.parametrizations.spectral_norm instead of torch.nn.utils.spectral_norm",
    BasePruningMethod: "make the masks of torch.nn.utils.prune permanent by prune.remove",
}


@torch.no_grad()
def reinitialise(module: nn.Module, seed: int) -> None:
    """Draw every trainable parameter again by `reset_parameters`, children before parents, from `seed` alone.

    All is drawn on the CPU and then copied, so that a seed gives the same weights on every device. Under
    `torch.nn.utils.parametrize` the plain weight is drawn and goes through `right_inverse`, as when the parametrization
    was registered. Frozen parameters keep their values; normalisation layers reset their running statistics too.
    Parameters and buffers stay the same objects, and the global random state is left alone.

    Raises:
        ValueError: a trainable parameter that no `reset_parameters` writes in full, one without values (lazy, meta), a
            `reset_parameters` that fails, or a layer under an old hook of `torch.nn.utils` that computes its weight.
            The module is then as it was.
    """
    _refuse_hooks(module)
    parameters = named_parameters(module)
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    tensors = parameters | named_buffers(module)
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta or is_lazy(tensor)]:
        raise ValueError(
            f"cannot reinitialise {describe(empty)} without values: materialise the module first, a lazy one by a "
            "batch, one on the meta device by to_empty()"
        )
    with _copies(module), random_state.forked(), parametrize.cached(), torch.device("cpu"):
        computed = _computed(module)  # before the fill: some parametrizations cannot compute with NaN
        for tensor in (*trainable.values(), *computed.values()):
            tensor.fill_(torch.nan)
        random_state.seed_all(seed)
        _reset(module)
        for parametrization, value in computed.items():
            if any(own.isnan().any() for own in _originals(parametrization)) and not value.isnan().any():
                _assign(parametrization, value)
        if undrawn := [name for name, parameter in trainable.items() if parameter.isnan().any()]:
            raise ValueError(f"cannot reinitialise {describe(undrawn)}: {_advice(module, trainable[undrawn[0]])}")


def _refuse_hooks(module: nn.Module) -> None:
    for where, part in module.named_modules():
        for hook in part._forward_pre_hooks.values():
            advice = next((advice for kind, advice in HOOKS.items() if isinstance(hook, kind)), None)
            shares = isinstance(hook, SpectralNorm)  # until the first forward pass, its weight and what is trained
            if advice and (shares or any(own is not None and own.requires_grad for own in part._parameters.values())):
                raise ValueError(f"cannot reinitialise {canonical(where) or 'the module'}: {advice}")


def _reset(module: nn.Module) -> None:
    names = {part: canonical(name) for name, part in module.named_modules()}
    for part in reversed(plain_modules(module)):
        own = dict(part._parameters)
        if reset := _resetter(part):
            try:
                reset()
            except Exception as error:
                where, reason = names[part] or "the module", " ".join(str(error).split())[:200]
                raise ValueError(
                    f"cannot reinitialise {where}: {type(part).__name__}.{reset.__name__}() failed ({reason})"
                ) from error
        for name, parameter in own.items():  # a reset may assign a new parameter, which no optimizer has
            new = dict(part._parameters).get(name)  # a scripted module's has no get
            if new is not parameter and parameter is not None:
                if new is not None and new.shape == parameter.shape:
                    parameter.copy_(new)
                part._parameters[name] = parameter


def _resetter(part: nn.Module) -> Callable[[], None] | None:
    """`reset_parameters`, which `nn.MultiheadAttention` and `nn.Transformer` spell with an underscore."""
    return getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)


def _advice(module: nn.Module, parameter: nn.Parameter) -> str:
    owner = next(p for p in module.modules() if any(own is parameter for own in p._parameters.values()))
    if isinstance(owner, parametrize.ParametrizationList):
        steps = " and ".join(type(step).__name__.removeprefix("_") for step in owner)  # pyright: ignore[reportGeneralTypeIssues]
        return (
            f"the layer's reset_parameters() must draw the weight, and the right_inverse of {steps} put it into what "
            "is trained (orthogonal has use_trivialization=False for that)"
        )
    which = f" that draws it ({type(owner).__name__}'s does not)" if _resetter(owner) else ""
    return f"give the module that owns it reset_parameters(){which}"


# ---- copies on the CPU


@contextmanager
def _copies(module: nn.Module) -> Iterator[None]:
    """Let parameters and buffers hold copies on the CPU; take over what becomes of them unless the block raises."""
    parameters = list(module.parameters())
    there = [parameter.data for parameter in parameters]
    for parameter, own in zip(parameters, copy.deepcopy([data.cpu() for data in there]), strict=True):
        parameter.data = own
    places = [(part._buffers, name) for part in module.modules() for name, b in part._buffers.items() if _plain(b)]
    buffers: list[Any] = [held[name] for held, name in places]
    copied = {buffer: buffer.detach().cpu().clone() for buffer in buffers}
    for held, name in places:
        held[name] = copied[held[name]]  # pyright: ignore[reportArgumentType]
    complete = False
    try:
        yield
        complete = True
    finally:
        for parameter, data in zip(parameters, there, strict=True):
            if complete and parameter.requires_grad:
                data.copy_(parameter.data)
            parameter.data = data
        for (held, name), buffer in zip(places, buffers, strict=True):
            new, held[name] = held[name], buffer
            if complete and new is not None and new.shape == buffer.shape:
                buffer.copy_(new)  # in place, since DDP holds it too
            elif complete:
                held[name] = None if new is None else new.to(buffer.device)


def _plain(buffer: Tensor | None) -> bool:
    """Whether it can be written to: not expanded, sparse or made in inference mode."""
    return (
        buffer is not None
        and buffer.layout == torch.strided
        and not buffer.is_inference()
        and not (buffer.numel() > 1 and 0 in buffer.stride())
    )


# ---- parametrizations


def _originals(parametrization: parametrize.ParametrizationList) -> list[Tensor]:
    """What is trained in the place of the weight."""
    if parametrization.is_tensor:
        return [parametrization.original]  # pyright: ignore[reportReturnType]
    return [getattr(parametrization, f"original{index}") for index in range(parametrization.ntensors)]


def _computed(module: nn.Module) -> dict[parametrize.ParametrizationList, Tensor]:
    """The weights that parametrizations compute, as `reset_parameters` will see them in `parametrize.cached()`."""
    return {
        parametrization: getattr(part, name)
        for part in plain_modules(module)
        if parametrize.is_parametrized(part)
        for name, parametrization in part.parametrizations.items()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        if any(isinstance(own, nn.Parameter) and own.requires_grad for own in _originals(parametrization))
    }


def _assign(parametrization: parametrize.ParametrizationList, value: Tensor) -> None:
    """Give the originals the plain weight `value`, by the rule of `register_parametrization`.

    Not to an orthogonal one with `use_trivialization`: it puts a new weight into a buffer, and never what is trained.
    """
    steps: list[Any] = list(parametrization)  # pyright: ignore[reportArgumentType]
    if any(isinstance(step, parametrizations._Orthogonal) and hasattr(step, "base") for step in steps):
        return
    new = value.clone()  # it may be a view of an original
    for step in reversed(steps):
        if hasattr(step, "right_inverse"):
            with suppress(NotImplementedError):  # the identity, as where there is none
                new = step.right_inverse(new)
        if isinstance(step, parametrizations._SpectralNorm):
            _restart(step, new)
    for own, drawn in zip(_originals(parametrization), [new] if isinstance(new, Tensor) else new, strict=True):
        own.copy_(drawn)


def _restart(norm: nn.Module, weight: Tensor) -> None:
    """Draw the singular vectors and iterate as the constructor does: those of the old weight would mislead."""
    fresh = type(norm)(weight, getattr(norm, "n_power_iterations", 1), norm.dim, norm.eps)  # pyright: ignore[reportCallIssue]
    for own, drawn in zip(norm.buffers(), fresh.buffers(), strict=True):
        own.copy_(drawn)
