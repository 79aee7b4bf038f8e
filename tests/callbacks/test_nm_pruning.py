"""N:M pruning inside one fit: the pattern holds from its step to the end, and the rest stays dense."""

import copy
import logging

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stranger import Blobs, Net, Probe, bits, masked, quiet, raw, seeded
from torch import nn
from torch.nn import functional as F

from lottery_callbacks import ApplyTicket, Pruning, RewindPoint, Ticket
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.nm import keep_n_of_m
from lottery_callbacks.nm_pruning import NMPruning
from lottery_callbacks.rewinding import snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*but have no `validation_step`"),
]
FIRST, LAST = "net.1.weight", "net.5.weight"


def wide():
    """(12, 8) and (5, 12): both inputs are multiples of 4."""
    return Net((8, 12, 5))


class Wide(Blobs):
    """`Blobs` with two more features, so that the input is a multiple of 4."""

    def load(self):
        return {name: (F.pad(images, (0, 2), value=0.5), labels) for name, (images, labels) in super().load().items()}


class Convolutional(L.LightningModule):
    """Convolutions of 3 -> 8 -> 4 channels: the first one has no groups of 4."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(8, 5))

    def training_step(self, batch, batch_idx):
        images = F.pad(batch[0], (0, 12)).view(-1, 3, 3, 2)
        return F.cross_entropy(self.net(images), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(folder, callback, *others, module=None, seed=5, data=Wide, ckpt_path=None, **options):
    module = module or seeded(1, wide)
    trainer = quiet(folder, [callback, *others], limit_val_batches=0, **{"max_steps": 12} | options)
    L.seed_everything(seed, verbose=False)
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return module


def groups(tensor, m=4):
    return tensor.movedim(1, -1).reshape(-1, m)


@pytest.mark.parametrize(("n", "m", "kept"), [(2, 4, {FIRST: 48, LAST: 30}), (1, 2, {FIRST: 48, LAST: 30}),
                                              (1, 4, {FIRST: 24, LAST: 15})])  # fmt: skip
def test_the_trained_weights_hold_the_pattern_exactly(tmp_path, n, m, kept):
    callback = NMPruning(n, m)
    module = fit(tmp_path, callback)
    assert M.kept(callback.masks) == kept
    for name in kept:
        weight = module.get_parameter(name).detach()
        assert ((groups(weight, m) != 0).sum(1) == n).all()
        assert not any(raw(weight[~callback.masks[name]]))


def test_it_ranks_the_weights_of_its_step_and_prunes_nothing_before(tmp_path):
    probe, plain = Probe(at=7), Probe(at=7)
    callback = NMPruning(at="7it")
    fit(tmp_path, callback, probe)
    fit(tmp_path, L.Callback(), plain)
    weights = {name: plain.state["module"][name] for name in (FIRST, LAST)}
    masks = keep_n_of_m({name: weight.abs() for name, weight in weights.items()}, M.ones(weights), 2, 4)
    assert M.digest(callback.masks) == M.digest(masks)
    assert {name: raw(probe.state["module"][name]) for name in weights} == {
        name: raw(masked(weight, masks[name])) for name, weight in weights.items()
    }


def test_by_snip_at_initialisation_it_is_training_its_mask_from_the_initial_weights(tmp_path):
    start = seeded(1, wide)
    initial = RewindPoint(0, snapshot(start))
    callback = NMPruning(pruning=Pruning(score="snip"))
    trained = bits(fit(tmp_path, callback, module=copy.deepcopy(start)))
    by_magnitude = NMPruning()
    fit(tmp_path, by_magnitude, module=start, max_steps=1)
    assert M.digest(callback.masks) != M.digest(by_magnitude.masks)
    ticket = ApplyTicket(Ticket(callback.masks, initial))
    assert bits(fit(tmp_path, ticket, module=seeded(9, wide))) == trained


def test_a_weight_without_whole_groups_stays_dense_and_is_named(tmp_path, caplog):
    callback = NMPruning(2, 4)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        module = fit(tmp_path, callback, module=seeded(1, Convolutional), data=Blobs)
    assert "pruned (2:4, magnitude, layerwise): net.2.weight (128), net.4.weight (40)\n" in caplog.text
    assert "net.0.weight (input of 3, no multiple of 4)\n" in caplog.text
    sizes = {name: mask.numel() for name, mask in callback.masks.items()}
    assert M.kept(callback.masks) == {name: n if name == "net.0.weight" else n // 2 for name, n in sizes.items()}
    convolution = module.get_parameter("net.2.weight").detach()
    assert convolution.shape == (4, 8, 2, 2)
    assert ((groups(convolution) != 0).sum(1) <= 2).all()
    assert (groups(callback.masks["net.2.weight"]).sum(1) == 2).all()


def test_where_no_weight_has_whole_groups_it_says_so(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"^nothing to prune to 3:7: there are net\.1\.weight \(input of 8, no multiple of 7\), net\.5\.",
    ):
        fit(tmp_path, NMPruning(3, 7))


def test_a_killed_fit_goes_on_to_the_bits_of_an_unbroken_one(tmp_path):
    def make():
        return NMPruning(1, 4, at="6it", pruning=Pruning(score="random"), seed=3)

    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    callback = make()
    unbroken = fit(tmp_path, callback, every_step, enable_checkpointing=True)
    for step in (5, 6, 7):
        resumed = make()
        path = tmp_path / f"step={step}.ckpt"
        module = fit(tmp_path, resumed, module=seeded(31, wide), seed=977, ckpt_path=path)
        assert bits(module) == bits(unbroken), step
        assert M.digest(resumed.masks) == M.digest(callback.masks)
    with pytest.raises(ValueError, match="another rule: pattern is '1:4' there and '2:4' now"):
        fit(tmp_path, NMPruning(2, 4, at="6it", pruning=callback.pruning, seed=3), ckpt_path=tmp_path / "step=7.ckpt")


def test_the_ticket_carries_the_pattern(tmp_path):
    callback = NMPruning()
    module = fit(tmp_path, callback)
    ticket = Ticket.load(callback.ticket(module).save(tmp_path / "nm.safetensors"))
    assert (ticket.density, ticket.provenance["pattern"]) == (0.5, "2:4")
    assert bits(ticket.apply_(seeded(4, wide))) == bits(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 4, "m": 4}, "4:4 is no pattern"),
        ({"n": 0, "m": 4}, "0:4 is no pattern"),
        ({"pruning": Pruning(scope="global")}, "scope='global' has no meaning for 2:4"),
        ({"pruning": Pruning(rates={"*": 0.5})}, "rates per layer belong to levels"),
        ({"at": "begin"}, "'begin' is no step string"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        NMPruning(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_packs_a_pruned_linear_layer_for_the_sparse_tensor_cores():
    layer = seeded(0, lambda: nn.Linear(128, 128, bias=False)).cuda().bfloat16()
    scores = {"weight": layer.weight.detach().abs()}
    mask = keep_n_of_m(scores, M.ones(scores), 2, 4)["weight"]
    weight = masked(layer.weight.detach(), mask)
    packed = torch.sparse.to_sparse_semi_structured(weight)
    assert torch.equal(packed.to_dense(), weight)
    images = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(F.linear(images, packed), F.linear(images, weight), rtol=0.02, atol=0.02)
