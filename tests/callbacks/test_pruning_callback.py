"""What scores are given in a running fit, and that collecting it changes nothing of the run."""

import lightning.pytorch as L
import pytest
import torch
from stranger import Blobs, Interrupted, Lottery, Net, StopAt, bits, fit_with, frozen_state, quiet, seeded
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lottery_callbacks import ApplyTicket, GradualPruning, IterativeMagnitudePruning, Pruning, ResumeCheckpoint, Ticket
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.scores import SCORES

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a .val_dataloader. but have no")


class Plain(L.LightningModule):
    """Two linear layers and SGD, so that every step can be made by hand; `output` says what training_step returns."""

    def __init__(self, output=lambda loss: loss, automatic=True):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        self.output = output
        self.automatic_optimization = automatic
        self.logged = 0

    def forward(self, x):
        return self.b(self.a(x).relu())

    def training_step(self, batch):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return self.output(loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Steps(L.Callback):
    """Batches, and the weights before each step and at the end."""

    def __init__(self):
        self.batches, self.weights = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)
        self._keep(pl_module)

    def on_train_end(self, trainer, pl_module):
        self._keep(pl_module)

    def _keep(self, module):
        self.weights.append({name: p.detach().clone() for name, p in module.named_parameters()})


def level_0(folder, module, *callbacks, **pruning):
    """One dense level; returns the masks of the next."""
    imp = IterativeMagnitudePruning(0.5, run_dir=folder, pruning=Pruning(**pruning))
    fit_with(folder, module, Blobs(), imp, *callbacks, max_steps=7, limit_val_batches=0)
    return Ticket.load(imp.ticket_path(1)).masks


def best_half(scores):
    return M.digest(
        M.keep_highest(scores, M.ones(scores), {(n,): s.numel() - round(0.5 * s.numel()) for n, s in scores.items()})
    )


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("output", [lambda loss: loss, lambda loss: {"loss": loss, "more": 1}])
def test_snip_scores_the_trained_weights_by_the_last_batches_of_the_fit(tmp_path, batches, output):
    module, steps = seeded(0, lambda: Plain(output)), Steps()
    masks = level_0(tmp_path, module, steps, score="snip", batches=batches)
    losses = [F.cross_entropy(module(x), y) for x, y in steps.batches[-batches:]]
    weights = {name: p for name, p in module.named_parameters() if p.ndim == 2}
    slopes = torch.autograd.grad(sum(losses) / batches, list(weights.values()))
    expected = {name: (g * w).abs().detach() for g, (name, w) in zip(slopes, weights.items(), strict=True)}
    assert M.digest(masks) == best_half(expected)
    assert len(steps.batches) == 7


@pytest.mark.parametrize("automatic", [True, False])
def test_movement_is_the_sum_of_minus_gradient_times_weight(tmp_path, automatic):
    module, steps = seeded(0, lambda: Plain(automatic=automatic)), Steps()
    masks = level_0(tmp_path, module, steps, score="movement")
    expected = {}
    for name in masks:
        pairs = [(w[name], after[name]) for w, after in zip(steps.weights, steps.weights[1:], strict=False)]
        expected[name] = -sum((w - after) / 0.5 * w for w, after in pairs)
    assert M.digest(masks) == best_half(expected)


@pytest.mark.parametrize("score", sorted(SCORES.keys() - {"synflow"}))
def test_collecting_evidence_leaves_the_run_bitwise_unchanged(tmp_path, trace_fit, score):
    pruning = Pruning(score=score, batches=2)
    found = trace_fit(IterativeMagnitudePruning(0.5, run_dir=tmp_path / score, pruning=pruning))
    assert found == trace_fit(IterativeMagnitudePruning(0.5, run_dir=tmp_path / "plain"))


