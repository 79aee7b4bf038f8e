"""Checkpoints of others: against torch's own pruning, DistributedDataParallel, DataParallel and `torch.compile`."""

import datetime

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stranger import Blobs, Lottery, Net, bits, fit_with, masked, raw, seeded
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import prune

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, RewindPoint, Ticket
from lottery_callbacks.foreign import plain


def network(seed=0):
    """A convolution, a norm layer and a recurrent layer, all of which torch can prune."""
    layers = {"conv": nn.Conv1d(2, 3, 3), "norm": nn.BatchNorm1d(3), "rnn": nn.GRU(4, 2)}
    return seeded(seed, lambda: nn.ModuleDict({name: layer for name, layer in layers.items()}).apply(_draw))


def _draw(module):
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter)


def pruned(module):
    """Pruned by `torch.nn.utils.prune` in its three ways, a bias too; one layer twice."""
    prune.l1_unstructured(module["conv"], "weight", 0.5)
    prune.random_unstructured(module["conv"], "weight", 0.2)
    prune.random_unstructured(module["conv"], "bias", 1)
    prune.ln_structured(module["rnn"], "weight_hh_l0", 0.4, n=2, dim=0)
    return module


MASKED = ["conv.bias", "conv.weight", "rnn.weight_hh_l0"]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """DistributedDataParallel in a group of one process."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("ddp") / "store"), 1)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=30)
    )
    yield DistributedDataParallel
    torch.distributed.destroy_process_group()


WRAPS = {
    "bare": [],
    "ddp": ["ddp"],
    "data parallel": [DataParallel],
    "compiled": [torch.compile],
    "compiled, then ddp": [torch.compile, "ddp"],
    "ddp, then compiled": ["ddp", torch.compile],
}


def wrap(module, ways, ddp):
    for way in ways:
        module = ddp(module) if way == "ddp" else way(module)
    return module


@pytest.mark.parametrize("ways", WRAPS)
def test_a_pruned_and_wrapped_network_comes_back_as_a_plain_one_with_its_masks(ways, ddp):
    ours = pruned(network())
    effective = {name: getattr(ours[name.split(".")[0]], name.split(".")[1]).detach().clone() for name in MASKED}
    saved = wrap(ours, WRAPS[ways], ddp).state_dict()
    assert any(key.endswith("conv.weight_orig") for key in saved)
    tensors, masks = plain(saved)
    target = network(seed=1)
    assert set(tensors) == set(target.state_dict())
    target.load_state_dict(tensors)
    assert bits(target) == bits({name: network().state_dict()[name] for name in target.state_dict()})  # W_orig
    assert sorted(masks) == MASKED
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {
        "conv.weight": 11, "conv.bias": 1, "rnn.weight_hh_l0": 4
    }  # fmt: skip
    dense = Ticket.from_state_dict(saved).state_dict()
    target.load_state_dict(dense)
    assert all(torch.equal(dense[name], effective[name]) for name in MASKED)
    assert all(not any(raw(dense[name][~mask])) for name, mask in masks.items())


def test_a_lightning_checkpoint_of_a_pruned_module_is_read_by_its_state_dict(tmp_path):
    module = seeded(0, Net)
    prune.l1_unstructured(module.net[1], "weight", 0.25)
    torch.save({"epoch": 3, "state_dict": torch.compile(module).state_dict()}, tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    tensors, masks = plain(checkpoint["state_dict"])
    assert set(tensors) == set(Net().state_dict())
    assert int((~masks["net.1.weight"]).sum()) == 18
    message = r"""^'epoch' is a int, .*: give checkpoint\["state_dict"\]"""
    for read in (plain, Ticket.from_state_dict):
        with pytest.raises(ValueError, match=message):
            read(checkpoint)


def test_module_is_a_name_like_others_unless_every_key_begins_with_it():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.head = nn.Linear(2, 2)

    own = Owner().state_dict()
    assert list(plain(own)[0]) == list(own) == ["module.weight", "module.bias", "head.weight", "head.bias"]
    wrapped = DataParallel(Owner()).state_dict()
    assert list(plain(wrapped)[0]) == list(own)  # once only
    assert list(plain({"submodule.weight": torch.ones(1)})[0]) == ["submodule.weight"]
    assert plain({}) == ({}, {})


def test_masks_are_never_read_off_zeros():
    module = pruned(network())
    for name in MASKED:
        prune.remove(module[name.split(".")[0]], name.split(".")[1])
    tensors, masks = plain(module.state_dict())
    assert masks == {}
    assert int((tensors["conv.weight"] == 0).sum()) == 11
    with pytest.raises(ValueError, match=r"holds no \*_orig and \*_mask, and a mask is never read off zeros"):
        Ticket.from_state_dict(module.state_dict())


def test_buffers_that_only_sound_like_masks_stay_tensors():
    state = {"attn_mask": torch.ones(2), "weight_orig": torch.ones(3), "_orig_mod_mask": torch.zeros(1)}
    tensors, masks = plain(state)
    assert (list(tensors), masks) == (list(state), {})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w_orig": torch.ones(3), "w_mask": torch.tensor([0, 1, 0.5])}, "w_mask is no mask of w_orig"),
        ({"w_orig": torch.ones(3), "w_mask": torch.ones(2)}, r"must have the shape \(3,\)"),
        ({"w_orig": torch.ones(1), "w_mask": torch.ones(1), "w": torch.ones(1)}, "two entries come to the name w:"),
        ({"a._orig_mod.w": torch.ones(1), "a.w": torch.ones(1)}, r"two entries come to the name a\.w: leave one"),
        ({"extra": {"version": 2}}, "'extra' is a dict, and a state dict holds tensors"),
    ],
    ids=["values", "shape", "plain name too", "compiled and plain", "no tensor"],
)
def test_what_cannot_be_read_is_refused_in_one_line(state, message):
    with pytest.raises(ValueError, match=message) as error:
        plain(state)
    assert "\n" not in str(error.value)


SEGMENT = st.sampled_from(["net", "module", "0", "weight", "x_orig", "head"])
NAMES = st.lists(SEGMENT, min_size=1, max_size=3).map(".".join)


@given(st.dictionaries(NAMES, st.booleans(), min_size=1, max_size=6), st.data())
def test_any_mixture_of_wrappers_and_masks_is_undone(state, data):
    outer = data.draw(st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]))
    if "module" not in outer and all(name.startswith("module.") for name in state):
        return  # cannot be told from a wrapper
    wrapped, expected = {}, {}
    for value, (name, has_mask) in enumerate(state.items()):
        *path, leaf = name.split(".")
        inner = [part for segment in path for part in data.draw(st.sampled_from([[segment], [segment, "_orig_mod"]]))]
        weight = torch.tensor([value, 1.0])
        key = outer + ".".join([*inner, leaf])
        wrapped |= {f"{key}_orig": weight, f"{key}_mask": torch.tensor([0.0, 1.0])} if has_mask else {key: weight}
        expected[name] = weight
    tensors, masks = plain(wrapped)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {n: t.tolist() for n, t in expected.items()}
    assert {name: mask.tolist() for name, mask in masks.items()} == {n: [False, True] for n, m in state.items() if m}


def test_a_lottery_goes_on_from_a_strangers_pruned_network(tmp_path):
    theirs = seeded(0, Net)
    for index in (1, 5):
        prune.l1_unstructured(theirs.net[index], "weight", 0.5)
    ticket = Ticket.from_state_dict(DataParallel(theirs).state_dict())
    assert (ticket.level, ticket.density, ticket.rewind.step) == (1, 0.5, 0)
    imp = IterativeMagnitudePruning(rate=0.3, run_dir=tmp_path)
    ticket.save(imp.ticket_path(1))
    lottery = Lottery(tmp_path, Net, trainer={"max_steps": 6}).run(2)
    assert len(lottery.finals) == 2  # levels 1 and 2
    after = Ticket.load(imp.ticket_path(3))
    assert {name: int(mask.sum()) for name, mask in after.masks.items()} == {"net.1.weight": 17, "net.5.weight": 15}
    assert all(not (mask & ~ticket.masks[name]).any() for name, mask in after.masks.items())
    assert bits(after.rewind.tensors) == bits({n: t for n, t in seeded(0, Net).state_dict().items()})
    alone, *_ = fit_with(tmp_path, seeded(8, Net), Blobs(), ApplyTicket(ticket), seed=101, max_steps=6)
    assert bits(alone) == bits(lottery.finals[0])


def test_the_ticket_keeps_what_lies_under_the_mask_and_is_detached_from_the_state_dict():
    module = pruned(network())
    saved = module.state_dict()
    ticket = Ticket.from_state_dict(saved, {"level": 4, "source": "theirs"})
    assert ticket.provenance == {"level": 4, "source": "theirs"}
    under = ticket.rewind.tensors["conv.weight"][~ticket.masks["conv.weight"]]
    assert under.numel() == 11
    assert under.all()
    with torch.no_grad():
        for tensor in saved.values():
            tensor.zero_()
    assert ticket.rewind.tensors["conv.weight"].all()
    assert int(ticket.masks["conv.weight"].sum()) == 7


class Tied(nn.Module):
    """An output layer tied to its embedding, and a buffer that no state dict holds."""

    def __init__(self, seed=0):
        super().__init__()
        self.words = seeded(seed, lambda: nn.Embedding(7, 4))
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.words.weight
        self.register_buffer("scale", torch.full((1,), float(seed)), persistent=False)


def test_a_state_dict_with_tied_weights_and_without_transient_buffers_applies(tmp_path):
    source = Tied(1)
    prune.l1_unstructured(source.words, "weight", 0.5)
    source.output.weight = source.words.weight_orig
    state = source.state_dict()
    assert set(state) == {"words.weight_orig", "words.weight_mask", "output.weight"}
    copied = {name: tensor.clone() for name, tensor in state.items()}  # as from a file that keeps no ties
    for read in (state, copied):
        ticket = Ticket.load(Ticket.from_state_dict(read).save(tmp_path / "t"))
        target = ticket.apply_(Tied(2))
        assert raw(target.words.weight) == raw(masked(state["words.weight_orig"], state["words.weight_mask"].bool()))
        assert target.output.weight is target.words.weight
        assert target.scale.item() == 2
    dense = Ticket.from_state_dict(state).state_dict()
    assert list(dense) == ["words.weight"]  # no dense copy under the other name
    assert int((dense["words.weight"] == 0).sum()) == 14
    prune.custom_from_mask(source.output, "weight", source.words.weight_mask)
    both = Ticket.from_state_dict(source.state_dict())
    assert list(both.masks) == ["words.weight"]
    assert raw(both.apply_(Tied(3)).words.weight) == raw(target.words.weight)
    other = Ticket(ticket.masks, RewindPoint(0, {"scale": torch.full((1,), 5.0), **ticket.rewind.tensors}))
    assert other.apply_(target).scale.item() == 2  # a cache, which older files hold
