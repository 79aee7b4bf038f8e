"""Compiled networks: the names, tickets and bits of the plain ones, whichever way `torch.compile` is used."""

import os
import shutil
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stranger import Blobs, Lottery, Net, bits, fit_with, half_masks, quiet, raw, seeded, ticket_of
from torch import nn

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, Pruning, Ticket
from lottery_callbacks.apply_ticket import reinitialise
from lottery_callbacks.foreign import plain
from lottery_callbacks.names import canonical, further_names, named_buffers, named_parameters, owners
from lottery_callbacks.rewinding import snapshot

STEPS = {"max_steps": 8, "val_check_interval": 4, "check_val_every_n_epoch": None}
NAMES = ["net.1.weight", "net.5.weight"]


class Compiled(Net):
    """`Net` around a compiled network, as strangers write it."""

    def __init__(self, backend="eager"):
        super().__init__()
        self.net = torch.compile(self.net, backend=backend)


def in_place(backend):
    module = Net()
    module.net.compile(backend=backend)
    return module


def whole(backend):
    return torch.compile(Net(), backend=backend)


WAYS = {"attribute": Compiled, "in place": in_place, "whole module": whole}


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch.compiler.reset()


def state(module):
    return {canonical(name): tensor for name, tensor in module.state_dict().items()}


class Zoo(nn.Module):
    """Compiled modules at every depth: the parent, the owner itself, an element of a list; and one held twice."""

    def __init__(self, wrap=lambda module: module):
        super().__init__()
        self.body = wrap(nn.Sequential(nn.Linear(4, 6), nn.ModuleList([wrap(nn.Linear(6, 3))])))
        self.norm = wrap(nn.BatchNorm1d(3))
        self.words = wrap(nn.Embedding(7, 3))
        self.again = self.body


def test_names_are_those_of_the_plain_network_at_every_depth():
    dense, compiled = Zoo(), Zoo(torch.compile)
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    assert list(named_parameters(compiled)) == list(named_parameters(dense)) == [n for n, _ in dense.named_parameters()]
    assert list(named_buffers(compiled)) == list(named_buffers(dense)) == [n for n, _ in dense.named_buffers()]
    assert further_names(compiled) == further_names(dense) == {
        f"again.{name}" for name in ("0.weight", "0.bias", "1.0.weight", "1.0.bias")
    }  # fmt: skip
    assert set(snapshot(compiled)) == set(snapshot(dense))
    assert canonical("_orig_mod.my_orig_mod.weight") == "my_orig_mod.weight"


def test_what_is_pruned_and_why_the_rest_is_not_does_not_depend_on_compiling():
    rule = Pruning(exclude=["body.1.*"])
    dense, compiled = Zoo(), Zoo(torch.compile)
    rule.check(compiled)
    assert list(rule.prunable(compiled)) == list(rule.prunable(dense)) == ["body.0.weight"]
    assert rule.excluded(compiled) == rule.excluded(dense)
    assert rule.excluded(compiled)["norm.weight"] == "norm layer"
    assert rule.excluded(compiled)["words.weight"] == "embedding"
    with pytest.raises(ValueError, match=r"'body\._orig_mod\.0\.weight', which is no parameter: there are body\.0"):
        Pruning(exclude=["body._orig_mod.0.weight"]).check(compiled)


def test_a_parameters_owner_is_the_plain_module_and_tied_ones_have_several():
    compiled = Zoo(torch.compile)
    compiled.head = nn.Linear(3, 7, bias=False)
    compiled.head.weight = compiled.words.weight
    assert owners(compiled, compiled.words.weight) == [compiled.words._orig_mod, compiled.head]
    assert owners(compiled, compiled.norm.weight) == [compiled.norm._orig_mod]


@pytest.mark.parametrize("way", WAYS)
def test_a_lottery_of_the_compiled_network_is_that_of_the_plain_one(tmp_path, way):
    """With a backend that computes as eager mode does: equal tickets, and each trains the other network."""
    dense = Lottery(tmp_path / "plain", Net, rewind="3it", trainer=STEPS).run(1)
    make = partial(WAYS[way], "eager")
    compiled = Lottery(tmp_path / "compiled", make, rewind="3it", trainer=STEPS).run(1)
    for level in range(3):
        paths = [lottery.imp.ticket_path(level) for lottery in (dense, compiled)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert list(Ticket.load(paths[1]).masks) == NAMES
    for other, lottery in ((Net, compiled), (make, dense)):
        ticket = ApplyTicket(lottery.imp.ticket_path(1))
        module, curve, _ = fit_with(tmp_path, seeded(9, other), Blobs(), ticket, seed=101, **STEPS)
        assert bits(state(module)) == bits(state(dense.module)) == bits(state(compiled.module))
        assert curve.rows == dense.curves[1]


class Small(Net):
    """Without BatchNorm and dropout, which cost the compiler seconds."""

    def __init__(self, backend):
        super().__init__()
        self.net = torch.compile(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), backend=backend)


