"""Lines between finished runs, evaluated on the test set as the runs were."""

from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from lottery_callbacks import random_state
from lottery_callbacks.fit_data import prepared
from lottery_callbacks.functional.evaluation import Metrics, evaluate_on
from lottery_callbacks.functional.hidden_units import permutation_groups
from lottery_callbacks.functional.interpolation import Line, Norms, State, along
from lottery_callbacks.functional.matching import align
from lottery_lightning.experiments.runs import Training


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
        names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        options: dict[str, Any] = dict.fromkeys(names, False) | {"devices": 1}
        self.trainer = data.trainer = L.Trainer(**options | training.trainer)
        self.trainer.precision_plugin.convert_module(model)  # in place, as all of torch's and Lightning's do
        self.model = model.to(self.trainer.strategy.root_device)
        self.points = points
        self.norms: Norms = norms
        self.groups = permutation_groups(model) if align else None
        data.prepare_data()
        data.setup("test")
        self.test = data.test_dataloader()
        self.training: list[Any] = []
        if norms == "reestimate":
            if hasattr(data, "data_seed"):
                data.data_seed = seed  # pyright: ignore[reportAttributeAccessIssue]
            data.setup("fit")  # no visits of a fit before
            with random_state.forked():
                torch.manual_seed(seed)
                self.training = list(islice(data.train_dataloader(), norm_batches))

    def lines(self, first: Path, second: Path) -> dict[str, Line]:
        """The line between two checkpoints, "plain", and to the second network after matching, "aligned"."""
        one, other = (_weights(path) for path in (first, second))
        found = {"plain": self._along(one, other)}
        if self.groups is not None:
            found["aligned"] = self._along(one, align(self.model, one, other, self.groups))
        return found

    def _along(self, one: State, other: State) -> Line:
        return along(self.model, one, other, self._evaluate, self.points, self.norms, self._reestimate)

    def _evaluate(self, network: nn.Module) -> Metrics:
        with self.trainer.precision_plugin.val_step_context():
            return evaluate_on(prepared(self.trainer, self.model, self.test))(network)

    def _reestimate(self, network: nn.Module) -> None:
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            for images, *_ in prepared(self.trainer, self.model, self.training):
                network(images)


def _weights(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
