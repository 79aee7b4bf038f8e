"""Beside callbacks and optimizers of others a fit goes on to the same bits, or is refused before its first step."""

import re

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from stranger import Interrupted, Net, StopAt, bits, quiet, seeded, ticket_of
from test_fit_checks import EPOCHS, KINDS, loader

from lottery_callbacks import ApplyTicket, GradualPruning, Pruning, newest_checkpoint
from lottery_callbacks.functional.scores import needs


class Steps(L.Callback):
    done = 0

    def on_train_batch_end(self, trainer, *_):
        self.done = trainer.global_step


def refused(tmp_path, module, *callbacks):
    steps = Steps()
    with pytest.raises((ValueError, RuntimeError)) as error:
        quiet(tmp_path, [*callbacks, steps], **EPOCHS).fit(module, loader())
    assert "\n" not in str(error.value)
    return steps.done, str(error.value)


@pytest.mark.parametrize("permanent", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "noise"])
def test_another_pruner_is_refused_before_the_first_step(tmp_path, kind, permanent):
    pruner = ModelPruning("l1_unstructured", amount=0.3, make_pruning_permanent=permanent)
    done, message = refused(tmp_path, seeded(0, Net), KINDS[kind](tmp_path), pruner)
    assert done == 0
    assert message.startswith("ModelPruning prunes the same network as ")


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Adafactor])
def test_optimizers_whose_state_no_mask_holds_are_refused_before_the_first_step(tmp_path, optimizer):
    module = seeded(0, Net)
    module.configure_optimizers = lambda: optimizer(module.parameters())
    done, message = refused(tmp_path, module, ApplyTicket(ticket_of(seeded(0, Net))))
    assert (done, message.split()[0]) == (0, optimizer.__name__)


@pytest.mark.parametrize("schedule", [None, "multistep"])
def test_a_fit_with_averaged_weights_is_resumed_to_the_same_bits(tmp_path, schedule):
    def fit(folder, *callbacks):
        module = seeded(0, lambda: Net(schedule=schedule))
        average = StochasticWeightAveraging(0.05, swa_epoch_start=1)
        keeper = ModelCheckpoint(folder, save_last=True)
        apply = ApplyTicket(ticket_of(seeded(0, lambda: Net(schedule=schedule))))
        trainer = quiet(folder, [apply, average, *callbacks, keeper], max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, loader(), ckpt_path=newest_checkpoint(folder))
        return bits(module)

    whole = fit(tmp_path / "whole")
    with pytest.raises(Interrupted):
        fit(tmp_path / "torn", StopAt(15))
    assert fit(tmp_path / "torn") == whole


def test_numbers_among_the_metrics_are_kept_in_checkpoints(tmp_path):
    class Numbers(Net):
        def on_train_epoch_end(self):
            self.trainer.callback_metrics["mine"] = 0.5

    keeper = ModelCheckpoint(tmp_path, save_last=True)
    callback = ApplyTicket(ticket_of(seeded(0, Net)))
    quiet(tmp_path, [callback, keeper], enable_checkpointing=True, **EPOCHS).fit(seeded(0, Numbers), loader())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert float(state["metrics"]["mine"]) == 0.5


def in_place(evidence):
    return {name: weight.detach().abs_() for name, weight in evidence.weights.items()}


SCORES = {
    "writes": (in_place, r"wrote into the weights of net\.1\.weight"),
    "sparse": (lambda e: {n: w.detach().to_sparse() for n, w in e.weights.items()}, r"sparse_coo tensor for net\.1"),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_wrong_score_is_named(tmp_path, name):
    score, message = SCORES[name]
    gradual = GradualPruning(0.5, pruning=Pruning(score=needs("batches")(score)))
    done, said = refused(tmp_path, seeded(0, Net), gradual)
    assert (done, bool(re.search(message, said))) == (0, True), said


@pytest.mark.parametrize("score", [3, None, ["magnitude"]])
def test_a_score_is_a_name_or_a_function(score):
    with pytest.raises(ValueError, match="neither a name nor a function: choose one of magnitude"):
        Pruning(score=score)
