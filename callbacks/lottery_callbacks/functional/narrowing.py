"""A network whose pruned neurons and filters are really gone: smaller dense layers, the same outputs."""

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lottery_callbacks.functional.hidden_units import permutation_groups
from lottery_callbacks.functional.modes import evaluating
from lottery_callbacks.functional.names import find_parameters, unwrapped
from lottery_callbacks.functional.permutations import Axis, places, widths
from lottery_callbacks.functional.unit_flow import LAYERS, NORMS, named_tensors, one_line

EXACT = 1e-12  # of the largest value: float64 numbers that differ by less are one


class Narrowed(NamedTuple):
    """What `narrowed` gives.

    Attributes:
        network: an ordinary module of the same class, with smaller layers.
        before: parameters of the network that was given, all of them, tied ones once.
        after: those of the smaller one.
        units: of each group of hidden units, by the layer that makes it, how many there were and are.
    """

    network: nn.Module
    before: int
    after: int
    units: dict[str, tuple[int, int]]


def narrowed(
    network: nn.Module, masks: Mapping[str, Tensor], example: Any, unitwise: tuple[type[nn.Module], ...] = ()
) -> Narrowed:
    """A smaller copy of `network` that computes, in evaluation, what it computes with its weights under `masks`.

    A hidden unit goes if all weights that lead to it are 0, in each of the layers that share it (residual sums): it is
    cut out of these layers, of their norms and of its readers. What it still gives out, a constant c made of biases,
    shifts of norms and activations, is measured and stays in the sums of its readers: W c goes into the bias, which a
    reader without one gets. A convolution padded with zeros, or a transposed one, sees a constant as an image with an
    edge, and no bias gives that. Where c is not 0 there, one unit of the group stays and bears the others: its weights
    w become w + sum_u w_u c_u / c. Of each group one unit stays in any case.

    Units stay, since no such cut would be exact, that a layer norm, or a group norm of several channels, norms
    together; that a layer gives out beside others of another group, as where shortcuts pad with channels; whose weights
    are tied; and those that only a depthwise filter cuts off. What is added to inputs or outputs is no hidden unit.

    `network` is left as it is; the copy has its types, devices, modes and frozen weights, and no gradients. Sums are
    made in float64 and rounded once: outputs differ by rounding alone. Not so in training, where batch norm takes the
    statistics of the batch and dropout draws other numbers.

    Args:
        network: a module that `permutation_groups` can follow.
        masks: of some of its parameters, True = kept, as of `Compressed.masks` or a ticket; single weights count too.
        example: an input x, or a tuple of several: any numbers, of the shape that the network will see. What is
            measured and compared is so at x and at 1 - 2 x.
        unitwise: classes of modules that act on each unit alike; see `permutation_groups`.

    Raises:
        ValueError: names a mask that fits no parameter, or a layer or call that is not treated; the smaller network
            cannot run on the example, or gives other outputs.

    Cost: two copies of the network in float64, and four forward passes.
    """
    network = unwrapped(network)
    wide = deepcopy(network).double()
    _apply(masks, wide)
    bare = _with_biases(wide)
    groups = permutation_groups(wide, unitwise=unitwise)
    first = tree_map(_double, example if isinstance(example, tuple) else (example,))
    inputs = [first, tree_map(_another, first)]  # a value that only a single example keeps the same is no constant
    small, units = deepcopy(wide), {}
    with torch.no_grad():
        seen = _Seen(wide)
        outputs = _run(wide, inputs)
        cuts: dict[tuple[str, int], Tensor] = {}
        for group, count in widths(groups, dict(named_tensors(wide))).items():
            axes = [_Place(small, Axis(*entry), count, seen) for entry in groups[group]]
            gone = _cut(axes, count)
            units[group] = (count, count - int(gone.sum()))
            for one in axes:
                cut = cuts.setdefault((one.name, one.axis), torch.zeros(one.tensor.shape[one.axis], dtype=torch.bool))
                cut[one.places[gone].flatten()] = True
        _shrink(small, cuts)
        _compare(small, inputs, outputs)
        _finish(small, network, bare)
    return Narrowed(small, _count(network), _count(small), units)


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _another(part: Any) -> Any:
    return 1 - 2 * part if isinstance(part, Tensor) and part.is_floating_point() else part


