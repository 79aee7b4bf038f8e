"""One model with several networks in it."""

import copy
from collections.abc import Mapping

import lightning.pytorch as L
from torch import nn

from lottery_callbacks.messages import describe


def variants(
    model: L.LightningModule, network: str, networks: Mapping[str, nn.Module] | None
) -> dict[str, L.LightningModule]:
    """The model itself, by the class of its submodule `network`; or copies by name, with each of `networks` there.

    Raises:
        ValueError: the model has no such submodule.
    """
    if network not in dict(model.named_modules()) or not network:
        known = describe([name for name, _ in model.named_children()])
        raise ValueError(f"network={network!r} is no submodule of {type(model).__name__}: there are {known}")
    if networks is None:
        return {type(model.get_submodule(network)).__name__: model}
    return {name: _with(model, network, part) for name, part in networks.items()}


def _with(model: L.LightningModule, name: str, part: nn.Module) -> L.LightningModule:
    model = copy.deepcopy(model)
    model.set_submodule(name, part)
    return model
