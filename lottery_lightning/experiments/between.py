"""Lines between finished runs, evaluated on the test set as the runs were."""

from pathlib import Path

import lightning.pytorch as L

from lottery_callbacks.functional.hidden_units import check_groups, permutation_groups
from lottery_callbacks.functional.in_place import State
from lottery_callbacks.functional.interpolation import Line, along
from lottery_callbacks.functional.matching import align
from lottery_callbacks.functional.running_statistics import Norms
from lottery_lightning.experiments.finished import weights_of
from lottery_lightning.experiments.runs import Training
from lottery_lightning.experiments.setting import Setting


class Between:
    """Evaluates the networks between two checkpoints: cross-entropy and error on the test set.

    In the runs' precision and on their device, so that at the ends the error is 1 - the runs' own test accuracy.

    Args:
        model: a module of the runs' architecture, with a forward that maps inputs to logits; its weights are replaced.
        data: the runs' data module. Its training batches, for norms="reestimate", are in the order of `seed`.
        training: of the runs.
        seed: of the training batches.
        points: see `functional.interpolation.along`.
        norms: likewise.
        norm_batches: training batches that "reestimate" takes, the same for all lines.
        align: whether to evaluate another line, to the second network in the order of hidden units that
            `functional.matching.align` finds.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: L.LightningDataModule,
        training: Training,
        seed: int,
        points: int,
        norms: Norms,
        norm_batches: int,
        align: bool,
    ) -> None:
        self.setting = Setting(model, data, training, seed, norm_batches if norms == "reestimate" else 0)
        self.points = points
        self.norms: Norms = norms
        self.groups = permutation_groups(model) if align else None
        if self.groups is not None:
            images, *_ = next(self.setting.test_batches)
            check_groups(self.setting.model, self.groups, images[:2])  # before hours of lines

    def lines(self, first: Path, second: Path) -> dict[str, Line]:
        """The line between two checkpoints, "plain", and to the second network after matching, "aligned"."""
        one, other = weights_of(first), weights_of(second)
        found = {"plain": self._along(one, other)}
        if self.groups is not None:
            found["aligned"] = self._along(one, align(self.setting.model, one, other, self.groups))
        return found

    def _along(self, one: State, other: State) -> Line:
        place = self.setting
        return along(place.model, one, other, place.on_test, self.points, self.norms, place.reestimate)