def test_a_metric_of_the_training_is_not_updated_by_scoring(tmp_path):
    class Counted(Plain):
        def __init__(self):
            super().__init__()
            self.seen, self.per_epoch = MeanMetric(), []

        def training_step(self, batch):
            self.seen.update(batch[1].float())
            return super().training_step(batch)

        def on_train_epoch_end(self):
            self.per_epoch.append((float(self.seen.compute()), self.seen.update_count))
            self.seen.reset()

    def epochs(score):
        rule = Pruning(score=score, batches=2)
        module = seeded(0, Counted)
        gradual = GradualPruning(0.5, begin="3it", end="12it", every="2it", pruning=rule)
        fit_with(tmp_path, module, Blobs(), gradual, max_epochs=2, limit_val_batches=0)
        return module.per_epoch

    assert epochs("snip") == epochs("magnitude")
    assert [count for _, count in epochs("snip")] == [9, 9]


@pytest.mark.parametrize("score", ["snip", "grasp", "movement"])
def test_a_lottery_with_any_score_equals_fresh_fits_of_its_tickets(tmp_path, score):
    lottery = Lottery(tmp_path, Net, pruning=Pruning(score=score), rewind="3it").run(2)
    alone, *_ = fit_with(tmp_path / "alone", Net(), Blobs(), ApplyTicket(lottery.imp.ticket_path(2)), seed=102)
    assert bits(alone) == bits(lottery.finals[2])
    magnitude = Lottery(tmp_path / "magnitude", Net, rewind="3it").run(1)
    assert M.digest(magnitude.imp.masks) != M.digest(Ticket.load(lottery.imp.ticket_path(2)).masks)


@pytest.mark.parametrize("score", ["snip", "movement"])
@pytest.mark.parametrize("stop", [17, 24])
def test_a_killed_level_resumes_to_the_same_masks(tmp_path, score, stop):
    def tickets(folder, *callbacks):
        lottery = Lottery(folder, Net, pruning=Pruning(score=score, batches=2))
        for level in lottery.imp.levels(1):
            resume = [ResumeCheckpoint(level.run_dir, seconds=0)]
            if level.number == 1 and callbacks:
                with pytest.raises(Interrupted):
                    lottery.fit(level, *callbacks, *resume)
                again = Lottery(folder, Net, pruning=Pruning(score=score, batches=2))
                (rest,) = again.imp.levels(1)
                assert rest.checkpoint is not None
                again.fit(rest, *resume, seed=999)
                lottery = again
            else:
                lottery.fit(level, *resume)
        return frozen_state(Ticket.load(lottery.imp.ticket_path(2)).masks)

    hook = "on_train_end" if stop == 24 else "on_train_batch_end"  # 24: nothing is left to train, no batch to come
    assert tickets(tmp_path / "torn", StopAt(stop, hook)) == tickets(tmp_path / "whole")


def test_a_score_of_the_loss_is_refused_where_the_module_optimizes_by_hand_or_gives_no_loss(tmp_path):
    with pytest.raises(ValueError, match=r"^score snip, layerwise needs the loss .*Plain optimizes manually: choose"):
        level_0(tmp_path / "manual", Plain(automatic=False), score="snip")
    module = Plain()
    imp = IterativeMagnitudePruning(0.5, run_dir=tmp_path, pruning=Pruning(score="gradient"))

    class Silent(L.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.output = lambda loss: "text"

    with pytest.raises(ValueError, match=r"^score gradient, layerwise needs a loss, and training_step returned 'text'"):
        quiet(tmp_path, [imp, Silent()], max_steps=2, limit_val_batches=0).fit(module, Blobs())
    assert module.log.__func__ is L.LightningModule.log  # on again after the error


def test_a_lottery_by_synflow_ranks_by_the_flow_and_needs_no_labels(tmp_path):
    def by_hand(module):
        a, b = (part.detach().abs().double() for part in (module.a.weight, module.b.weight))
        biases = [part.detach().abs().double() for part in (module.a.bias, module.b.bias)]
        hidden = a.sum(1) + biases[0]  # of ones
        return {"a.weight": b.sum(0)[:, None] * a, "b.weight": b * hidden}

    masks = level_0(tmp_path, module := seeded(0, Plain), score="synflow")
    assert M.digest(masks) == best_half(by_hand(module))
