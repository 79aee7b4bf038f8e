"""Masks: one boolean tensor per prunable weight, True = kept.

Counts are integers that are decided first and hold exactly afterwards; ties are broken by index.
All functions are pure, and keep each tensor's shape and device.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Masks = dict[str, Tensor]


def ones(weights: Mapping[str, Tensor]) -> Masks:
    """The dense masks of `weights`: True everywhere."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def kept(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of kept weights per tensor."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def density(masks: Mapping[str, Tensor]) -> float:
    """Fraction of prunable weights kept, in [0, 1]: sum of kept over sum of sizes."""
    return sum(kept(masks).values()) / sum(mask.numel() for mask in masks.values())


def as_bits(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as integers of `like`'s width on its device: all bits set where kept, none where pruned."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[like.element_size()]
    return mask.to(like.device, integer).neg_()


def zero_pruned_(tensor: Tensor, bits: Tensor) -> None:
    """Set `tensor` to +0.0 in place where `bits` (of `as_bits`) is pruned, also where it is NaN or negative.

    A bitwise and: exact, and about as cheap on a CPU as a float product.
    """
    tensor.detach().view(bits.dtype).bitwise_and_(bits)


def require_zeros(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Check that each pruned weight is 0 in the module as it is now; -0.0 is 0, and NaN is not.

    Args:
        module: its parameters are looked up by name, and may be wrapped by `torch.compile`.
        masks: by the plain network's names.

    Cost: a pass over the pruned tensors and one copy from each device.

    Raises:
        RuntimeError: names the first parameter that is absent, of another shape, or other than 0 where it is pruned.
    """
    own = {name.replace("_orig_mod.", ""): parameter.detach() for name, parameter in module.named_parameters()}
    for name, mask in masks.items():
        if name not in own or own[name].shape != mask.shape:
            found = tuple(own[name].shape) if name in own else "absent"
            raise RuntimeError(f"{name} has a mask of shape {tuple(mask.shape)}, and is {found} in the network")
    nonzero = {n: ((own[n] != 0) & ~mask.to(own[n].device)).sum().cpu() for n, mask in masks.items() if not mask.all()}
    counts = torch.stack(list(nonzero.values())).tolist() if nonzero else []
    for name, count in zip(nonzero, counts, strict=True):
        if count:
            raise RuntimeError(f"{count} of {int((~masks[name]).sum())} pruned weights of {name} are not 0")


def survivors(alive: int, rate: float, rounds: int = 1) -> int:
    """Weights left of `alive` after `rounds` levels: each removes round(rate x surviving), one of any stays at least.

    >>> survivors(10, 0.2), survivors(266_200, 0.2, rounds=2), survivors(1, 0.9), survivors(0, 0.2)
    (8, 170368, 1, 0)
    """
    for _ in range(rounds):
        alive = max(min(1, alive), alive - round(rate * alive))
    return alive


def keep_highest(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], budget: Mapping[tuple[str, ...], int]
) -> Masks:
    """New masks that keep, in each group of tensors, exactly the budgeted number of the highest scores.

    Args:
        scores: a score per weight, same names and shapes as `masks`; finite where the mask is True.
        masks: the present masks; a weight that is pruned there never returns.
        budget: group of names -> how many weights the group keeps, all groups together covering `masks`.

    Equal scores are removed from the lowest index up (the order of names within a group, then row-major).
    Cost: one selection (not a sort) per group.

    Raises:
        ValueError: a score is not finite, or a budget is above what survives, or none where one does.
    """
    new: Masks = {}
    for names, keep in budget.items():
        flat_mask = torch.cat([masks[name].reshape(-1) for name in names])
        flat_score = torch.cat([_floating(scores[name].detach()).reshape(-1) for name in names])
        values = flat_score[flat_mask]
        if not torch.isfinite(values).all():
            bad = [name for name in names if not torch.isfinite(scores[name][masks[name]]).all()]
            raise ValueError(f"scores of {', '.join(bad)} are not finite: did the training diverge?")
        alive = len(values)
        if not min(1, alive) <= keep <= alive:
            raise ValueError(f"cannot keep {keep} of the {alive} surviving weights of {', '.join(names)}")
        flat_new = flat_mask
        if remove := alive - keep:
            highest_removed = values.kthvalue(remove).values
            flat_new = flat_mask & (flat_score > highest_removed)
            ties = (flat_mask & (flat_score == highest_removed)).nonzero().flatten()  # the lowest indices go first
            flat_new[ties[len(ties) - (keep - int(flat_new.sum())) :]] = True
        assert int(flat_new.sum()) == keep, names
        sizes = [masks[name].numel() for name in names]
        for name, part in zip(names, flat_new.split(sizes), strict=True):
            new[name] = part.view(masks[name].shape)
    return {name: new[name] for name in masks}


def _floating(scores: Tensor) -> Tensor:
    return scores if scores.is_floating_point() else scores.double()


def shuffled(masks: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """Each mask permuted within its tensor: every layer keeps its density, at random places."""
    return {name: _permuted(mask.reshape(-1), generator).view(mask.shape) for name, mask in masks.items()}


def random_like(masks: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """As many weights kept in total, drawn uniformly over all tensors; each tensor keeps one at least."""
    scores = {n: torch.rand(m.shape, generator=generator).to(m.device) for n, m in masks.items()}
    for score in scores.values():
        score.view(-1)[score.argmax()] = 2.0  # the one that stays
    everywhere = {name: torch.ones_like(mask) for name, mask in masks.items()}
    return keep_highest(scores, everywhere, {tuple(masks): sum(kept(masks).values())})


def _permuted(flat: Tensor, generator: torch.Generator) -> Tensor:
    return flat[torch.randperm(flat.numel(), generator=generator).to(flat.device)]


def digest(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and bits, equal exactly for equal masks (to compare ranks, files, runs)."""
    sha = hashlib.sha256()
    for name in sorted(masks):
        sha.update(f"{name}{tuple(masks[name].shape)}".encode())
        sha.update(masks[name].cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