@pytest.mark.parametrize(("make", "backend"), [(whole, "aot_eager"), (Small, "inductor")], ids=["whole", "inductor"])
def test_a_compiled_level_is_a_fresh_fit_of_its_ticket_with_exact_zeros(tmp_path, make, backend):
    if backend == "inductor" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        pytest.skip("inductor needs a C++ compiler")
    make, options = partial(make, backend), {"max_steps": 3, "limit_train_batches": 8, "limit_val_batches": 0}
    lottery = Lottery(tmp_path, make, trainer=options).run(2)
    ticket = Ticket.load(lottery.imp.ticket_path(2))
    alone, *_ = fit_with(tmp_path, seeded(9, make), Blobs(), ApplyTicket(ticket), seed=102, **options)
    final = state(alone)
    assert bits(final) == bits({canonical(name): tensor for name, tensor in lottery.finals[2].items()})
    assert len(ticket.masks) == 2
    for name, mask in ticket.masks.items():
        assert int(mask.sum()) <= 0.5 * mask.numel()
        assert not any(raw(final[name][~mask]))
        assert final[name][mask].all()


def test_compiled_layers_are_redrawn_once():
    dense, compiled = seeded(0, Zoo), seeded(0, lambda: Zoo(torch.compile))
    before = bits(dense)
    for module in (dense, compiled):
        reinitialise(module, 3)
    assert bits(state(compiled)) == bits(dense)
    assert before["body.0.weight"] != bits(dense)["body.0.weight"]


def test_a_redraw_is_the_same_for_the_compiled_network(tmp_path):
    ticket = ticket_of(seeded(0, Net))
    drawn = []
    for make in (Net, Compiled):
        apply = ApplyTicket(ticket, weights="reinit", seed=3)
        module, *_ = fit_with(tmp_path, seeded(4, make), Blobs(), apply, max_steps=2, limit_val_batches=0)
        drawn.append(bits(state(module)))
    assert drawn[0] == drawn[1]


def test_a_checkpoint_of_a_compiled_run_resumes_it_and_has_plain_tensors(tmp_path):
    class Best(ModelCheckpoint):
        pass

    lottery = Lottery(tmp_path / "run", Compiled, trainer=STEPS)
    for level in lottery.imp.levels(1):
        lottery.fit(level, Best(level.run_dir, "{step}", every_n_train_steps=5, save_top_k=-1))
    path = tmp_path / "run" / "level_01" / "step=5.ckpt"
    tensors, masks = plain(torch.load(path, weights_only=True)["state_dict"])
    dense = Net()
    dense.load_state_dict(tensors)  # strict
    assert masks == {}  # they are in the callback's state
    module = seeded(7, Compiled)
    ticket = lottery.imp.ticket_path(1)
    imp = IterativeMagnitudePruning(rate=0.3, run_dir=tmp_path / "run")
    imp.select(1)
    quiet(tmp_path, [imp], **STEPS).fit(module, Blobs(), ckpt_path=path)
    assert bits(module) == bits(lottery.finals[1])
    for name, mask in Ticket.load(ticket).masks.items():
        assert not any(raw(dense.get_parameter(name)[~mask]))


def test_a_ticket_applies_to_the_compiled_network_itself_and_to_what_is_within():
    source = seeded(1, Net)
    ticket = ticket_of(source, half_masks(source))
    compiled = seeded(2, Compiled)
    keys = list(compiled.state_dict())
    assert ticket.apply_(compiled) is compiled
    assert list(compiled.state_dict()) == keys
    assert bits(state(compiled)) == bits(state(ticket.apply_(Net())))
    inner = seeded(3, Net).net
    ticket.for_submodule("net").apply_(torch.compile(inner))
    assert bits({f"net.{name}": tensor for name, tensor in inner.state_dict().items()}) == bits(state(compiled))
    assert set(ticket.for_submodule("net._orig_mod").masks) == set(ticket.for_submodule("net").masks)
