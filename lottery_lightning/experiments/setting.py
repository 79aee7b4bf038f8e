"""A model and its data as runs had them, for what is measured of finished runs."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from lottery_callbacks import random_state
from lottery_callbacks.fit_data import prepared
from lottery_callbacks.functional.evaluation import Metrics, evaluate_on
from lottery_lightning.experiments.runs import Training


class Setting:
    """Places a module as a run would, in its precision and on its device, beside test and training batches.

    Batches go through the module's and the data's own hooks.

    Args:
        model: a module of the runs' architecture, with a forward that maps inputs to logits; its weights are replaced.
        data: the runs' data module. Its training batches are in the order of `seed`, augmented where it augments.
        training: of the runs.
        seed: of the training batches.
        batches: training batches that are kept, the same throughout; 0 reads none.

    Attributes:
        model: on its device.
        training: the training batches, moved and transferred as the Trainer does.
    """

    def __init__(
        self, model: L.LightningModule, data: L.LightningDataModule, training: Training, seed: int, batches: int
    ) -> None:
        names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        options: dict[str, Any] = dict.fromkeys(names, False) | {"devices": 1}
        self._trainer = data.trainer = L.Trainer(**options | training.trainer)
        self._trainer.precision_plugin.convert_module(model)  # in place, as all of torch's and Lightning's do
        self.model = model.to(self._trainer.strategy.root_device)
        self._trainer.strategy.connect(model)
        self._trainer._data_connector.attach_data(model, datamodule=data)  # their hooks of batches, as in the runs
        data.prepare_data()
        data.setup("test")
        self._test = data.test_dataloader()
        self.training: list[Any] = []
        if batches:
            if hasattr(data, "data_seed"):
                data.data_seed = seed  # pyright: ignore[reportAttributeAccessIssue]
            data.setup("fit")  # no visits of a fit before
            with random_state.forked():
                torch.manual_seed(seed)
                read = list(islice(data.train_dataloader(), batches))
                self._trainer.training = True  # hooks of batches may ask
                self.training = list(prepared(self._trainer, self.model, read))
        self._trainer.testing = True

    @property
    def test_batches(self) -> Iterator[Any]:
        """The test batches, moved and transferred as the Trainer does."""
        return prepared(self._trainer, self.model, self._test)

    def on_test(self, network: nn.Module) -> Metrics:
        """Cross-entropy and error on the test set; the error is 1 - the run's own test accuracy."""
        with self._trainer.precision_plugin.val_step_context():
            return evaluate_on(self.test_batches)(network)

    def on_training(self, network: nn.Module) -> Metrics:
        """The same on the training batches, in eval mode."""
        with self._trainer.precision_plugin.val_step_context():
            return evaluate_on(self.training)(network)

    def on_images(self, compute: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """What `compute` makes of images on the device, in the runs' precision and without gradients."""
        plugin = self._trainer.precision_plugin
        with torch.no_grad(), plugin.val_step_context():
            return compute(plugin.convert_input(images))

    def reestimate(self, network: nn.Module) -> None:
        """Run the network over the training batches, without gradients."""
        with torch.no_grad(), self._trainer.precision_plugin.val_step_context():
            for images, *_ in self.training:
                network(images)
