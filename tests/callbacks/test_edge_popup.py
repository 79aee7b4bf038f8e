"""Edge-popup: weights that never change, exact counts, the plain pruned network at all times, and equal bits."""

import copy
import csv
import math
from functools import partial

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from popup_fits import FIRST, LAST, SIZES, Searched, Watch, adam, counts, fit, sgd
from stranger import Net, Probe, bits, make_plain, masked, raw, seeded
from torch import nn

from lottery_callbacks import ApplyTicket, EdgePopup, SparsityMonitor, Ticket, ValidateEvery
from lottery_callbacks.functional import masks as M

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")

# ---- what the network is


@pytest.mark.parametrize("scope", ["layerwise", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_after_each_step_exactly_as_many_are_kept_and_the_module_is_the_pruned_network(tmp_path, scope, sparsity):
    popup = EdgePopup(sparsity, scope)
    watch = Watch(popup)
    module = fit(tmp_path, popup, watch, ValidateEvery("3it"), limit_val_batches=1)
    assert all(watch.baked)
    assert len(watch.baked) == 2 * (20 + 7)
    for masks in (*watch.masks, popup.masks):
        if scope == "layerwise":
            assert M.kept(masks) == counts(sparsity)
        assert sum(M.kept(masks).values()) == (max(1, 132 - round(sparsity * 132)) if scope == "global" else
                                               sum(counts(sparsity).values()))  # fmt: skip
    for name, mask in popup.masks.items():
        assert raw(module.get_parameter(name)) == raw(masked(popup.fixed[name], mask))


def test_neither_the_weights_nor_anything_that_has_no_score_moves(tmp_path):
    start, popup = seeded(1, partial(Searched, adam)), EdgePopup(exclude=[LAST])
    begun, module = {}, copy.deepcopy(start)
    begin = L.Callback()
    begin.on_train_start = lambda *_: begun.update(bits(popup.fixed))
    fit(tmp_path, popup, begin, module=module)
    assert set(popup.masks) == {FIRST}
    assert bits(popup.fixed) == begun
    assert set(popup.fixed[FIRST].unique().tolist()) == {s * torch.tensor(3.0).rsqrt().item() for s in (-1, 1)}
    assert not module.get_parameter("net.1.bias").any()
    for name in ("net.2.weight", "net.2.bias", LAST, "net.5.bias"):
        assert raw(module.get_parameter(name)) == raw(start.get_parameter(name)), name
    (optimizer,) = module.trainer.optimizers
    assert list(optimizer.state) == [module.get_parameter(FIRST)]
    assert not torch.equal(module.get_buffer("net.2.running_mean"), start.get_buffer("net.2.running_mean"))


def test_norms_are_trained_on_request(tmp_path):
    start = seeded(1, Searched)
    module = fit(tmp_path, EdgePopup(norms="trained"), module=copy.deepcopy(start))
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert moved == {FIRST, "net.1.bias", "net.2.weight", "net.2.bias", LAST, "net.5.bias"}
    assert not module.get_parameter("net.5.bias").any()


def test_weights_as_the_module_was_initialised(tmp_path):
    start = seeded(1, Searched)
    popup = EdgePopup(weights="module", scores="magnitude", path=tmp_path / "ticket.safetensors")
    probe = Probe(at=0)
    fit(tmp_path, popup, probe, module=copy.deepcopy(start))
    for name, kept in counts(0.5).items():
        weight = start.get_parameter(name).detach()
        assert raw(popup.fixed[name]) == raw(weight)
        assert probe.state["module"][name].count_nonzero() == kept
        assert set(weight.abs().flatten().topk(kept).values.tolist()) == set(
            probe.state["module"][name].abs()[probe.state["module"][name] != 0].tolist()
        )


def test_biases_stay_where_they_are_excluded_frozen_or_part_of_the_module_s_weights(tmp_path):
    start = seeded(1, Searched)
    start.net[5].bias.requires_grad_(False)
    module = fit(tmp_path, EdgePopup(exclude=["net.1.bias"]), module=copy.deepcopy(start))
    for name in ("net.1.bias", "net.5.bias"):
        assert raw(module.get_parameter(name)) == raw(start.get_parameter(name))
        assert start.get_parameter(name).all()
    start = seeded(1, Searched)
    module = fit(tmp_path / "module", EdgePopup(0.0, weights="module"), module=copy.deepcopy(start), max_steps=3)
    assert all(raw(p) == raw(start.get_parameter(name)) for name, p in module.named_parameters())


def test_numpy_s_numbers_are_kept_in_checkpoints_and_tickets(tmp_path):
    popup = EdgePopup(np.float32(0.5), seed=np.int64(3), path=tmp_path / "ticket.safetensors")
    module = fit(tmp_path, popup)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert Ticket.load(tmp_path / "ticket.safetensors").provenance["seed"] == 3


def test_weights_are_scaled_by_the_density_of_the_search(tmp_path):
    popup = EdgePopup(0.75, weights="scaled_signed_constant")
    fit(tmp_path, popup, max_steps=1)
    assert popup.fixed[FIRST].abs().unique().tolist() == pytest.approx([math.sqrt(2 / (6 * 0.25))])


@pytest.mark.parametrize("norms", ["frozen", "trained"])
def test_the_ticket_gives_a_fresh_network_the_same_outputs(tmp_path, norms):
    popup = EdgePopup(0.6, norms=norms, weights="kaiming_normal", seed=3, path=tmp_path / "popup.safetensors")
    module = fit(tmp_path, popup)
    for ticket in (popup.ticket, Ticket.load(tmp_path / "popup.safetensors")):
        fresh = ticket.apply_(seeded(9, Searched))
        assert bits(fresh) == bits(module)
        assert M.kept(ticket.masks) == counts(0.6)
        assert raw(ticket.rewind.tensors[FIRST]) == raw(popup.fixed[FIRST])
        assert (ticket.level, ticket.rewind.step, ticket.provenance["method"]) == (1, 0, "edge-popup")
        arguments = {key: ticket.provenance[key] for key in ("sparsity", "scope", "weights", "norms", "seed")}
        expected = {"sparsity": 0.6, "scope": "layerwise", "weights": "kaiming_normal", "norms": norms, "seed": 3}
        assert arguments == expected
    trained = fit(tmp_path, ApplyTicket(popup.ticket), module=seeded(3, Searched), max_steps=3)
    assert int((trained.get_parameter(FIRST) == 0).sum()) == 43


def test_a_checkpoint_within_the_fit_is_the_plain_pruned_network(tmp_path):
    popup = EdgePopup(0.7)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7)
    fit(tmp_path, popup, saved, enable_checkpointing=True, max_steps=7)
    plain = Searched()
    plain.load_state_dict(torch.load(tmp_path / "step=7.ckpt", weights_only=True)["state_dict"])
    assert {name: int(plain.get_parameter(name).count_nonzero()) for name in SIZES} == counts(0.7)
    assert list(plain.state_dict()) == list(Searched().state_dict())


def test_a_strangers_tied_frozen_and_convolutional_layers(tmp_path):
    module = make_plain()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    popup = EdgePopup(0.5, "global")
    fit(tmp_path, popup, module=module)
    assert set(popup.masks) == {"encoder.weight", "decoder.weight", "head.weight"}  # tied weights once
    assert sum(M.kept(popup.masks).values()) == 175 - round(0.5 * 175)
    assert torch.equal(module.fixed.weight, before["fixed.weight"])
    assert torch.equal(module.scale, before["scale"])
    assert not module.tied.bias.any()
    assert bits(popup.ticket.apply_(make_plain())) == bits(module)


class SmallConv(Net):
    def __init__(self, last=True):
        super().__init__()
        conv = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, padding=1), nn.ReLU()]
        self.net = nn.Sequential(nn.Linear(6, 64), nn.Unflatten(1, (4, 4, 4)), *conv, nn.Flatten(), nn.Linear(128, 5))
        if last:
            self.net.to(memory_format=torch.channels_last)


