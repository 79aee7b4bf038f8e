"""How hidden units flow through a network's graph: what each layer, norm and call does to them.

`hidden_units.permutation_groups` reads groups of axes from it.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.fx import Node, Tracer


def _ranks(*kinds: str) -> list[type[nn.Module]]:
    return [getattr(nn, f"{kind}{rank}d") for kind in kinds for rank in (1, 2, 3)]


def _words(text: str) -> set[str]:
    return set(text.split())


MEND = "give groups by hand"
STATISTICS = ("running_mean", "running_var")
LAYERS = (nn.Linear, *_ranks("Conv", "ConvTranspose"))
NORMS = (nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.PReLU, *_ranks("BatchNorm", "InstanceNorm"))
# Modules, functions and methods, torch's and Python's, go by one name: AvgPool2d and avg_pool2d are "avgpool2d".
UNITWISE = _words(
    "identity dropout dropout1d dropout2d dropout3d alphadropout featurealphadropout relu relu6 leakyrelu elu celu "
    "selu gelu silu mish softplus softsign tanh sigmoid logsigmoid hardtanh hardswish hardsigmoid neg contiguous clone "
    "detach float double to"
)
POOLS = {f"{kind}pool{rank}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg") for rank in (1, 2, 3)}
OF_ANY_RANK = _words("upsample interpolate")  # others take channels for pixels where the rank is another
POOLS |= _words("upsamplingnearest2d upsamplingbilinear2d zeropad2d") | OF_ANY_RANK
SUMS = _words("add sub mul truediv div iadd isub imul itruediv")


class _Value(NamedTuple):
    """What a node gives: its units, its dimensions with the batch, and whether pixels lie in blocks behind each."""

    units: list[int]
    rank: int
    flat: bool = False

    def goes_through(self, called: str) -> bool:
        kind = called.replace("_", "").lower()
        pools = kind in POOLS and self.rank > 2 and (kind in OF_ANY_RANK or kind.endswith(f"{self.rank - 2}d"))
        return pools or kind in UNITWISE

    def spread(self, size: int) -> list[int]:
        """The unit of each of `size` entries."""
        pixels, rest = divmod(size, len(self.units))
        if rest or not pixels or (pixels > 1 and not self.flat):
            raise ValueError(f"it takes {size} units and gets {len(self.units)}")
        return [unit for unit in self.units for _ in range(pixels)]


class Units(Tracer):
    """Traces the graph and follows units, which are numbers, through it; unit 0 is what stays in place."""

    def __init__(self, network: nn.Module, unitwise: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.network, self.unitwise = network, unitwise
        self.parents = [0]  # union-find
        self.values: dict[Node, _Value | None] = {}  # None: nothing but inputs, sizes and constants
        self.axes: dict[tuple[int, int], list[int]] = {}  # of a tensor, by its id: the unit at each place
        self.names: dict[int, list[str]] = {}  # several where tensors are tied
        for name, tensor in named_tensors(network):
            self.names.setdefault(id(tensor), []).append(name)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYERS, *NORMS, *self.unitwise)) or super().is_leaf_module(m, module_qualified_name)

    def follow(self, node: Node) -> None:
        """Find what the node gives; one that is not treated is refused by name."""
        hidden = [value for used in node.all_input_nodes if (value := self.values[used])]
        name, called, value = node.name, getattr(node.target, "__name__", str(node.target)), None
        try:
            if node.op == "call_module":
                name, module = called, self.network.get_submodule(called)
                called = type(module).__name__
                value = self._module(module, hidden)
            elif node.op == "get_attr" and isinstance(attrgetter(called)(self.network), nn.Parameter):
                if not self._scalar(node):
                    raise ValueError("a weight that is used without its layer")
            elif node.op == "output":
                for given in hidden:
                    self._tie(given.units, [0] * len(given.units))
            elif hidden:
                value = self._function(called, node, hidden)
        except (LookupError, TypeError, ValueError) as error:
            raise refusal(name, called, one_line(error)) from error
        self.values[node] = value

    def united(self, unit: int) -> int:
        """The number that stands for this unit and all that it has become one with."""
        while (parent := self.parents[unit]) != unit:
            self.parents[unit] = self.parents[parent]
            unit = parent
        return unit

    def _scalar(self, node: Node) -> bool:
        return node.op == "get_attr" and attrgetter(str(node.target))(self.network).numel() == 1

    def _new(self, size: int) -> list[int]:
        start = len(self.parents)
        self.parents += range(start, start + size)
        return list(range(start, start + size))

    def _tie(self, first: Sequence[int], second: Sequence[int]) -> None:
        for one, other in zip(first, second, strict=True):
            low, high = sorted((self.united(one), self.united(other)))
            self.parents[high] = low

    def _place(self, layer: nn.Module, attribute: str, axis: int, units: list[int] | None = None) -> list[int]:
        """Put units, by default new ones, on an axis of a tensor of the layer; they are those that it has already."""
        tensor = getattr(layer, attribute)
        if id(tensor) not in self.names:
            raise ValueError(f"its {attribute} is none of its own: a hook or parametrization to be made permanent")
        units = units or self._new(tensor.shape[axis])
        self._tie(self.axes.setdefault((id(tensor), axis), units), units)
        return units

    def _module(self, module: Any, hidden: list[_Value]) -> _Value | None:
        (value,) = hidden or (None,)
        if isinstance(module, (*LAYERS, *NORMS)):
            if further := {name for name, _ in module.named_parameters()} - {"weight", "bias"}:
                raise ValueError(f"it has the parameter {min(further)} besides")
            return (self._layer if isinstance(module, LAYERS) else self._norm)(module, value)
        if value and isinstance(module, nn.Flatten):
            return self._flatten(value, module.start_dim, module.end_dim)
        if value and not isinstance(module, self.unitwise) and not value.goes_through(type(module).__name__):
            raise ValueError("it is not known")
        return value

    def _layer(self, layer: Any, value: _Value | None) -> _Value:
        """Linear or convolution."""
        transposed, groups, units = getattr(layer, "transposed", False), getattr(layer, "groups", 1), None
        rank = 2 + len(getattr(layer, "kernel_size", ()))
        if value and value.rank != rank:
            raise ValueError(f"it gets values of {value.rank} dimensions")
        if groups > 1 and (transposed or groups != layer.in_channels):
            raise ValueError(f"it has {groups} groups of channels")
        size = groups if groups > 1 else layer.weight.shape[0 if transposed else 1]
        before = value.spread(size) if value else [0] * size
        if groups > 1:
            units = [unit for unit in before for _ in range(layer.out_channels // groups)]
        else:
            self._place(layer, "weight", 0 if transposed else 1, before)
        units = self._place(layer, "weight", 1 if transposed else 0, units)
        if layer.bias is not None:
            self._place(layer, "bias", 0, units)
        return _Value(units, rank)

    def _norm(self, norm: Any, value: _Value | None) -> _Value | None:
        if value and isinstance(norm, nn.GroupNorm) and norm.num_groups not in (1, norm.num_channels):
            raise ValueError(f"it has {norm.num_groups} groups of channels")
        if value and isinstance(norm, nn.LayerNorm) and (value.rank > 2 or len(norm.normalized_shape) > 1):
            raise ValueError("it norms more than features")
        for attribute in ("weight", "bias", *STATISTICS):
            tensor = getattr(norm, attribute, None)
            if tensor is not None and tensor.numel() > 1:
                value = value and value._replace(units=value.spread(len(tensor)), flat=False)
                self._place(norm, attribute, 0, value.units if value else [0] * len(tensor))
        return value

    def _function(self, called: str, node: Node, hidden: list[_Value]) -> _Value | None:
        args, kwargs = cast(Any, node.args), cast(Any, node.kwargs)
        if called in ("size", "dim") or (called == "getattr" and args[1] in ("shape", "ndim", "dtype", "device")):
            return None
        if called.strip("_") in SUMS:
            used = [self.values[one] for one in node.all_input_nodes if not self._scalar(one)]
            return self._sum(hidden, fixed=None in used)
        if called in ("cat", "concat"):
            return self._cat([self.values[one] for one in args[0]], *args[1:], **kwargs)
        (value,) = hidden
        if value.goes_through(called):
            return value
        follow = {"flatten": self._flatten, "pad": self._pad, "getitem": self._item, "view": self._view}
        follow |= {"reshape": self._view, **dict.fromkeys(("mean", "sum", "amax"), self._over_space)}
        if called not in follow:
            raise ValueError("it is not known")
        return follow[called](value, *args[1:], **kwargs)

    def _sum(self, hidden: list[_Value], fixed: bool) -> _Value:
        """Of values, or their product: entry by entry, or with one unit that goes with each."""
        total = max(hidden, key=lambda value: len(value.units))
        for value in hidden:
            if value[1:] != total[1:]:
                raise ValueError("its values have different shapes")
            if len(value.units) > 1:
                self._tie(total.units, value.units)
        if fixed:
            self._tie(total.units, [0] * len(total.units))
        return total

    def _cat(self, values: list[_Value | None], dim: int = 0) -> _Value:
        parts = [value for value in values if value and not value.flat]
        if len(parts) < len(values) or len({part.rank for part in parts}) > 1 or dim % parts[0].rank != 1:
            raise ValueError("it joins more than hidden units")
        return _Value([unit for part in parts for unit in part.units], parts[0].rank)

    def _flatten(self, value: _Value, start_dim: int = 0, end_dim: int = -1) -> _Value:
        if (start_dim % value.rank, end_dim % value.rank) != (1, value.rank - 1):
            raise ValueError("it flattens something else than a whole example")
        return value if value.rank == 2 else _Value(value.units, 2, flat=True)

    def _view(self, value: _Value, *shape: Any) -> _Value:
        """`x.view(x.size(0), -1)` and `x.view(-1, 400)`."""
        sizes = shape[0] if len(shape) == 1 else shape
        if len(sizes) != 2 or not isinstance(sizes[1], int):
            raise ValueError("it makes another shape")
        return self._flatten(value, 1)

    def _over_space(self, value: _Value, dim: Any = 0, keepdim: bool = False) -> _Value:
        """A reduction, `x.mean((2, 3))`."""
        dims = [one + value.rank if one < 0 else one for one in ([dim] if isinstance(dim, int) else dim)]
        if min(dims) < 2:
            raise ValueError("it reduces something else than space")
        return value if keepdim else value._replace(rank=max(2, value.rank - len(dims)))

    def _pad(self, padded: _Value, pad: Any, mode: str = "constant", value: Any = None) -> _Value:
        """Pixels, and whole channels of one value, which may change places like units."""
        channels, pixels = pad[2 * padded.rank - 4 :], len(pad) <= 2 * (padded.rank - 2)
        if not pixels and (mode != "constant" or len(channels) != 2 or min(channels) < 0 or padded.flat):
            raise ValueError("it pads something else than pixels and channels")
        before, after = (0, 0) if pixels else channels
        return padded._replace(units=[*self._new(before), *padded.units, *self._new(after)])

    def _item(self, value: _Value, index: Any) -> _Value:
        """`x[:, :, ::2, ::2]`."""
        slices = isinstance(index, tuple) and all(isinstance(one, slice) for one in index)
        if not slices or index[:2] != (slice(None), slice(None)):
            raise ValueError("it takes something else than pixels")
        return value


def named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, tied ones by each of their names."""
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def one_line(error: Exception) -> str:
    """The beginning of its message, without line breaks."""
    return " ".join(str(error).split())[:200]


def refusal(name: str, called: str, reason: str) -> ValueError:
    """Of a layer or call that units cannot be followed through."""
    return ValueError(f"{name} ({called}) cannot be followed ({reason}): {MEND}")
