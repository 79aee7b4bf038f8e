"""Controls of a ticket, and what is refused: each in one line that names the mend."""

import logging
import math
import random
from functools import partial

import lightning.pytorch as L
import lightning_utilities.core.rank_zero as rank_zero_module
import numpy as np
import pytest
import torch
from stranger import (
    Blobs,
    Lottery,
    Net,
    Probe,
    bits,
    fit_with,
    half_masks,
    make_plain,
    masked,
    quiet,
    raw,
    seeded,
    ticket_of,
)
from torch import nn

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, Pruning, Ticket


@pytest.fixture(scope="module")
def ticket(tmp_path_factory):
    """The ticket of level 2 of a lottery with its rewind point at step 5."""
    lottery = Lottery(tmp_path_factory.mktemp("ticket"), Net, rewind="5it").run(1)
    return Ticket.load(lottery.imp.ticket_path(2))


def start_and_end(folder, callback, module):
    """The state of a module when its training begins, and how it ends."""
    probe = Probe()
    fit_with(folder, module, Blobs(), callback, probe)
    return probe, {name: tensor.clone() for name, tensor in module.state_dict().items()}


def removed(ticket, tensors):
    """Entries that are zero, by masked parameter."""
    return {name: int((tensors[name] == 0).sum()) for name in ticket.masks}


def test_reinit_draws_new_weights_under_the_same_mask_at_step_0(tmp_path, ticket):
    probe, end = start_and_end(tmp_path, ApplyTicket(ticket, weights="reinit", seed=3), seeded(1, Net))
    start = probe.state
    assert probe.steps[0][:3] == (0, 0, 0)
    assert len(probe.steps) == 24
    assert not any(start["optimizer"].values())
    for name, mask in ticket.masks.items():
        drawn, bound = start["module"][name], 1 / math.sqrt(ticket.masks[name].shape[1])  # torch's own for Linear
        assert not drawn[~mask].any()
        assert not end[name][~mask].any()
        assert (drawn[mask].abs() <= bound).all()
        assert drawn[mask].std() > 0.3 * bound
        assert (drawn[mask] != ticket.rewind.tensors[name][mask]).all()


def test_reinit_forgets_what_was_trained_and_what_batchnorm_saw(tmp_path, ticket):
    fresh, trained = seeded(1, Net), seeded(2, Net)
    fit_with(tmp_path, trained, Blobs())
    starts = [start_and_end(tmp_path, ApplyTicket(ticket, weights="reinit"), m)[0].state for m in (fresh, trained)]
    assert bits(starts[0]["module"]) == bits(starts[1]["module"])
    assert raw(starts[1]["module"]["net.2.running_mean"]) == raw(torch.zeros(12))


def test_the_seed_decides_what_is_drawn(tmp_path, ticket):
    draw = [
        bits(
            start_and_end(tmp_path, ApplyTicket(ticket, weights="reinit", seed=seed), seeded(1, Net))[0].state["module"]
        )
        for seed in (3, 3, 4)
    ]
    assert draw[0] == draw[1]
    assert draw[0]["net.1.weight"] != draw[2]["net.1.weight"]
    shuffles = [ApplyTicket(ticket, mask="layerwise_random", seed=seed).masks["net.1.weight"] for seed in (3, 3, 4)]
    assert torch.equal(shuffles[0], shuffles[1])
    assert not torch.equal(shuffles[0], shuffles[2])


def global_rng():
    state = np.random.get_state()  # noqa: NPY002 (the global state is what is watched)
    return raw(torch.get_rng_state()), random.getstate(), (state[1].tobytes(), *state[2:])


@pytest.mark.parametrize("mask", ["ticket", "layerwise_random", "global_random"])
@pytest.mark.parametrize("weights", ["rewind", "reinit"])
def test_no_control_touches_the_global_random_state(tmp_path, ticket, weights, mask):
    seen = []

    class See(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            seen.append(global_rng())

    L.seed_everything(11, verbose=False)
    before = global_rng()
    control = ApplyTicket(ticket, weights=weights, mask=mask, seed=5)
    module = seeded(1, Net)
    L.seed_everything(11, verbose=False)
    quiet(tmp_path, [See(), control, See()], max_steps=6, limit_val_batches=0).fit(module, Blobs())
    assert seen == [before, before]


def test_reinit_keeps_frozen_and_tied_weights(tmp_path):
    module = seeded(1, make_plain)
    module.scale.requires_grad_(False)
    frozen = bits(module.fixed), raw(module.scale)
    encoder = module.encoder.weight.detach().clone()
    masks = {"encoder.weight": torch.arange(60).view(10, 6) % 2 == 0}
    quiet(tmp_path, [ApplyTicket(ticket_of(module, masks), weights="reinit")], max_steps=3).fit(
        module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(24, 6)), 8)
    )
    assert (bits(module.fixed), raw(module.scale)) == frozen
    assert module.tied.weight is module.decoder.weight
    assert (module.encoder.weight[masks["encoder.weight"]] != encoder[masks["encoder.weight"]]).all()