def test_channels_last_networks_get_the_masks_of_contiguous_ones(tmp_path):
    found = []
    for last in (False, True):
        popup = EdgePopup(0.5, weights="kaiming_normal")
        module = fit(tmp_path, popup, module=seeded(1, partial(SmallConv, last)), max_steps=5)
        assert module.net[2].weight.is_contiguous(memory_format=torch.channels_last) == last
        assert {key: kept / popup.masks[key].numel() for key, kept in M.kept(popup.masks).items()} == dict.fromkeys(
            popup.masks, 0.5
        )
        found.append(popup)
    for name, score in found[0].scores.items():
        torch.testing.assert_close(found[1].scores[name], score, rtol=0, atol=1e-5)
        assert (
            found[0].masks[name] != found[1].masks[name]
        ).sum() <= 2  # of scores that rounding has made trade places


# ---- the same bits


def test_equal_seeds_give_equal_bits_and_the_global_random_state_is_left_alone(tmp_path, global_rng):
    found, states = [], []

    class Start(L.Callback):
        def on_train_start(self, *args):
            states.append(global_rng())

    for callback in (EdgePopup(seed=1), EdgePopup(seed=1), L.Callback(), EdgePopup(seed=2)):
        module = fit(tmp_path, callback, Start())
        found.append(bits(module))
    assert found[0] == found[1]
    assert found[0] != found[3]
    assert states[0] == states[2] == states[3]


