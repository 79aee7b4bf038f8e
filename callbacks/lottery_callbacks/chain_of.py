"""A network as the chain of layers that it executes, by `torch.fx`."""

import copy
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node, symbolic_trace

from lottery_callbacks.functional.modes import evaluating

TREATED = "Linear, Conv2d, ReLU, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Flatten, Dropout and Identity, in a chain"
KEPT = (nn.Linear, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def chain_of(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules in the order of execution, in evaluation; what does nothing then is left out.

    Modules within others are found where they are called, and a functional relu, flatten, pooling or mean over space
    becomes the module that does the same. The network is not changed; what is returned holds its own layers.

    Raises:
        ValueError: names a layer or call that is not one of those, or that does not take what the last one gave.
    """
    whole = nn.Sequential(network)  # a lone layer would be traced into its functional form
    before = [(part, dict(vars(part))) for part in network.modules()]  # a forward pass may count, or keep what it saw
    with evaluating(network):
        try:
            graph = symbolic_trace(whole).graph
        except Exception as error:  # torch.fx raises many
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{type(network).__name__} cannot be traced ({reason}): give {TREATED}") from error
        finally:
            for part, state in before:
                vars(part).clear()
                vars(part).update(state)
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
        else:
            name = node.target.removeprefix("0.") if node.op == "call_module" else node.name
            if [used for used in node.all_input_nodes if used not in shapes] != [previous]:
                raise ValueError(f"{name} does not take the output of the layer before it alone: give {TREATED}")
            steps += [(name, module) for module in _modules(node, name, whole)]
            previous = node
    return steps


def _modules(node: Node, name: str, whole: nn.Module) -> list[nn.Module]:
    """What the node does, as modules that `KEPT` names; none where it does nothing."""
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
        if isinstance(module, nn.Linear | nn.Conv2d) and {"weight", "bias"} & vars(module).keys():
            raise ValueError(
                f"{name} ({called}) has a weight that a hook sets, maybe of the step before: make it permanent "
                "(torch.nn.utils.prune.remove, remove_weight_norm)"
            )
        if not isinstance(module, KEPT) or not _treated(module):
            raise ValueError(f"{name} ({called}) cannot be treated: give {TREATED}; batch norm can be fused")
    return [module if isinstance(module, nn.Linear | nn.Conv2d) else _own(module) for module in modules]


def _own(module: nn.Module) -> nn.Module:
    """A copy without the hooks of the target's, and of a ReLU one that leaves its inputs alone."""
    if isinstance(module, nn.ReLU):
        return nn.ReLU()
    own = copy.copy(module)
    own._forward_hooks, own._forward_pre_hooks = OrderedDict(), OrderedDict()
    return own


def _treated(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return bool(module.groups == 1) and module.padding_mode == "zeros"
    if isinstance(module, nn.Flatten):
        return bool(module.start_dim > 0)
    return not getattr(module, "return_indices", False)


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
    """`x.view(x.size(0), -1)` and `x.view(-1, 400)`; another width fails in the next layer."""
    batch, rest = shape[0] if len(shape) == 1 else shape
    if not (isinstance(batch, Node) or batch == -1) or isinstance(rest, Node):
        raise TypeError
    return [nn.Flatten()]


def _mean(dim: Any, keepdim: bool = False) -> list[nn.Module]:
    if sorted(dim) not in ([2, 3], [-2, -1]):
        raise TypeError
    return [nn.AdaptiveAvgPool2d(1)] if keepdim else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


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
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    F.avg_pool2d: lambda *args, **kwargs: [nn.AvgPool2d(*args, **kwargs)],
    F.adaptive_avg_pool2d: lambda output_size: [nn.AdaptiveAvgPool2d(output_size)],
    F.dropout: _dropout,
    "contiguous": lambda memory_format=None: [],
}