def test_reinit_refuses_by_name_a_parameter_that_nobody_can_redraw(tmp_path):
    module = seeded(1, make_plain)
    before = bits(module)
    masks = {"encoder.weight": torch.ones(10, 6, dtype=torch.bool)}
    with pytest.raises(ValueError, match="cannot reinitialise scale: give the module") as refusal:
        quiet(tmp_path, [ApplyTicket(ticket_of(module, masks), weights="reinit")], max_steps=3).fit(module, [None])
    assert "\n" not in str(refusal.value)
    assert bits(module) == before


@pytest.mark.parametrize("mask", ["layerwise_random", "global_random"])
def test_mask_controls_keep_as_many_weights_elsewhere(tmp_path, ticket, mask):
    control = ApplyTicket(ticket, mask=mask, seed=1)
    probe, end = start_and_end(tmp_path, control, seeded(1, Net))
    start, total = probe.state, sum(int((~m).sum()) for m in ticket.masks.values())
    own = {name: int((~m).sum()) for name, m in ticket.masks.items()}
    assert sum(removed(ticket, start["module"]).values()) == total
    assert sum(removed(ticket, end).values()) == total
    if mask == "layerwise_random":
        assert removed(ticket, start["module"]) == removed(ticket, end) == own
    for name, kept in ticket.masks.items():
        assert not torch.equal(start["module"][name] == 0, ~kept)
        expected = masked(ticket.rewind.tensors[name], control.masks[name])
        assert raw(start["module"][name]) == raw(expected)
        assert torch.equal(end[name] == 0, start["module"][name] == 0)
    assert probe.steps[0][0] == 5  # the rewind point of the ticket, with its momentum under the control's mask
    momentum = start["optimizer"]["net.1.weight"]["momentum_buffer"]
    assert not momentum[~control.masks["net.1.weight"]].any()


def test_random_masks_have_layers_of_other_densities(ticket):
    layers = [ApplyTicket(ticket, mask="global_random", seed=seed).masks for seed in range(4)]
    own = [int(mask.sum()) for mask in ticket.masks.values()]
    counts = [[int(mask.sum()) for mask in masks.values()] for masks in layers]
    assert all(sum(count) == sum(own) for count in counts)
    assert any(count != own for count in counts)


