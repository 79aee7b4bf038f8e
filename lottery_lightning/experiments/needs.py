"""What runs need of a module and its data, checked on one batch before the first optimizer step."""

import copy
import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from lottery_callbacks.functional.evaluation import evaluate_on
from lottery_callbacks.messages import describe
from lottery_lightning.data import TensorDataModule

MODULE_HOOKS = ("training_step", "validation_step", "test_step", "configure_optimizers")
DATA_HOOKS = ("train_dataloader", "val_dataloader", "test_dataloader")


OnBatch = Callable[[L.LightningModule, Any], None]


def require_logits(module: L.LightningModule, batch: Any) -> None:
    """Refuse a batch that is not (inputs, class labels), or a `forward` that does not map inputs to logits.

    Raises:
        ValueError: says why.
    """
    try:
        evaluate_on([batch])(module)
    except Exception as error:  # whatever a module of somebody's raises
        raise ValueError(
            f"{type(module).__name__}.forward must map inputs to logits, on test batches (inputs, class labels): "
            f"{type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class Needs:
    """What is read of a module's runs.

    Args:
        validation: metrics that it logs in `validation_step`.
        test: metrics that it logs in `test_step`.
        batch: is called with the module, in eval mode, and a test batch; raises ValueError where it is none that can be
            treated.
    """

    validation: Sequence[str] = ("val/loss",)
    test: Sequence[str] = ("test/acc",)
    batch: OnBatch | None = None

    def check(self, model: L.LightningModule, data: L.LightningDataModule, options: Mapping[str, Any]) -> None:
        """Evaluate one validation batch and one test batch on a copy of the model, as a run would.

        No training batch is drawn, and the data are a copy, too: they may draw in `setup`, or from a generator of their
        own. Ours do not, and those that cannot be copied are used as they are. The global random state is drawn from.

        Args:
            model: the module; it is left alone.
            data: its data module, which is set up as by a fit and a test.
            options: of the runs' Trainer; nothing is written or logged.

        Raises:
            ValueError: one line that names what is missing, and what is logged instead.
        """
        for owner, hooks in ((model, MODULE_HOOKS), (data, DATA_HOOKS)):
            for hook in hooks:
                if not is_overridden(hook, owner):
                    raise ValueError(f"{type(owner).__name__} has no {hook}, which every run needs: define it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first fit gives them, if they are of use
            module, own = copy.deepcopy(model), _copied(data)
            module.configure_callbacks = list  # the module's own would act on this evaluation
            fit = _Evaluation("val_dataloader")
            _trainer(fit, options).fit(module, own)
            fit.require("validation", self.validation)
            test = _Evaluation("test_dataloader", self.batch)
            test.logged = _trainer(test, options).test(module, own, verbose=False)
            test.require("test", self.test)
        del module, own, fit, test
        gc.collect()


def _copied(data: L.LightningDataModule) -> L.LightningDataModule:
    if isinstance(data, TensorDataModule):
        return data
    try:
        return copy.deepcopy(data, {id(data.trainer): None})
    except Exception:  # an open file, a lock
        return data


def _trainer(evaluation: "_Evaluation", options: Mapping[str, Any]) -> L.Trainer:
    limits = {f"limit_{name}_batches": options.get(f"limit_{name}_batches", 1) and 1 for name in ("val", "test")}
    own = {
        "limit_train_batches": 0,
        "num_sanity_val_steps": 1,
        "logger": DummyLogger() if options.get("logger") else False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [evaluation],
    }
    return L.Trainer(**{**options, **limits, **own})


class _Evaluation(L.Callback):
    """One evaluation on the loaders that `hook` of the data gives: what it logs, and how many batches it had.

    Attributes:
        logged: of validation a dict, of the test one for each loader.
    """

    def __init__(self, hook: str, on_batch: OnBatch | None = None) -> None:
        self.hook, self.on_batch = hook, on_batch
        self.logged: Any = {}
        self.batches = 0
        self.names = ("", "")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.names = type(pl_module).__name__, type(trainer.datamodule).__name__  # pyright: ignore[reportAttributeAccessIssue]

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.validating = True  # a module may log nothing in a sanity check

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.batches += 1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logged = dict(trainer.callback_metrics)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.batches += 1
        if self.on_batch:
            with trainer.precision_plugin.val_step_context():
                self.on_batch(pl_module, batch)

    def require(self, split: str, metrics: Sequence[str]) -> None:
        """Refuse what a run could not be measured by."""
        module, data = self.names
        if not self.batches:
            raise ValueError(f"{self.hook} of {data} gives no batch: every run needs {split} data")
        if isinstance(self.logged, list) and len(self.logged) > 1:
            raise ValueError(f"{self.hook} of {data} gives {len(self.logged)} loaders: a run is tested on one")
        logged = self.logged if isinstance(self.logged, dict) else self.logged[0]
        if missing := [name for name in metrics if name not in logged]:
            step = f"{split}_step"
            raise ValueError(
                f"the model logs no {missing[0]!r} in {step}: it logs {describe(list(logged)) or 'nothing'}; "
                f"have {module}.{step} log it"
            )
