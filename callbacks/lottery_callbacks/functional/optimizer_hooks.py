"""Training under a mask with any optimizer: hooks on its step, and the check at the end."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lottery_callbacks.functional.messages import describe
from lottery_callbacks.functional.names import named_parameters


def require_zeros(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Check that each pruned weight is 0 in the module as it is now; call it at the end of a training.

    Parameters are looked up by name, so one that was replaced during the training is checked too.
    Cost: a pass over the pruned tensors, and one copy from the device.

    Args:
        module: the trained module, wrapped or not.
        masks: boolean tensors by canonical parameter name, True = kept.

    Raises:
        RuntimeError: a pruned weight is other than 0 (also NaN), or a masked parameter is absent or has another
            shape; one line that names it.
    """
    parameters = named_parameters(module)
    absent = [name for name, mask in masks.items() if name not in parameters or parameters[name].shape != mask.shape]
    if absent:
        raise RuntimeError(
            f"the module has no parameter of the mask's name and shape for {describe(absent)}: "
            "it was replaced or renamed after the mask was applied; keep the module's parameters while a ticket trains"
        )
    with torch.no_grad():
        # One tensor a device, so that there is one copy
        counts = [_alive(parameters[name].detach(), mask) for name, mask in masks.items()]
        device = counts[0].device if counts else None
        alive = torch.stack([count.to(device) for count in counts]).tolist() if counts else []
    bad = [f"{name} ({count})" for name, count in zip(masks, alive, strict=True) if count]
    if bad:
        raise RuntimeError(
            f"pruned weights are not 0 at the end of the training: {describe(bad)}; something wrote to them past the "
            "mask: an optimizer without hooks, a parameter replaced in training, or another pruner"
        )


def _alive(weight: Tensor, mask: Tensor) -> Tensor:
    """Number of pruned weights other than 0; NaN counts."""
    return ((weight != 0) & ~mask.to(weight.device, torch.bool)).sum()