WIDER = partial(Net, (6, 13, 5))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (WIDER, r"net\.\d\.\w+ is \(\d+(, \d+|,)\) in the ticket and \(\d+(, \d+|,)\) in the network"),
        (make_plain, "absent"),
    ],
)
@pytest.mark.parametrize("weights", ["rewind", "reinit"])
def test_a_ticket_for_another_architecture_is_refused_in_one_line(tmp_path, ticket, make, what, weights):
    module = seeded(1, make)
    before = bits(module)
    with pytest.raises(ValueError, match="the ticket is for another architecture: .*" + what) as refusal:
        quiet(tmp_path, [ApplyTicket(ticket, weights=weights)]).fit(module, Blobs())
    assert "\n" not in str(refusal.value)
    assert bits(module) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(ApplyTicket, weights="random"), "weights='random' is not known: choose one of rewind, reinit"),
        (
            partial(ApplyTicket, mask="none"),
            "mask='none' is not known: choose one of ticket, layerwise_random, global_random",
        ),
        (lambda _: ApplyTicket("nowhere.safetensors"), "nowhere.safetensors is missing or torn"),
        *(
            (lambda _, rate=rate: IterativeMagnitudePruning(rate=rate), r"outside \(0, 1\)")
            for rate in (0, 1, 0.0, 1.0, -0.1, 1.5, math.nan)
        ),
        (lambda _: IterativeMagnitudePruning(rewind="5 steps"), "write iterations as '500it' or epochs as '10ep'"),
        (lambda _: IterativeMagnitudePruning(rewind="-1it"), "is no step string"),
        (
            lambda _: IterativeMagnitudePruning(retrain="none"),
            "weights, prunable_weights, learning_rate, fine_tune",
        ),
        (lambda _: Pruning(score="size"), "score='size' is not known: choose one of magnitude, random"),
        (lambda _: Pruning(scope="local"), "scope='local' is not known: choose one of layerwise, global, erk"),
        (lambda _: Pruning(rates={"net.1.weight": 1.0}), r"the rate of 'net.1.weight' is 1.0: a rate lies in \[0, 1\)"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line_that_lists_the_choices(ticket, make, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make(ticket)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("rewind", "limits"),
    [
        ("25it", {"max_steps": 24}),
        ("3ep", {"max_steps": 24}),
        ("19it", {"max_epochs": 2}),
        ("3ep", {"max_epochs": 2}),
        ("19it", {"max_epochs": 2, "max_steps": 100}),
        ("3ep", {"max_epochs": 2, "max_steps": 100}),
        ("6it", {"max_epochs": 2, "limit_train_batches": 2}),
        ("11it", {"max_epochs": 2, "accumulate_grad_batches": 2}),
    ],
)
def test_a_rewind_step_beyond_the_run_is_refused_before_it_trains(tmp_path, rewind, limits):
    module = seeded(1, Net)
    before = bits(module)
    imp = IterativeMagnitudePruning(rewind=rewind, run_dir=tmp_path)
    with pytest.raises(ValueError, match=f"rewind={rewind} .* rewind earlier or train longer") as refusal:
        quiet(tmp_path, [imp], **limits).fit(module, Blobs())
    assert "\n" not in str(refusal.value)
    assert bits(module) == before
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_run_that_stops_before_the_rewind_step_says_so(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 3

    imp = IterativeMagnitudePruning(rewind="9it", run_dir=tmp_path)
    with pytest.raises(ValueError, match="the run ended at step 3, before rewind=9it"):
        quiet(tmp_path, [imp, Stop()], max_steps=24).fit(seeded(1, Net), Blobs())
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (Pruning(rates={"net.9.weight": 0.1}), "rates names 'net.9.weight', .*: there are net.1.weight, net.5.weight"),
        (Pruning(rates={"net.1.bias": 0.1}), "rates names 'net.1.bias'"),
        (Pruning(exclude=["head"]), "exclude names 'head'"),
        (Pruning(include=["*.wieght"]), r"include names '\*.wieght'"),
        (Pruning(exclude=["*"]), "nothing to prune"),
        (Pruning(scope="global", rates={"net.1.weight": 0.1}), "need scope='layerwise'"),
    ],
)
def test_a_pruning_that_does_not_fit_the_network_is_refused_before_it_trains(tmp_path, pruning, message):
    module = seeded(1, Net)
    before = bits(module)
    imp = IterativeMagnitudePruning(run_dir=tmp_path, pruning=pruning)
    with pytest.raises(ValueError, match=message) as refusal:
        quiet(tmp_path, [imp]).fit(module, Blobs())
    assert "\n" not in str(refusal.value)
    assert bits(module) == before


class Reader(nn.Module):
    """One of everything that is left dense."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm((2, 6))
        self.mix = nn.Linear(6, 12)
        self.last = nn.Linear(6, 5)
        self.other = nn.Linear(6, 5).requires_grad_(False)
        self.temperature = nn.Parameter(torch.ones(1, 1))


def test_what_is_pruned_and_what_is_left_dense_is_printed_with_the_reasons(tmp_path):
    class Task(Net):
        def __init__(self):
            super().__init__()
            self.reader = Reader()

    printed = []
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(record.getMessage())
    logger = rank_zero_module.log  # of the Lightning that was imported last
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    imp = IterativeMagnitudePruning(run_dir=tmp_path, pruning=Pruning(exclude=["reader.last.*"], scope="global"))
    module = seeded(0, Task)
    try:
        quiet(tmp_path, [imp], max_steps=1).fit(module, Blobs())
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    plan = imp.plan(module)
    assert plan in printed
    pruned, left = plan.splitlines()
    assert pruned == "pruned (magnitude, global): net.1.weight (72), net.5.weight (60), reader.mix.weight (72)"
    assert left.removeprefix("left dense: ").split(", ") == [
        "net.1.bias (bias)", "net.2.weight (norm layer)", "net.2.bias (norm layer)", "net.5.bias (bias)",
        "reader.temperature (no weight matrix)", "reader.words.weight (embedding)", "reader.norm.weight (norm layer)",
        "reader.norm.bias (norm layer)", "reader.mix.bias (bias)", "reader.last.weight (excluded)",
        "reader.last.bias (excluded)", "reader.other.weight (frozen)", "reader.other.bias (bias)",
    ]  # fmt: skip
    assert Ticket.load(imp.ticket_path(1)).masks.keys() == {"net.1.weight", "net.5.weight", "reader.mix.weight"}


def test_masks_of_a_ticket_may_leave_layers_dense(tmp_path):
    module = seeded(1, Net)
    masks = {"net.5.weight": half_masks(module)["net.5.weight"]}
    _, end = start_and_end(tmp_path, ApplyTicket(ticket_of(module, masks)), module)
    assert not end["net.5.weight"][~masks["net.5.weight"]].any()
    assert end["net.1.weight"].all()
