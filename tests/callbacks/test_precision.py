"""Precisions and the Trainer's options: a level is a fresh fit of its ticket, to the bit, whatever the Trainer does."""

import math
from itertools import pairwise
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from stranger import Blobs, Lottery, Net, bits, fit_with, half_masks, masked, quiet, raw, seeded, ticket_of
from torch.nn import functional as F

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, Ticket


class HalfAware(Net):
    """`Net` that takes its data to its own precision, as a stranger's would for bf16-true."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0].to(self.dtype)).float(), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))


class TwoOptimizers(Net):
    """Manual optimization, two steps a visit."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.net[:3].parameters(), lr=0.1, momentum=0.9),
            torch.optim.Adam(self.net[3:].parameters(), lr=0.01),
        ]


def scaled():
    """16-mixed with its GradScaler; asked for by name, Lightning trains bf16-mixed on a CPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024))]}


def fit(folder, module, callback, seed, **options):
    """One fit with two validation batches; returns its last losses and the number of steps that it took."""
    seeded(seed, lambda: quiet(folder, [callback], **options).fit(module, Blobs(eval_batch_size=10)))
    return {name: value.item() for name, value in module.trainer.callback_metrics.items()}, module.trainer.global_step


BAREBONES = {"barebones": True, "max_epochs": 2, "enable_checkpointing": None, "logger": None,
             "enable_progress_bar": None, "enable_model_summary": None, "num_sanity_val_steps": None}  # fmt: skip
CLIP = {"max_epochs": 2, "gradient_clip_val": 0.1}
FRACTIONS = {"max_epochs": 3, "limit_train_batches": 0.4, "limit_val_batches": 0.5}
CASES = {  # module, rewind, the Trainer's options, the rewind step k, steps of level 0, steps of the others
    "bf16-mixed": (Net, "5it", lambda: {"max_epochs": 2, "precision": "bf16-mixed"}, 5, 18, 13),
    "bf16-true": (HalfAware, "5it", lambda: {"max_epochs": 2, "precision": "bf16-true"}, 5, 18, 13),
    "16-true": (HalfAware, "0it", lambda: {"max_epochs": 2, "precision": "16-true"}, 0, 18, 18),
    "64-true": (HalfAware, "5it", lambda: {"max_epochs": 2, "precision": "64-true"}, 5, 18, 13),
    "16-mixed, scaled": (Net, "5it", lambda: {"max_epochs": 2} | scaled(), 5, 18, 13),
    "16-mixed, scaled and clipped": (Net, "1ep", lambda: CLIP | scaled(), 9, 18, 9),
    "accumulation": (Net, "2it", lambda: {"max_epochs": 2, "accumulate_grad_batches": 3}, 2, 6, 4),
    "accumulation, an epoch": (Net, "1ep", lambda: {"max_epochs": 2, "accumulate_grad_batches": 4}, 3, 6, 3),
    "clipped by norm": (Net, "5it", lambda: CLIP, 5, 18, 13),
    "clipped by value": (Net, "5it", lambda: CLIP | {"gradient_clip_algorithm": "value"}, 5, 18, 13),
    "batches": (Net, "1ep", lambda: {"max_epochs": 3, "limit_train_batches": 2, "limit_val_batches": 1}, 2, 6, 4),
    "fractions": (Net, "1ep", lambda: FRACTIONS, 3, 9, 6),
    "overfit": (Net, "1ep", lambda: {"max_epochs": 3, "overfit_batches": 2}, 2, 6, 4),
    "overfit, a fraction": (Net, "1it", lambda: {"max_epochs": 2, "overfit_batches": 0.5}, 1, 8, 7),
    "barebones": (Net, "5it", lambda: BAREBONES, 5, 18, 13),
    "two optimizers": (TwoOptimizers, "4it", lambda: {"max_epochs": 1}, 4, 18, 14),
}


@pytest.mark.parametrize("name", CASES)
def test_a_level_is_a_fresh_fit_of_its_ticket_under_every_option(tmp_path, name):
    make, rewind, options, k, first, later = CASES[name]
    imp, module, seen = IterativeMagnitudePruning(0.3, rewind, tmp_path), seeded(0, make), []
    for level in imp.levels(2):
        seen.append(fit(level.run_dir, module, imp, 100 + level.number, **options()))
    assert imp.ticket.rewind.step == k
    assert [last - k * (level > 0) for level, (_, last) in enumerate(seen)] == [first, later, later]
    ticket, alone = Ticket.load(imp.ticket_path(2)), seeded(9, make)
    assert repr(fit(tmp_path, alone, ApplyTicket(ticket), 102, **options())) == repr(seen[2])
    assert bits(alone) == bits(module)
    assert set(seen[2][0]) == (set() if "barebones" in name else {"val/loss"})
    assert len(ticket.masks) == 2
    for key, mask in ticket.masks.items():
        weight = alone.get_parameter(key)
        assert weight.dtype == ticket.rewind.tensors[key].dtype
        assert not any(raw(weight[~mask]))
        assert int(mask.sum()) <= 0.5 * mask.numel()


@pytest.mark.parametrize("make", [Net, TwoOptimizers])
def test_a_smoke_test_goes_through_every_level_and_writes_nothing(tmp_path, make):
    lottery = Lottery(tmp_path, make, rewind="1ep", trainer={"fast_dev_run": 2, "precision": "bf16-mixed"}).run(2)
    assert len(lottery.finals) == 3
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class Overflowing(Net):
    """Its loss is infinite at visit 3, so that the GradScaler skips that step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if batch_idx == 3 else loss


