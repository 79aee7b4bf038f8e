"""Hidden units: which axes of a network's tensors hold them.

`permutation_groups` reads them from the network's graph, and `check_groups` proves on an example that units may be
exchanged there (see `permutations`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lottery_callbacks.functional.modes import evaluating
from lottery_callbacks.functional.names import unwrapped
from lottery_callbacks.functional.permutations import Axis, Groups, permuted, random_permutations
from lottery_callbacks.functional.unit_flow import LAYERS as LAYERS
from lottery_callbacks.functional.unit_flow import MEND, Units, named_tensors, one_line, refusal
from lottery_callbacks.functional.unit_flow import NORMS as NORMS


def permutation_groups(
    network: nn.Module, example: Any = None, unitwise: tuple[type[nn.Module], ...] = ()
) -> dict[str, list[Axis]]:
    """Groups of hidden units of which any two may be exchanged: all axes of all tensors that hold these units.

    The graph of `torch.fx` is followed, in evaluation, with a number for each unit. Layers give out new units; norms,
    pooling and activations pass them on; what is added or multiplied becomes one (residual sums, gates); padding gives
    new ones, cat joins, Flatten makes a block of pixels of each. Units of inputs and outputs, and what is added to
    inputs, stay in place. Units that lie on the same axes are a group, named by the layer that makes it, in the order
    of execution. Nothing but names and sizes is read: a network on the "meta" device will do.

    Treated: Linear, convolutions (transposed and depthwise too, and subclasses with weights (out, in, ...)), batch and
    instance norm with running statistics, group norm of one group or of one channel a group, layer norm of features,
    PReLU, and what has no weights and acts on each unit. Values are (batch, units, ...), at Linear (batch, units). As
    sizes of inputs are not known, what goes another way cannot be told from that: a Linear on (batch, tokens, features)
    before batch norm of as many tokens, `x.view(-1, C)` of images with C channels. An example tells them.

    Args:
        network: or a LightningModule with a forward, then with its names; of a wrapper that within.
        example: an input; the groups are then proven on it by `check_groups`.
        unitwise: further classes of modules that act on each unit alike, and are not looked into.

    Returns:
        [(name, axis, places)] of each group. By hand: {"any": [("a.weight", 0), ("a.bias", 0), ("b.weight", 1)]}.

    Raises:
        ValueError: names a layer or call that is not treated, or a forward that cannot be traced.
    """
    network = unwrapped(network)
    units = Units(network, unitwise)
    if units.is_leaf_module(network, ""):
        return {}
    for name, part in network.named_modules():
        if "forward" in vars(part):  # torch.fx reads that of the class
            raise refusal(name, type(part).__name__, "its forward is set from outside")
    try:
        with evaluating(network):
            graph = units.trace(network)
    except Exception as error:  # torch.fx raises many
        raise ValueError(f"{type(network).__name__} cannot be traced ({one_line(error)}): {MEND}") from error
    for node in graph.nodes:
        units.follow(node)
    groups = _groups(units)
    if example is not None:
        check_groups(network, groups, example)
    return groups


def check_groups(network: nn.Module, groups: Groups, example: Any, seed: int = 0) -> None:
    """Refuse groups that are no symmetry: random permutations of all of them must not change the outputs.

    Outputs are compared in evaluation and float64, to 1e-9 of the largest. Of tensors whose values are all alike, as
    those of norms before training, others are drawn, since permutations would not show in them. The network is left as
    it is. Cost: two forward passes and two copies of the weights.

    Args:
        network: whose state the groups name (that within, if it is a wrapper).
        groups: of `permutation_groups`, or by hand.
        example: one input, or a tuple of several, with floats.
        seed: of the permutations and of what is drawn.

    Raises:
        ValueError: the outputs change, or `network` cannot run so.
    """
    network, generator = unwrapped(network), torch.Generator().manual_seed(seed)
    state = {name: _double(tensor) for name, tensor in named_tensors(network)}
    for name in {entry[0]: None for entries in groups.values() for entry in entries}:
        tensor = state.get(name)
        if tensor is not None and tensor.is_floating_point() and (tensor == tensor.flatten()[0]).all():
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            state[name] = 0.5 + drawn.to(tensor.device)  # above 0, for variances
    other = permuted(state, groups, random_permutations(groups, state, generator))
    inputs = tuple(_double(part) for part in (example if isinstance(example, tuple) else (example,)))
    try:
        with evaluating(network), torch.no_grad():
            before, after = (
                tree_leaves(torch.func.functional_call(network, weights, inputs, tie_weights=False))
                for weights in (state, other)
            )
    except (TypeError, RuntimeError) as error:
        message = f"{type(network).__name__} cannot run on the example in float64 ({one_line(error)})"
        raise ValueError(message) from error
    for one, two in zip(before, after, strict=True):
        if not torch.allclose(one, two, rtol=0, atol=1e-9 * float(one.abs().max())):
            raise ValueError(f"these groups are no symmetry of {type(network).__name__}: permuted, it computes another")


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def _groups(units: Units) -> dict[str, list[Axis]]:
    """Units on the same axes, with as many places on each, are a group."""
    lying: dict[int, dict[tuple[int, int], list[int]]] = {}
    for key, placed in units.axes.items():
        for place, unit in enumerate(placed):
            if one := units.united(unit):
                lying.setdefault(one, {}).setdefault(key, []).append(place)
    alike: dict[Any, list[dict[tuple[int, int], list[int]]]] = {}
    for at in lying.values():
        alike.setdefault(tuple((key, len(held)) for key, held in at.items()), []).append(at)
    found: dict[str, list[Axis]] = {}
    for group in alike.values():
        axes = []
        for key in group[0]:
            held = torch.tensor([at[key] for at in group], device="cpu")
            whole = held.flatten().tolist() == list(range(len(units.axes[key])))
            axes += [Axis(name, key[1], None if whole else held) for name in units.names[key[0]]]
        name = axes[0].name.rpartition(".")[0]
        while name in found:
            name += "'"
        found[name] = axes
    return found
