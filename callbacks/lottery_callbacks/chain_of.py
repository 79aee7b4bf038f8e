"""A network as the chain of layers that it executes, by `torch.fx`."""

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node, Tracer
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from lottery_callbacks.functional.modes import evaluating
from lottery_callbacks.functional.names import unwrapped
from lottery_callbacks.strong_modules import form_of

TREATED = "Linear, Conv2d, batch norm right after these, ReLU, pooling, Flatten, Dropout and Identity, in a chain"
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def chain_of(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules in the order of execution, in evaluation; what does nothing then is left out.

    Modules within others are found where they are called, and a functional relu, flatten, pooling or mean over space
    becomes the module that does the same. A batch norm right after a layer with weights is folded into a copy of it, in
    float64; after a Linear, for values (batch, features) alone. The network is not changed; layers with weights are its
    own, and all else is copies without hooks.

    A layer of another package takes part, without being looked into, if it declares one of these:

    - with weights: its class itself, not one that it inherits from, has the attribute `strong_form`, the subclass of
      `StrongModule` that stands for it. It has `weight` (out, in, *taps) and `bias` (out,) or None, and a batch norm
      scales dimension 0 of both.
    - without: `lipschitz`, a number, its Lipschitz constant. It must be positively homogeneous, f(s x) = s f(x) for
      s > 0, since layers are rescaled, and map values >= 0 to such.

    Raises:
        ValueError: names a layer or call that is not one of those, or that does not take what the last one gave.
    """
    network = unwrapped(network)
    whole = nn.Sequential(network)  # a lone layer would be traced into its functional form
    with evaluating(network), _as_it_was(network):
        try:
            graph = _Tracer().trace(whole)
        except Exception as error:  # torch.fx raises many
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{type(network).__name__} cannot be traced ({reason}): give {TREATED}") from error
    previous: Node | None = None
    shapes: set[Node] = set()
    steps: list[tuple[str, nn.Module]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            previous = previous or node
        elif node.op == "output":
            if node.args[0] is not previous:
                raise ValueError(f"the output is not that of the last layer, {previous}: give {TREATED}")
        elif _asks_shape(node, shapes):
            shapes.add(node)
        elif node.op == "get_attr":
            owner = whole.get_submodule(str(node.target).rpartition(".")[0])
            name = str(node.target).removeprefix("0.").rpartition(".")[0]
            raise ValueError(f"{name} ({type(owner).__name__}) uses its weights in its own way: give {TREATED}")
        else:
            name = node.target.removeprefix("0.") if node.op == "call_module" else node.name
            if [used for used in node.all_input_nodes if used not in shapes] != [previous]:
                raise ValueError(f"{name} does not take the output of the layer before it alone: give {TREATED}")
            for module in _modules(node, name, whole):
                if isinstance(module, NORMS):
                    module = _folded(name, module, steps)
                    name, _ = steps.pop()
                steps.append((name, module))
            previous = node
    _check_widths(steps)
    return steps


@contextmanager
def _as_it_was(network: nn.Module) -> Iterator[None]:
    """A block in which a forward pass may count, or keep what it saw: all of that is undone."""
    kinds = (list, dict, set)
    before = [
        (part, {key: copy.copy(value) if isinstance(value, kinds) else value for key, value in vars(part).items()})
        for part in network.modules()
    ]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for part, state in before:
            vars(part).clear()
            vars(part).update(state)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


class _Tracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or _declared(m)


def _declared(module: nn.Module) -> bool:
    """Whether it says what stands for it, or, without weights, its Lipschitz constant."""
    constant = isinstance(getattr(module, "lipschitz", None), int | float)
    return "strong_form" in vars(type(module)) or (constant and next(module.parameters(), None) is None)


def _folded(name: str, norm: Any, steps: list[tuple[str, nn.Module]]) -> nn.Module:
    """The last step's layer with the batch norm, as in evaluation, in its weight and bias."""
    layer: Any = steps[-1][1] if steps else nn.Identity()
    linear = isinstance(layer, nn.Linear)
    fits = form_of(layer) is not None and linear == isinstance(norm, nn.BatchNorm1d)
    if not fits or len(layer.weight) != norm.num_features or norm.running_mean is None:
        raise ValueError(
            f"{name} ({type(norm).__name__}) cannot be folded: it must come right after a Linear (of values (batch, "
            f"features)) or convolution of {norm.num_features} outputs, and have running statistics"
        )
    layer, norm = _own(layer).double(), _own(norm).double()
    layer.weight, layer.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    if linear:
        layer.dimensions = 2  # the norm's axis is the layer's outputs for these alone
    return layer


class _Flat(nn.Flatten):
    """`x.view(-1, width)`, which is a flattening where values have that many entries."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


def _check_widths(steps: list[tuple[str, nn.Module]]) -> None:
    """Refuse a `view(-1, width)` that no Linear of that width follows."""
    for place, (name, step) in enumerate(steps):
        if isinstance(step, _Flat):
            linear = next((layer for _, layer in steps[place:] if isinstance(layer, nn.Linear)), None)
            if linear is None or linear.in_features != step.width:
                raise ValueError(f"{name}(-1, {step.width}) is followed by no Linear of that width: use flatten(1)")


def _modules(node: Node, name: str, whole: nn.Module) -> list[nn.Module]:
    """What the node does, as modules; none where it does nothing."""
    if node.op == "call_module":
        module = whole.get_submodule(str(node.target))
        called = type(module).__name__
        modules = [] if isinstance(module, NOTHING) else [module]
    else:
        called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        kwargs = {key: value for key, value in node.kwargs.items() if value is not node.all_input_nodes[0]}
        try:
            modules = FUNCTIONS[node.target](*node.args[1:], **kwargs)
        except (KeyError, TypeError, ValueError):
            modules = [nn.Module()]
    for module in modules:
        if is_parametrized(module):
            raise ValueError(f"{name} ({called}) has parametrizations: make them permanent (remove_parametrizations)")
        if (weights := form_of(module)) and {"weight", "bias"} & vars(module).keys():
            raise ValueError(
                f"{name} ({called}) has a weight that a hook sets, maybe of the step before: make it permanent "
                "(torch.nn.utils.prune.remove, remove_weight_norm)"
            )
        if not (_plain(module) if weights else _treated(module)):
            raise ValueError(f"{name} ({called}) cannot be treated: give {TREATED}")
    return [module if form_of(module) else _own(module) for module in modules]


def _own(module: nn.Module) -> Any:
    """A deep copy without the hooks of the target's, and of a ReLU one that leaves its inputs alone."""
    if isinstance(module, nn.ReLU):
        return nn.ReLU()
    hooks = {
        id(value): type(value)() for part in module.modules() for key, value in vars(part).items() if "hook" in key
    }
    return copy.deepcopy(module, hooks)


def _treated(module: nn.Module) -> bool:
    """Whether it is one of the steps without weights."""
    if isinstance(module, nn.Flatten):
        return bool(module.start_dim > 0)
    if isinstance(module, nn.AdaptiveMaxPool2d | nn.AdaptiveMaxPool3d) and {1} != _sizes(module):
        return False  # its windows may overlap
    known = (nn.ReLU, *POOLS, *NORMS)
    return (isinstance(module, known) or _declared(module)) and not getattr(module, "return_indices", False)


def _sizes(pool: Any) -> set[int]:
    return {pool.output_size} if isinstance(pool.output_size, int) else set(pool.output_size)


def _plain(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Conv2d) or (layer.groups == 1 and layer.padding_mode == "zeros")


def _asks_shape(node: Node, shapes: set[Node]) -> bool:
    """Whether the node only reads a size, as in `x.view(x.size(0), -1)`."""
    if node.target is getattr:
        return str(node.args[1]) == "shape"
    return node.target == "size" or (node.target is operator.getitem and node.args[0] in shapes)


def _relu(inplace: bool = False) -> list[nn.Module]:
    return [nn.ReLU()]


def _flatten(start_dim: int = 0, end_dim: int = -1) -> list[nn.Module]:
    return [nn.Flatten(start_dim, end_dim)]


def _view(*shape: Any) -> list[nn.Module]:
    """`x.view(x.size(0), -1)` and `x.view(-1, 400)`."""
    batch, rest = shape[0] if len(shape) == 1 else shape
    if isinstance(batch, Node) and batch.args[-1] == 0 and isinstance(rest, int):
        return [nn.Flatten()]  # of another width the call itself would fail
    if batch == -1 and isinstance(rest, int):
        return [_Flat(rest)]
    raise TypeError


def _over_space(flat: type[nn.Module], deep: type[nn.Module] | None = None) -> Callable[..., list[nn.Module]]:
    """A reduction over all places, `x.mean((2, 3))`, and over those of the group too, `x.amax((2, 3, 4))`."""

    def reduction(dim: Any, keepdim: bool = False) -> list[nn.Module]:
        pools = {(2, 3): flat, (-2, -1): flat, (2, 3, 4): deep}
        pool = pools.get(tuple(sorted(dim)))
        if pool is None:
            raise TypeError
        return [pool(1)] if keepdim else [pool(1), nn.Flatten()]

    return reduction


def _max_pool(
    kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> list[nn.Module]:
    return [nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)]


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> list[nn.Module]:
    return [nn.Module()] if training else []


FUNCTIONS: dict[Any, Callable[..., list[nn.Module]]] = {
    **dict.fromkeys((F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"), _relu),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys(("view", "reshape"), _view),
    **dict.fromkeys((torch.mean, "mean"), _over_space(nn.AdaptiveAvgPool2d)),
    **dict.fromkeys((torch.amax, "amax"), _over_space(nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    F.avg_pool2d: lambda *args, **kwargs: [nn.AvgPool2d(*args, **kwargs)],
    F.adaptive_avg_pool2d: lambda output_size: [nn.AdaptiveAvgPool2d(output_size)],
    F.dropout: _dropout,
    "contiguous": lambda memory_format=None: [],
}
