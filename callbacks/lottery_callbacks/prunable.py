"""Which parameters are weight matrices: the policy of `Pruning`, read off the module's own objects."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lottery_callbacks.functional.slices import WHOLE
from lottery_callbacks.messages import describe
from lottery_callbacks.names import named_parameters, plain_modules

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NORM, EMBEDDING = re.compile(r"Norm(1d|2d|3d)?$"), re.compile(r"Embeddings?$")  # names of classes of others
INPUTS = (  # the input dimension of torch's layers; the first match counts
    (nn.modules.conv._ConvTransposeNd, 0),
    (nn.modules.conv._ConvNd | nn.Linear | nn.Bilinear | nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention, 1),
)
THEIRS = re.compile(r"weight|weight_(ih|hh|hr)(_l\d+)?(_reverse)?|(in|q|k|v)_proj_weight")  # what these call a matrix


@dataclass(frozen=True)
class Place:
    """Where a parameter is held.

    Attributes:
        layer: the layer that computes with it.
        tensor: what the layer calls it: "weight", also where it is `weight_v` or `parametrizations.weight.original1`.
        under: what computes the tensor from it: "weight_norm", "spectral_norm", "prune", a parametrization's class.
        gain: whether it is the gain of weight_norm.
        dim: the dimension of the direction of weight_norm whose slices are normalised (`WHOLE` for all at once).
    """

    layer: nn.Module
    tensor: str
    under: str = ""
    gain: bool = False
    dim: int = WHOLE


def places(module: nn.Module) -> dict[nn.Parameter, list[Place]]:
    """Every parameter of `module` with the places that hold it: several where it is tied."""
    layers = plain_modules(module)
    parents = {
        held: (layer, tensor)
        for layer in layers
        if is_parametrized(layer)
        for tensor, held in layer.parametrizations.items()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    }
    found: dict[nn.Parameter, list[Place]] = {}
    for layer in layers:
        for leaf, parameter in layer._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append(_place(layer, leaf, parameter, parents))
    return found


def _place(layer: nn.Module, leaf: str, parameter: nn.Parameter, parents: Mapping[nn.Module, tuple]) -> Place:
    plain = leaf.removesuffix("_orig")
    if plain != leaf and f"{plain}_mask" in layer._buffers:
        return Place(layer, plain, "prune")
    if isinstance(layer, ParametrizationList) and layer in parents:
        return _parametrized(layer, leaf, parameter, *parents[layer])
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and leaf in (f"{hook.name}_g", f"{hook.name}_v"):
            return Place(layer, hook.name, "weight_norm", leaf.endswith("_g"), _dimension(hook.dim, parameter))
        if isinstance(hook, SpectralNorm) and leaf == f"{hook.name}_orig":
            return Place(layer, hook.name, "spectral_norm")
    return Place(layer, leaf)


def _parametrized(
    held: ParametrizationList, leaf: str, parameter: nn.Parameter, layer: nn.Module, tensor: str
) -> Place:
    first, *others = held
    for other in [first, *others]:
        if not isinstance(other, parametrizations._WeightNorm | parametrizations._SpectralNorm):
            known = isinstance(other, parametrizations._Orthogonal)
            return Place(layer, tensor, "orthogonal" if known else type(other).__name__)
    if isinstance(first, parametrizations._WeightNorm):
        return Place(layer, tensor, "weight_norm", leaf == "original0", _dimension(first.dim, parameter))
    return Place(layer, tensor, "spectral_norm")


def _dimension(dim: int, parameter: nn.Parameter) -> int:
    return dim if dim == WHOLE or not parameter.ndim else dim % parameter.ndim


def cannot_be_pruned(parameter: nn.Parameter, held: Iterable[Place]) -> str | None:
    """Why no mask can hold `parameter`, whatever is asked for; None where one can."""
    if isinstance(parameter, UninitializedParameter):
        return "no values yet"
    if hasattr(parameter, "__tensor_flatten__"):
        return f"{type(parameter).__name__}, a wrapper of tensors"
    if parameter.is_nested or parameter.layout != torch.strided:
        return "nested" if parameter.is_nested else f"{str(parameter.layout).removeprefix('torch.')} layout"
    if not (parameter.is_floating_point() or parameter.is_complex()) or parameter.dtype.itemsize < 2:
        return str(parameter.dtype).removeprefix("torch.")
    for place in held:
        if place.gain:
            return "gain of weight_norm"
        if place.under == "orthogonal":
            return "orthogonal: zeros in it are not zeros in the weight"
    return None if parameter.numel() else "empty"


def left_by_default(name: str, parameter: nn.Parameter, held: Iterable[Place]) -> str | None:
    """Why `parameter` is no trainable weight matrix; None where it is one. See the table of `Pruning`."""
    held = list(held)
    names = [_label(name, place) for place in held]
    if any(is_norm(place.layer) for place in held):
        return "norm layer"
    if any(_is_embedding(place.layer) for place in held):
        return "embedding"
    if any("bias" in own for own in names):
        return "bias"
    if any(map(_names_embedding, names)):
        return "embedding"
    if not any(input_dim_of(place) is not None for place in held) and not _is_matrix(parameter, held):
        return "no weight matrix"
    if unknown := [place.under for place in held if place.under not in ("", "prune", "weight_norm", "spectral_norm")]:
        return f"parametrized by {unknown[0]}"
    return None if parameter.requires_grad else "frozen"


def _label(name: str, place: Place) -> str:
    """The parameter's own name; in a list or dict of parameters after the list's name."""
    of_list = isinstance(place.layer, nn.ParameterList | nn.ParameterDict)
    return "_".join(name.split(".")[-2:]) if of_list else place.tensor


def _is_matrix(parameter: Tensor, held: Iterable[Place]) -> bool:
    if parameter.ndim == 2 and any(place.tensor == "weight" for place in held):
        return True  # as torch's layers call theirs: also a single row or column
    return sum(size > 1 for size in parameter.shape) > 1


def is_norm(layer: nn.Module) -> bool:
    """Whether `layer` is a norm layer: one of torch's, or of a class that is called so."""
    return isinstance(layer, NORMS) or NORM.search(type(layer).__name__) is not None


