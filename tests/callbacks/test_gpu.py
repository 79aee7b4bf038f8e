"""What needs a CUDA device: the same identities there, and tickets that cross between devices."""

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lottery_callbacks import ApplyTicket, EdgePopup, IterativeMagnitudePruning, LinearModeConnectivity, Ticket
from lottery_lightning.data import Digits
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def fit(callback, folder, precision="32-true"):
    L.seed_everything(0, verbose=False)
    module = ImageClassifier(nn.Sequential(Dense([64, 50, 10]), nn.Dropout(0.1)))
    trainer = L.Trainer(
        accelerator="cuda",
        devices=1,
        precision=precision,
        max_steps=30,
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, Digits())
    return {name: parameter.detach().cpu() for name, parameter in module.named_parameters()}


def test_a_level_on_the_gpu_equals_a_fresh_fit_of_its_ticket_and_stays_sparse(tmp_path):
    imp = IterativeMagnitudePruning(0.5, run_dir=tmp_path)
    weights = {}
    for level in imp.levels(2):
        weights = fit(imp, level.run_dir)
    ticket = Ticket.load(imp.ticket_path(2))
    alone = fit(ApplyTicket(ticket), tmp_path / "alone")
    assert all(torch.equal(weights[name], alone[name]) for name in weights)
    for name, mask in ticket.masks.items():
        assert mask.device.type == "cpu"
        assert not weights[name][~mask].any()
        assert weights[name][mask].all()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_keeps_pruned_weights_at_zero(tmp_path, precision):
    imp = IterativeMagnitudePruning(0.5, run_dir=tmp_path)
    weights = {}
    for level in imp.levels(1):
        weights = fit(imp, level.run_dir, precision)
    for name, mask in Ticket.load(imp.ticket_path(1)).masks.items():
        assert not weights[name][~mask].any()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("scope", ["layerwise", "global"])
def test_edge_popup_keeps_exact_counts_of_unchanged_weights(tmp_path, precision, scope):
    popup = EdgePopup(0.7, scope)
    weights = fit(popup, tmp_path, precision)
    assert sum(int(mask.sum()) for mask in popup.masks.values()) == 64 * 50 + 500 - round(0.7 * (64 * 50 + 500))
    for name, mask in popup.masks.items():
        assert torch.equal(weights[name], popup.fixed[name] * mask)


@pytest.mark.parametrize("norms", ["average", "reestimate"])
def test_lines_are_evaluated_on_the_gpu_and_weights_end_as_without_them(tmp_path, norms):
    devices = set()

    def loss(module, batch):
        devices.update({batch[0].device.type, next(module.parameters()).device.type})
        return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")

    bare = fit(L.Callback(), tmp_path)
    torch.save({name: torch.zeros_like(tensor) for name, tensor in bare.items()}, tmp_path / "zeros.pt")
    lines = []
    for own in (None, loss):
        callback = LinearModeConnectivity([tmp_path / "zeros.pt"], False, points=3, norms=norms, loss=own)
        watched = fit(callback, tmp_path)
        assert all(torch.equal(bare[name], watched[name]) for name in bare)
        lines.append(callback.results["zeros"])
    assert devices == {"cuda"}
    assert lines[0].losses == lines[1].losses
    assert lines[0].losses[2] == pytest.approx(2.302585, rel=1e-5)  # of equal logits in 10 classes
