"""Density per layer, and a warning before a layer is gone."""

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn

from lottery_callbacks.functional import masks as M
from lottery_callbacks.masked_training import MaskedTraining, log_densities
from lottery_callbacks.spawned import SpawnSafe


class SparsityMonitor(SpawnSafe):
    """Logs what the masks of the fit keep; a monitor: it changes nothing of the run.

    At the start of each fit every logger gets `prune/density`, `prune/kept` and `prune/density/<parameter>`;
    `monitor.densities` holds those of the masks that the fit began with and, after it, of those that it ended with.
    Masks come from whichever callback of the trainer sets them (`GradualPruning` and `NMPruning` log each change).

    Args:
        min_density: a layer that keeps this fraction or less, or a single weight, is named in a warning: signal
            hardly passes such a layer, and the network is about to collapse to chance.
    """

    found = ("densities",)

    def __init__(self, min_density: float = 0.002) -> None:
        self.min_density = min_density
        self.densities: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        masks = self._measure(trainer)
        kept = M.kept(masks)
        for name, fraction in self.densities.items():
            if fraction < 1 and (fraction <= self.min_density or kept[name] <= 1):
                rank_zero_warn(
                    f"layer {name} has collapsed: {kept[name]} of {masks[name].numel()} weights are left; "
                    "prune it at a lower rate, or exclude it"
                )
        if masks:
            log_densities(trainer, masks)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer)

    def _measure(self, trainer: L.Trainer) -> M.Masks:
        callbacks: list[L.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        masks = next((callback.fit_masks for callback in callbacks if isinstance(callback, MaskedTraining)), {})
        self.densities = {name: kept / masks[name].numel() for name, kept in M.kept(masks).items()}
        return masks