def test_a_second_fit_of_the_same_object_begins_anew(tmp_path):
    popup = EdgePopup()
    first = bits(fit(tmp_path, popup))
    assert bits(fit(tmp_path, popup)) == first
    assert popup.step == 20


PLANS = {
    "sgd": (sgd, {}),
    "adam, global, rising": (adam, {"scope": "global", "end": "12it", "sparsity": 0.8}),
    "threshold, norms": (adam, {"scope": "threshold", "norms": "trained"}),
    "module": (sgd, {"weights": "module", "scores": "magnitude"}),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_killed_fit_goes_on_to_the_bits_of_an_unbroken_one(tmp_path, plan):
    optimizer, arguments = PLANS[plan]
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken = EdgePopup(**arguments)
    make = partial(Searched, optimizer)
    whole = fit(tmp_path, unbroken, every_step, module=seeded(1, make), enable_checkpointing=True)
    for step in (1, 9, 13, 20):  # within and at the end of an epoch and of the fit
        resumed = EdgePopup(**arguments)
        path = tmp_path / f"step={step}.ckpt"
        module = fit(tmp_path, resumed, module=seeded(31, make), seed=977, ckpt_path=path)
        assert bits(module) == bits(whole), step
        assert bits(resumed.scores) == bits(unbroken.scores)
        assert M.digest(resumed.masks) == M.digest(unbroken.masks)
        assert resumed.step == 20
        tickets = [popup.ticket.save(tmp_path / "ticket").read_bytes() for popup in (resumed, unbroken)]
        assert tickets[0] == tickets[1]


def test_a_checkpoint_of_another_search_or_of_none_is_refused(tmp_path):
    def saved_by(callback):
        name = ModelCheckpoint(tmp_path, type(callback).__name__, every_n_train_steps=4)
        fit(tmp_path, callback, name, max_steps=4, enable_checkpointing=True)
        return tmp_path / f"{type(callback).__name__}.ckpt"

    path = saved_by(EdgePopup(0.5))
    with pytest.raises(
        ValueError, match=r"searched by another rule: sparsity is 0\.5 there and 0\.6 now; resume it by"
    ):
        fit(tmp_path, EdgePopup(0.6), ckpt_path=path)
    with pytest.raises(ValueError, match="holds no mask: it was not trained by EdgePopup"):
        fit(tmp_path, EdgePopup(), ckpt_path=saved_by(L.Callback()))


def test_a_compiled_network_is_searched_to_the_same_ticket(tmp_path):
    digests = []
    for compiled in (False, True):
        module = seeded(1, Searched)
        if compiled:
            module.net = torch.compile(module.net, backend="aot_eager")
        popup = EdgePopup()
        fit(tmp_path, popup, module=module, max_steps=8)
        assert list(popup.masks) == list(SIZES)
        digests.append(M.digest(popup.masks))
        assert bits(popup.ticket.apply_(Searched())) == bits({k.replace("_orig_mod.", ""): v for k, v in
                                                              module.state_dict().items()})  # fmt: skip
    torch.compiler.reset()
    assert digests[0] == digests[1]


# ---- schedule, density, logs


def test_the_sparsity_rises_by_the_cubic_schedule_to_its_end(tmp_path):
    popup = EdgePopup(0.8, end="10it")
    watch, probe = Watch(popup), Probe(at=0)
    fit(tmp_path, popup, watch, probe)
    assert probe.state["module"][FIRST].count_nonzero() == 72  # dense before the first step
    for step, masks in enumerate(watch.masks, start=1):
        assert M.kept(masks) == counts(0.8 * (1 - (1 - min(1, step / 10)) ** 3)), step


@pytest.mark.parametrize(("end", "step"), [("1ep", 9), ("0it", 0)])
def test_the_end_is_a_step_string(tmp_path, end, step):
    popup = EdgePopup(0.5, end=end)
    watch = Watch(popup)
    fit(tmp_path, popup, watch)
    reached = [number for number, masks in enumerate(watch.masks, start=1) if M.kept(masks) == counts(0.5)]
    assert reached == [number for number in range(1, 21) if number >= min(step, reached[0])]
    assert reached[0] == max(1, step - 2)  # the counts of the last two steps before the end round to the same


def test_a_learned_threshold_begins_at_the_sparsity_and_learns_how_many_to_keep(tmp_path):
    popup = EdgePopup(0.8, "threshold")
    watch, probe = Watch(popup), Probe(at=0)
    fit(tmp_path, popup, watch, probe)
    assert {name: int(probe.state["module"][name].count_nonzero()) for name in SIZES} == counts(0.8)
    assert all(watch.baked)
    for masks, scores in zip(watch.masks, watch.scores, strict=True):
        assert all(torch.equal(masks[name], scores[name] > 0) for name in SIZES)
    assert len({sum(M.kept(masks).values()) for masks in watch.masks}) > 3


def test_loggers_get_the_densities_at_the_start_at_logging_steps_and_at_the_end(tmp_path):
    logger, popup, monitor = CSVLogger(tmp_path, name="log"), EdgePopup(0.8, end="10it"), SparsityMonitor()
    fit(tmp_path, popup, monitor, logger=logger, log_every_n_steps=6)
    with next((tmp_path / "log").rglob("metrics.csv")).open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["prune/density"]}
    assert list(rows) == [0, 5, 11, 17, 20]  # Lightning's own entries of steps 6, 12 and 18 are numbered so
    sparsities = [0.8 * (1 - (1 - min(1, step / 10)) ** 3) for step in (0, 6, 12, 18, 20)]
    assert [float(row["prune/kept"]) for row in rows.values()] == [sum(counts(s).values()) for s in sparsities]
    assert monitor.densities == {name: kept / SIZES[name] for name, kept in counts(0.8).items()}


def test_a_smoke_test_writes_nothing(tmp_path):
    popup = EdgePopup(end="400it", path=tmp_path / "ticket.safetensors")
    fit(tmp_path, popup, fast_dev_run=2)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert popup.step == 2