def _double(part: Any) -> Any:
    return part.detach().double() if isinstance(part, Tensor) and part.is_floating_point() else part


@torch.no_grad()
def _apply(masks: Mapping[str, Tensor], network: nn.Module) -> None:
    parameters = find_parameters(network, masks)
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ValueError(f"the mask of {name} fits no parameter of {type(network).__name__}: give its own masks")
        parameters[name][~mask.to(parameters[name].device)] = 0


def _with_biases(network: nn.Module) -> list[str]:
    """Give every layer that has none a bias, of zeros; the names of these layers."""
    bare = []
    for name, part in network.named_modules():
        layer: Any = part
        if isinstance(part, NORMS) and not list(named_tensors(part)):
            raise ValueError(f"{name} ({type(part).__name__}) has no scales that tell its units: give it some")
        if isinstance(part, LAYERS) and layer.bias is None:
            weight: Tensor = layer.weight
            size = layer.out_features if isinstance(part, nn.Linear) else layer.out_channels
            layer.bias = nn.Parameter(weight.new_zeros(size), weight.requires_grad)
            bare.append(name)
    return bare


def _run(network: nn.Module, inputs: list[tuple[Any, ...]]) -> list[Tensor]:
    with evaluating(network):
        return tree_leaves([network(*one) for one in inputs])


