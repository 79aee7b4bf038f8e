"""The same network with its hidden units in another order: weights, masks or scores, moved by groups of axes.

Of hidden units one may exchange any two, with all weights that lead to them and away from them: the function stays the
same, and the weights are other ones. Which axes belong together `hidden_units.permutation_groups` reads from a network.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Permutations = dict[str, Tensor]  # of a group: place i of the permuted network holds unit permutation[i] of the old one
Groups = Mapping[str, Sequence[tuple[Any, ...]]]  # Axis, or by hand (name, axis)


class Axis(NamedTuple):
    """An axis of a tensor of the state on which the units of a group lie.

    `places` (units, copies) are those of each unit; None stands for the whole axis in equal blocks, unit after unit, as
    of the pixels of each channel behind Flatten.
    """

    name: str
    axis: int
    places: Tensor | None = None


def permuted(state: State, groups: Groups, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state, or the masks or scores of some of its tensors, with place i of a group from unit permutation[i].

    Values are moved, never computed with: bits, zeros and types stay. Whatever is in no group (weights' other axes,
    num_batches_tracked) is the same tensor as before; names of groups that the state lacks are passed over, since masks
    are of weights alone.

    Raises:
        ValueError: names a group whose permutation is none, a tensor it does not fit, or a state without its names.
    """
    known = {entry[0] for entries in groups.values() for entry in entries}
    if known and not known & state.keys():
        raise ValueError(f"the state has no {min(known)}: give the names of the network that the groups are of")
    moved = dict(state)
    for group, permutation in permutations.items():
        if not torch.equal(permutation.sort().values.cpu(), torch.arange(len(permutation))):
            raise ValueError(f"the permutation of {group} does not hold each of 0 to {len(permutation) - 1} once")
        for entry in groups[group]:
            if (name := entry[0]) in moved:
                moved[name] = reordered(moved[name], entry, permutation)
    return moved


def random_permutations(groups: Groups, state: State, generator: torch.Generator) -> Permutations:
    """A permutation of each group, uniformly drawn; `state` tells how many units there are."""
    return {
        group: torch.randperm(units, generator=generator, device=generator.device)
        for group, units in widths(groups, state).items()
    }


def widths(groups: Groups, state: State) -> dict[str, int]:
    """Units of each group: what its shortest axis holds, since others may hold blocks of a unit."""
    found = {}
    for group, entries in groups.items():
        if missing := [entry[0] for entry in entries if entry[0] not in state]:
            raise ValueError(f"the state has no {missing[0]}, of group {group}: give all tensors of the network")
        axes = [Axis(*entry) for entry in entries]
        found[group] = min(state[name].shape[axis] if held is None else len(held) for name, axis, held in axes)
    return found


def places(entry: tuple[Any, ...], tensor: Tensor, units: int) -> Tensor:
    """Those of each unit on the axis, (units, copies); refused where the units do not fit."""
    name, axis, known = Axis(*entry)
    size = tensor.shape[axis]
    if known is None and size % units == 0:
        return torch.arange(size, device=tensor.device).view(units, -1)
    if known is None or len(known) != units or int(known.max()) >= size:
        raise ValueError(f"{name} has {size} entries on axis {axis}, which {units} units do not fit")
    return known.to(tensor.device)


def reordered(tensor: Tensor, entry: tuple[Any, ...], permutation: Tensor) -> Tensor:
    """The tensor with place i of that axis from unit permutation[i]."""
    at, axis = places(entry, tensor, len(permutation)), entry[1]
    source = torch.arange(tensor.shape[axis], device=tensor.device)
    source[at.flatten()] = at[permutation.to(tensor.device)].flatten()
    return tensor.index_select(axis, source)
