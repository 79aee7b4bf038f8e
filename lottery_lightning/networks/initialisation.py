"""The papers' initialisations by name."""

from typing import Literal, get_args

from torch import nn

Initialisation = Literal["glorot_normal", "kaiming_normal", "kaiming_normal_fan_out", "kaiming_uniform", "default"]


def initialise(network: nn.Module, scheme: Initialisation) -> None:
    """Redraw the linear and convolutional layers of `network` in place, from the global random state.

    - "glorot_normal": w ~ N(0, 2 / (fan_in + fan_out)), b = 0 (Frankle & Carbin, arXiv 1803.03635).
    - "kaiming_normal": w ~ N(0, 2 / fan_in), b = 0 (open_lth; Ramanujan et al., arXiv 1911.13299).
    - "kaiming_normal_fan_out": convolutions w ~ N(0, 2 / fan_out), b = 0; linear layers are left as torch gives them
      (the code of arXiv 2306.08125 and 2310.18769).
    - "kaiming_uniform": w ~ U(-c, c) with c = sqrt(6 / fan_in), b = 0.
    - "default": what torch gives each layer.
    """
    for layer in network.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        layer.reset_parameters()
        if scheme == "default" or (scheme == "kaiming_normal_fan_out" and isinstance(layer, nn.Linear)):
            continue
        if scheme == "glorot_normal":
            nn.init.xavier_normal_(layer.weight)
        elif scheme == "kaiming_normal":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif scheme == "kaiming_normal_fan_out":
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif scheme == "kaiming_uniform":
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        else:
            *known, last = get_args(Initialisation)
            raise ValueError(f"init={scheme!r} is not known: {', '.join(known)} or {last}")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def reset_norms(network: nn.Module) -> None:
    """Give batch and group norms scale 1, shift 0 and new running statistics, in place; nothing is drawn."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm):
            layer.reset_parameters()
