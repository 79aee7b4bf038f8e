"""The plan of a fit, for people to read: what is pruned, and what is left dense and why."""

from collections.abc import Mapping

from torch import nn

from lottery_callbacks.functional import slices
from lottery_callbacks.functional.masks import Masks, kept
from lottery_callbacks.messages import describe
from lottery_callbacks.names import named_parameters
from lottery_callbacks.prunable import (
    cannot_be_pruned,
    left_by_default,
    places,
    require_unpruned,
    require_values,
    slices_of,
)


def with_reasons(reasons: Mapping[str, str]) -> list[str]:
    """Names with what is said of them, as in "net.0.bias (bias)"."""
    return [f"{name} ({reason})" for name, reason in reasons.items()]


def plan_of(title: str, pruned: Mapping[str, str], left: Mapping[str, str]) -> str:
    """The two lines that every callback prints: what is pruned, and what is left dense, with the reasons."""
    return f"{title}: {', '.join(with_reasons(pruned))}\nleft dense: {', '.join(with_reasons(left)) or 'nothing'}"


def plan_of_masks(module: nn.Module, masks: Masks) -> str:
    """The plan of a fit whose masks are given, with the count and density of each."""
    own, held, counts = named_parameters(module), places(module), kept(masks)
    sizes = {name: mask.numel() for name, mask in masks.items()}
    masked = {name: f"{counts[name]:,} of {size:,}, {counts[name] / max(size, 1):.1%}" for name, size in sizes.items()}
    left = {
        name: cannot_be_pruned(parameter, held[parameter]) or left_by_default(name, parameter, held[parameter])
        for name, parameter in own.items()
        if name not in masks
    }
    return plan_of("masked", masked, {name: reason or "no mask" for name, reason in left.items()})


def require_held(module: nn.Module, masks: Masks) -> None:
    """Refuse masks that the module would not hold to: its weights are zero exactly where its parameters are.

    Raises:
        ValueError: no mask can hold one of these parameters, `torch.nn.utils.prune` holds one already, or a slice that
            is divided by its norm would keep no weight.
    """
    require_values(module)
    require_unpruned(module, masks)
    own, held = named_parameters(module), places(module)
    for name in masks:
        if never := cannot_be_pruned(own[name], held[own[name]]):
            raise ValueError(f"no mask can hold {name} ({never}): take it out of the masks")
    if empty := slices.empty(masks, slices_of(module, masks)):
        raise ValueError(
            f"the mask of {describe(list(empty))} empties a slice that weight_norm or spectral_norm divides by its "
            "norm (0 / 0): keep a weight in each slice, or make the normalisation permanent"
        )