class _Seen(dict[str, tuple[Tensor, Tensor]]):
    """The least and the highest value at each place of what a layer reads, in a forward pass, by the layer's name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, layer in network.named_modules():
            if isinstance(layer, LAYERS):
                layer.register_forward_pre_hook(partial(self._see, name))

    def _see(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].transpose(0, 1).flatten(1)
        low, high = rows.amin(1), rows.amax(1)
        if name in self:  # in another pass, or called several times
            low, high = torch.minimum(low, self[name][0]), torch.maximum(high, self[name][1])
        self[name] = low, high


class _Place:
    """An axis of a tensor on which the units of a group lie, and what its layer does with them."""

    def __init__(self, network: nn.Module, entry: Axis, units: int, seen: _Seen) -> None:
        self.name, self.axis = entry[:2]
        owner, _, leaf = self.name.rpartition(".")
        layer: Any = network.get_submodule(owner)
        self.layer, self.tensor = layer, getattr(layer, leaf)
        self.places = places(entry, self.tensor, units).cpu()
        names = Counter(id(tensor) for _, tensor in named_tensors(network))
        weight = isinstance(layer, LAYERS) and leaf == "weight" and getattr(layer, "groups", 1) == 1
        self.gives = weight and self.axis == int(getattr(layer, "transposed", False))
        self.reads = weight and not self.gives
        together = isinstance(layer, nn.LayerNorm) or not _by_channel(layer)
        tied = names[id(self.tensor)] > 1 or (self.reads and names[id(layer.bias)] > 1)
        self.stays = together or tied or (self.gives and entry.places is not None)
        if self.reads:
            self.weight = self.tensor.detach().movedim(self.axis, 1)  # (out, in, ...), a view
            low, high = (bound[self.places] for bound in seen[owner])
            scale = EXACT * float(torch.stack(seen[owner]).abs().max())
            self.even = (high - low <= scale).all(1)
            self.constants = torch.where(high.abs() <= scale, 0, (low + high) / 2)  # (units, copies)

    @property
    def has_edge(self) -> bool:
        """Whether a constant channel becomes uneven in its sums."""
        if isinstance(self.layer, nn.Linear) or self.layer.padding == "valid":
            return False
        if self.layer.transposed:
            return True
        reach = (d * (k - 1) for d, k in zip(self.layer.dilation, self.layer.kernel_size, strict=True))
        return self.layer.padding_mode == "zeros" and any(reach if self.layer.padding == "same" else self.layer.padding)

    def drops(self, gone: Tensor, bearer: int | None) -> None:
        """Put what those units give out into the layer's bias, or into the bearer's weights."""
        constants = self.constants[gone]
        if not constants.any():
            return
        lost = self.weight[:, self.places[gone]]  # (out, units, copies, ...)
        if not self.has_edge:
            self.layer.bias += (lost.reshape(*lost.shape[:3], -1).sum(3) * constants).sum((1, 2))
            return
        parts = constants / self.constants[bearer]
        self.weight[:, self.places[bearer]] += (lost * parts.view(*parts.shape, *[1] * (lost.ndim - 3))).sum(1)


def _cut(axes: list[_Place], units: int) -> Tensor:
    """Which units of a group go; what they give out is in their readers then."""
    makers, readers = [one for one in axes if one.gives], [one for one in axes if one.reads]
    if not makers or any(one.stays for one in axes):
        return torch.zeros(units, dtype=torch.bool)
    zero = [(one.tensor.movedim(one.axis, 0).flatten(1) == 0).all(1).cpu()[one.places].all(1) for one in makers]
    gone = torch.stack([*zero, *(one.even.cpu() for one in readers)]).all(0)
    edged = [one.constants.cpu() for one in readers if one.has_edge and one.constants.cpu()[gone].any()]
    bearer = None
    if edged:
        least = torch.stack([constants.abs().amin(1) for constants in edged]).amin(0)
        bearer = int(torch.where(gone, least, -1).argmax())
        if least[bearer]:
            gone[bearer] = False
        else:  # none that could bear them all
            gone &= ~torch.stack([constants.any(1) for constants in edged]).any(0)
    if gone.all():
        gone[0] = False
    for one in readers:
        one.drops(gone, bearer)
    return gone


def _shrink(network: nn.Module, cuts: Mapping[tuple[str, int], Tensor]) -> None:
    for (name, axis), cut in cuts.items():
        if not cut.any():  # tied tensors stay one
            continue
        owner, _, leaf = name.rpartition(".")
        layer = network.get_submodule(owner)
        old = getattr(layer, leaf)
        new = old.index_select(axis, (~cut).nonzero().flatten().to(old.device))
        setattr(layer, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, LAYERS):
            _resize_convolution(layer)
        elif isinstance(layer, NORMS) and not isinstance(layer, nn.LayerNorm):
            size = max(tensor.numel() for _, tensor in named_tensors(layer))
            sizes = ["num_features", "num_channels", "num_parameters", *(["num_groups"] if _by_channel(layer) else [])]
            for attribute in filter(partial(hasattr, layer), sizes):
                setattr(layer, attribute, size)


def _by_channel(layer: Any) -> bool:
    """False for a group norm of several channels."""
    return getattr(layer, "num_groups", 0) == getattr(layer, "num_channels", 0)


def _resize_convolution(layer: Any) -> None:
    first, second = layer.weight.shape[:2]
    if layer.transposed:
        layer.in_channels, layer.out_channels = first, second * layer.groups
    elif layer.groups == 1:
        layer.out_channels, layer.in_channels = first, second
    elif layer.groups == layer.in_channels:
        layer.in_channels = layer.groups = first * layer.groups // layer.out_channels
        layer.out_channels = first


def _compare(network: nn.Module, inputs: list[tuple[Any, ...]], outputs: list[Tensor]) -> None:
    kind = type(network).__name__
    try:
        found = _run(network, inputs)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{kind} cannot run with fewer units ({one_line(error)}): its forward must name no width"
        ) from error
    for one, two in zip(found, outputs, strict=True):
        if one.shape != two.shape or not torch.allclose(one, two, rtol=0, atol=1e-9 * float(two.abs().max())):
            raise ValueError(f"{kind} gives other outputs with fewer units: one of its layers is not what it declares")


def _finish(small: nn.Module, network: nn.Module, bare: list[str]) -> None:
    """The types of `network`, and no bias that it had not and that is 0."""
    for name in bare:
        layer: Any = small.get_submodule(name)
        layer.bias = layer.bias if layer.bias.any() else None
    kinds = {name: tensor.dtype for name, tensor in named_tensors(network)}
    for name, tensor in named_tensors(small):
        tensor.data = tensor.data.to(kinds.get(name) or kinds[name.rpartition(".")[0] + ".weight"])
