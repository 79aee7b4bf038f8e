"""Density per layer, and a warning before a layer is gone."""

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn

from lottery_callbacks.functional import masks as M
from lottery_callbacks.masked_training import MaskedTraining, log_densities


class SparsityMonitor(L.Callback):
    """Logs what the masks of the fit keep; a monitor: it changes nothing of the run.

    At the start of each fit every logger gets `prune/density`, `prune/kept` and `prune/density/<parameter>`;
    `monitor.densities` holds the last ones. Masks come from the trainer's own `ApplyTicket` or
    `IterativeMagnitudePruning`.

    Args:
        min_density: a layer that keeps this fraction or less, or a single weight, is named in a warning: signal
            hardly passes such a layer, and the network is about to collapse to chance.
    """

    def __init__(self, min_density: float = 0.002) -> None:
        self.min_density = min_density
        self.densities: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        masks = next((callback.masks for callback in callbacks if isinstance(callback, MaskedTraining)), {})
        if not masks:
            return
        kept = M.kept(masks)
        self.densities = {name: kept[name] / mask.numel() for name, mask in masks.items()}
        for name, fraction in self.densities.items():
            if fraction < 1 and (fraction <= self.min_density or kept[name] <= 1):
                rank_zero_warn(
                    f"layer {name} has collapsed: {kept[name]} of {masks[name].numel()} weights are left; "
                    "prune it at a lower rate, or exclude it"
                )
        log_densities(trainer, masks)
