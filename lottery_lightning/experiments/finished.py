"""What is left of finished runs: their last weights, and what these say of their masks."""

from pathlib import Path

import torch
from torch import Tensor

from lottery_callbacks.functional.masks import Masks
from lottery_lightning.experiments.store import read_json


def require_finished(folder: Path) -> None:
    """Refuse what is no folder of a finished run.

    Raises:
        ValueError: names it.
    """
    if not ((folder / "final.ckpt").exists() and (folder / "result.json").exists()):
        raise ValueError(f"{folder} holds no finished run (final.ckpt, result.json): finish it, or name another folder")


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's state dict, on the CPU."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def masks_of(folder: Path) -> Masks:
    """The masks of a finished run, by parameter name: where its last weights are not 0.

    Pruned weights are exactly 0, so that these are the masks if they keep as many in each tensor as the run's record
    says; that is checked. What the run keeps whole is kept, zeros too.

    Raises:
        ValueError: a count is another: some kept weight of a pruned tensor is 0.
    """
    weights, kept = weights_of(folder / "final.ckpt"), read_json(folder / "result.json")["kept_per_layer"]
    masks = {
        name: torch.ones_like(weights[name], dtype=torch.bool) if count == weights[name].numel() else weights[name] != 0
        for name, count in kept.items()
    }
    for name, count in kept.items():
        if (found := int(masks[name].sum())) != count:
            raise ValueError(
                f"{folder}: {found} weights of {name} are not 0, and the run keeps {count}, so that its mask cannot be "
                "seen: leave this network out"
            )
    return masks