def _is_embedding(layer: nn.Module) -> bool:
    known = isinstance(layer, nn.Embedding | nn.EmbeddingBag)
    return known or EMBEDDING.search(type(layer).__name__) is not None


def _names_embedding(name: str) -> bool:
    words = re.findall(r"[^\W\d_]+", name.lower()) or [""]
    positions = {"pos", "position", "positions", "positional"}
    return (
        any(word.startswith("emb") or word.endswith("embed") for word in words)
        or not positions.isdisjoint(words)
        or words[-1] in {"token", "tokens", "prompt", "prompts"}
    )


def input_dim_of(place: Place) -> int | None:
    """The dimension of the layer's weight that runs over its inputs; None where the layer is not known."""
    if not THEIRS.fullmatch(place.tensor):
        return None
    if hasattr(place.layer, "nf") and any(kind.__name__ == "Conv1D" for kind in type(place.layer).__mro__):
        return 0  # of transformers, as in GPT-2: (in, out)
    return next((dim for kind, dim in INPUTS if isinstance(place.layer, kind)), None)


def input_dim(held: Iterable[Place]) -> int | None:
    """The input dimension where all layers that hold a weight, embeddings left aside, agree on it."""
    dims = {input_dim_of(place) for place in held if not _is_embedding(place.layer)}
    return dims.pop() if len(dims) == 1 else None


def slices_of(module: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Of these, the parameters whose slices are divided by their norms, with the dimension; see `functional.slices`."""
    own, held = named_parameters(module), places(module)
    return {n: place.dim for n in names for place in held[own[n]] if place.under in ("weight_norm", "spectral_norm")}


def require_values(module: nn.Module) -> None:
    """Refuse lazy and meta modules.

    Raises:
        ValueError: names the parameters without values.
    """
    bare = [n for n, p in named_parameters(module).items() if isinstance(p, UninitializedParameter) or p.is_meta]
    if bare:
        raise ValueError(f"{describe(bare)} have no shape yet: run the module on one batch before the fit")


def require_unpruned(module: nn.Module, names: Iterable[str]) -> None:
    """Refuse weights that `torch.nn.utils.prune` masks: a density of ours would not be the network's.

    Raises:
        ValueError: names them.
    """
    own, held = named_parameters(module), places(module)
    if theirs := [name for name in names if any(place.under == "prune" for place in held[own[name]])]:
        raise ValueError(
            f"{describe(theirs)} was pruned by torch.nn.utils.prune, whose mask counts in no density of ours: keep it "
            "by Ticket.from_state_dict(module.state_dict()), then call prune.remove on each layer"
        )
