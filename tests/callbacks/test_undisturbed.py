"""Scoring in the midst of a fit, on the modules and batches that people really have."""

from collections import UserDict, namedtuple

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from stranger import Blobs, Interrupted, Probe, StopAt, bits, fit_with, quiet, seeded
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric

from lottery_callbacks import GradualPruning, IterativeMagnitudePruning, Pruning, ResumeCheckpoint, Ticket
from lottery_callbacks.checkpoints import newest_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed in a .val_dataloader. but have no"),
    pytest.mark.filterwarnings("ignore:You have overridden .* in `LightningModule`"),
]


class Base(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pruned(folder, make, score="snip", batches=2, **options):
    """A fit that prunes at steps 3, 5, 7 and 8 of 12; returns the module and the callback."""
    gradual = GradualPruning(0.5, begin="3it", end="8it", every="2it", pruning=Pruning(score=score, batches=batches))
    module = seeded(0, make)
    trainer = quiet(folder, [gradual], **({"max_steps": 12, "limit_val_batches": 0} | options))
    L.seed_everything(0, verbose=False)
    trainer.fit(module, Blobs())
    return module, gradual


class WithNetwork(Metric):
    """Like FID: a metric that holds parameters."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.add_state("total", torch.zeros(()))

    def update(self, value):
        self.total += value

    def compute(self):
        return self.total


def test_metrics_whose_last_value_carries_a_graph_and_metrics_with_parameters_survive(tmp_path):
    class Metered(Base):
        def __init__(self):
            super().__init__()
            self.mean, self.fid = MeanMetric(), WithNetwork()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.mean(loss)
            self.fid.update(1.0)
            return loss

    module = seeded(0, Metered)
    weight = module.fid.inner.weight
    rule = Pruning(score="snip", exclude=["fid*"])
    fit_with(
        tmp_path, module, Blobs(), GradualPruning(0.5, begin="3it", pruning=rule), max_steps=6, limit_val_batches=0
    )
    assert module.fid.inner.weight is weight
    assert (float(module.fid.total), module.mean.update_count) == (6, 6)


def test_a_buffer_that_the_step_assigns_anew_is_put_back(tmp_path):
    class Counting(Base):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.seen = self.seen + 1
            return super().training_step(batch, batch_idx)

    assert float(pruned(tmp_path, Counting)[0].seen) == 12


@pytest.mark.parametrize("change", ["pop", "in place"])
def test_a_step_that_changes_its_batch_is_scored_on_what_it_was_trained_on(tmp_path, change):
    class Greedy(Base):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {"x": batch[0].clone(), "y": batch[1]}

        def training_step(self, batch, batch_idx):
            x, y = batch["x"], batch.pop("y") if change == "pop" else batch["y"]
            if change == "in place":
                x.mul_(2)
            return F.cross_entropy(self.net(x if change == "in place" else 2 * x), y)

    class Careful(Greedy):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(2 * batch["x"]), batch["y"])

    assert bits(pruned(tmp_path, Greedy)[0]) == bits(pruned(tmp_path, Careful)[0])


def test_batches_without_a_loss_count_for_nothing_and_none_at_all_is_refused(tmp_path):
    class Choosy(Base):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    _, gradual = pruned(tmp_path, Choosy, max_steps=10, batches=3)
    assert gradual.done == 4
    with pytest.raises(ValueError, match=r"^no batch of the evidence has a loss: give the rule more `batches`"):
        pruned(tmp_path, Choosy, batches=1)  # the next batch trained is the first of these with a loss


class Attention(Base):
    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"qkv": nn.Linear(2, 12), "out": nn.Linear(12, 5)})

    def training_step(self, batch, batch_idx):
        q, k, v = self.net["qkv"](batch[0].view(-1, 3, 2)).view(-1, 3, 3, 4).unbind(2)
        mixed = F.scaled_dot_product_attention(*(part.unsqueeze(1) for part in (q, k, v))).squeeze(1)
        return F.cross_entropy(self.net["out"](mixed.flatten(1)), batch[1])


class Compiled(Base):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="aot_eager")


@pytest.mark.parametrize("make", [Attention, Compiled])
def test_second_derivatives_exist_behind_fused_attention_and_compiled_networks(tmp_path, make):
    _, gradual = pruned(tmp_path, make, score="grasp")
    assert {name: int(mask.sum()) * 2 for name, mask in gradual.masks.items()} == {
        name: mask.numel() for name, mask in gradual.masks.items()
    }


@pytest.mark.parametrize("fused", [False, True])
def test_movement_is_of_the_unscaled_gradient_and_a_skipped_step_moves_nothing(tmp_path, fused):
    class Fused(Base):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

    def moved(scale, steps):
        imp = IterativeMagnitudePruning(0.5, run_dir=tmp_path / f"{scale}", pruning=Pruning(score="movement"))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        fit_with(tmp_path, seeded(0, Fused), Blobs(), imp, plugins=[plugin], max_steps=steps, limit_val_batches=0)
        return {name: total.clone() for name, total in imp._movement.items()}

    plain, scaled = moved(1.0, 3), moved(1024.0, 3)
    for name, total in plain.items():
        assert total.dtype == torch.float32
        assert torch.allclose(total, scaled[name], rtol=0.05, atol=1e-4), name
        assert total.abs().max() > 1e-3
    assert not any(total.any() for total in moved(2.0**40, 1).values())  # an overflow: the scaler skipped it


def test_fp16_scores_are_those_of_the_unscaled_loss(tmp_path):
    masks = {}
    for scale in (1.0, 4096.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        gradual = GradualPruning(0.5, pruning=Pruning(score=recorded(masks, scale)))
        fit_with(tmp_path, seeded(0, Base), Blobs(), gradual, plugins=[plugin], max_steps=2, limit_val_batches=0)
    for name, gradient in masks[1.0].items():
        assert torch.allclose(gradient, masks[4096.0][name], rtol=0.05, atol=1e-3)
        assert gradient.abs().max() > 0.01


def recorded(into, key):
    def score(evidence):
        into[key] = evidence.gradient()
        return {name: gradient.abs() for name, gradient in into[key].items()}

    score.needs = "batches"
    return score


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize("kind", [Pair, lambda x, y: UserDict(x=x, y=y)])
def test_checkpoints_leave_out_batches_of_other_classes_and_load_as_weights_only(tmp_path, kind):
    class Odd(Base):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return kind(*batch)

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

        def training_step(self, batch, batch_idx):
            x, y = batch if isinstance(batch, tuple) else (batch["x"], batch["y"])
            return F.cross_entropy(self.net(x), y)

    _, gradual = pruned(tmp_path, Odd)
    assert gradual.done == 4
    trainer = quiet(tmp_path, [GradualPruning(0.5, pruning=Pruning(score="snip"))], max_steps=2, limit_val_batches=0)
    trainer.fit(seeded(0, Odd), Blobs())
    trainer.save_checkpoint(tmp_path / "odd.ckpt")
    state = torch.load(tmp_path / "odd.ckpt", weights_only=True)
    assert [value["batches"] for key, value in state["callbacks"].items() if "Gradual" in key] == [[[]]]


def test_restored_batches_do_not_go_through_the_transfer_hooks_again(tmp_path):
    class Shifting(Base):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 1, batch[1]

        def validation_step(self, batch, batch_idx):
            pass

    def tickets(folder, *callbacks, checkpoint=None):
        imp = IterativeMagnitudePruning(0.5, run_dir=folder, pruning=Pruning(score="snip", batches=3))
        resume = ResumeCheckpoint(folder / "resume", seconds=0)
        trainer = quiet(folder, [imp, *callbacks, resume, Probe()], enable_checkpointing=True, max_steps=12)
        L.seed_everything(1, verbose=False)
        trainer.fit(seeded(0, Shifting), Blobs(), ckpt_path=checkpoint)
        return Ticket.load(imp.ticket_path(1)).masks

    whole = tickets(tmp_path / "whole")
    with pytest.raises(Interrupted):
        tickets(tmp_path / "torn", StopAt(12, "on_train_end"))
    resumed = tickets(tmp_path / "torn", checkpoint=newest_checkpoint(tmp_path / "torn" / "resume"))
    assert all(torch.equal(mask, resumed[name]) for name, mask in whole.items())