class Watch(L.Callback):
    """The pruned and the whole weights, the optimizer's state and the scale after every visit."""

    def __init__(self, masks):
        self.masks, self.rows = masks, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pruned = [pl_module.get_parameter(name)[~mask] for name, mask in self.masks.items()]
        state = trainer.optimizers[0].state
        for values in state.values():
            assert all(torch.isfinite(value).all() for value in values.values() if value is not None)
        pruned += [state[pl_module.get_parameter(n)]["momentum_buffer"][~mask] for n, mask in self.masks.items()]
        self.rows.append(
            SimpleNamespace(
                zeros=all(not tensor.any() for tensor in pruned),
                weights=bits(dict(pl_module.named_parameters())),
                scale=trainer.precision_plugin.scaler.get_scale(),
                step=trainer.global_step,
            )
        )


def test_a_step_that_the_scaler_skips_leaves_masks_and_weights_as_they_were(tmp_path):
    module = seeded(0, Overflowing)
    masks = half_masks(module)
    watch = Watch(masks)
    quiet(tmp_path, [ApplyTicket(ticket_of(module)), watch], max_epochs=1, **scaled()).fit(module, Blobs())
    rows = watch.rows
    assert [row.scale for row in rows] == [1024.0] * 3 + [512.0] * 6
    assert rows[3].weights == rows[2].weights
    assert all(one.weights != other.weights for one, other in pairwise(rows[3:]))
    assert all(row.zeros for row in rows)
    assert [row.step for row in rows] == list(range(1, 10))  # Lightning counts the skipped step


@pytest.mark.parametrize("rewind", ["3it", "4it"])
def test_the_scale_is_part_of_the_rewind_point(tmp_path, rewind):
    """Right before the skipped step, and right after it."""
    imp = IterativeMagnitudePruning(0.3, rewind, tmp_path)
    module = seeded(0, Overflowing)
    for level in imp.levels(1):
        L.seed_everything(level.number, verbose=False)
        trainer = quiet(level.run_dir, [imp], max_epochs=1, **scaled())
        trainer.fit(module, Blobs())
        assert trainer.precision_plugin.scaler.get_scale() == 512
    scale = imp.ticket.rewind.training["precision"]["scale"]
    assert scale == (1024 if rewind == "3it" else 512)
    alone, *_ = fit_with(tmp_path, seeded(5, Overflowing), Blobs(), ApplyTicket(imp.ticket_path(1)), seed=1,
                         max_epochs=1, **scaled())  # fmt: skip
    assert bits(alone) == bits(module)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_wider_ticket_is_rounded_to_the_fits_precision_and_a_line_says_so(tmp_path, precision, caplog):
    caplog.set_level("INFO", "lightning.pytorch")
    source = seeded(1, HalfAware)
    ticket = ticket_of(source)
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
    starts = []

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module):
            starts.append({name: tensor.clone() for name, tensor in pl_module.named_parameters()})

    callbacks = [ApplyTicket(ticket), Start()]
    quiet(tmp_path, callbacks, max_steps=1, limit_val_batches=0, precision=precision).fit(seeded(2, HalfAware), Blobs())
    expected = {
        name: masked(p, ticket.masks[name]) if name in ticket.masks else p for name, p in source.named_parameters()
    }
    assert bits(starts[0]) == bits({name: tensor.to(dtype) for name, tensor in expected.items()})
    assert f"rounded to the network's precision, torch.float32 to {dtype}: net.1.weight, net.1.bias" in caplog.text


def test_a_narrower_ticket_is_taken_exactly_and_without_a_word(tmp_path, caplog):
    caplog.set_level("INFO", "lightning.pytorch")
    ticket = ticket_of(seeded(1, Net).to(torch.bfloat16))
    module = ticket.apply_(seeded(2, Net))
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.to(torch.bfloat16), ticket.state_dict()[name])
        assert raw(parameter) == raw(parameter.to(torch.bfloat16).float())
    assert "rounded" not in caplog.text
