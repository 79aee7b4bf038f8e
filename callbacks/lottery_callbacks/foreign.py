"""Checkpoints of others: plain names and explicit masks out of what pruning, wrapping and compiling left."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from lottery_callbacks.functional.masks import Masks
from lottery_callbacks.functional.names import AVERAGED, canonical
from lottery_callbacks.messages import describe

DDP = "module."


def plain(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Masks]:
    """The tensors of a state dict under the plain network's names, and the masks that it holds.

    ```python
    tensors, masks = plain(torch.load(path, weights_only=True)["state_dict"])
    ```

    Undoes, in any combination: the segments of `names.WRAPPERS` (`_orig_mod.` of `torch.compile`), anywhere;
    `module.` of DistributedDataParallel and DataParallel, once and only where every name begins with it, since a
    network may own a submodule of that name; `module.` and `n_averaged` of AveragedModel; `W_orig` and `W_mask` of
    `torch.nn.utils.prune`, which become the tensor `W` = W_orig and a boolean mask of `W`.

    The tensors are W_orig, the values under the mask included; such a network computes with W_mask * W_orig, which
    is `Ticket.from_state_dict(state_dict).state_dict()`. A mask is never read off zeros: a weight that was made
    permanent by `prune.remove` is a dense weight. Nothing is copied.

    Raises:
        ValueError: an entry is no tensor, two entries come to one name, or a mask has other values than 0 and 1 or
            another shape than its weight.
    """
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name!r} is a {type(tensor).__name__}, and a state dict holds tensors: "
                'give checkpoint["state_dict"], or leave that entry out'
            )
    named = _without_module([(canonical(name), tensor) for name, tensor in state_dict.items()])
    found = dict(named)
    pruned = [name.removesuffix("_orig") for name in found if name.endswith("_orig")]
    masks = {name: _as_mask(name, found) for name in pruned if f"{name}_mask" in found}
    plainly = {f"{name}_orig": name for name in masks}
    helpers = {f"{name}_mask" for name in masks}
    renamed = [(plainly.get(name, name), tensor) for name, tensor in named if name not in helpers]
    twice = [name for name, count in Counter(name for name, _ in renamed).items() if count > 1]
    if twice:
        raise ValueError(f"two entries come to the name {describe(twice)}: leave one of them out")
    return dict(renamed), masks


def _as_mask(name: str, found: Mapping[str, Tensor]) -> Tensor:
    weight, mask = found[f"{name}_orig"], found[f"{name}_mask"]
    if mask.shape != weight.shape or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"{name}_mask is no mask of {name}_orig: it must have the shape {tuple(weight.shape)} and hold 0 and 1 only"
        )
    return mask.to(torch.bool)


def _without_module(named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Without the `module.` of wrappers: one of DDP's kind, and one of AveragedModel, which `n_averaged` shows."""

    def removed(entries: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        return [(name.removeprefix(DDP), tensor) for name, tensor in entries]

    parallel = averaged = False
    while True:
        below = [(name, tensor) for name, tensor in named if name != AVERAGED]
        if not all(name.startswith(DDP) for name, _ in below):
            return named
        if not averaged and len(below) < len(named):
            named, averaged = removed(below), True
        elif not parallel and len(below) == len(named):
            named, parallel = removed(named), True
        else:
            return named
