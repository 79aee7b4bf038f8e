import json
from collections import Counter

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lottery_callbacks import RewindPoint, Ticket
from lottery_callbacks.functional import masks as M
from lottery_callbacks.rewinding import load_snapshot, snapshot
from lottery_callbacks.ticket import write_atomically

SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, -3.5])


def network(widths=(5, 7, 3), seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(widths[0], widths[1]), nn.BatchNorm1d(widths[1]), nn.Linear(*widths[1:]))


def ticket_of(module, training=None, step=0, **provenance):
    generator = torch.Generator().manual_seed(3)
    weights = {name: p for name, p in module.named_parameters() if p.ndim == 2}
    masks = {name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in weights.items()}
    return Ticket(masks, RewindPoint(step, snapshot(module), training or {}), provenance)


def same(a, b):
    """Equal to the bit and to the type, through containers."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        equal_kind = (a.dtype, a.shape) == (b.dtype, b.shape)
        return equal_kind and a.contiguous().flatten().view(torch.uint8).equal(
            b.contiguous().flatten().view(torch.uint8)
        )
    if isinstance(a, dict):
        return [*a] == [*b] and [*map(type, a)] == [*map(type, b)] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return repr(a) == repr(b)
    return a == b


def optimizer_state(module):
    """The state of an Adam with two groups after a step, and of a schedule."""
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam([{"params": parameters[:2]}, {"params": parameters[2:], "betas": (0.5, 0.9)}], lr=1e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 5])
    module(torch.randn(4, 5, generator=torch.Generator().manual_seed(1))).sum().backward()
    optimizer.step()
    schedule.step()
    return {
        "optimizers": [optimizer.state_dict()],
        "schedulers": [schedule.state_dict()],
        "loops": {"epoch": 3, "flags": [True, False], "nothing": None, "empty": [{}, [], ()]},
    }


def test_a_ticket_comes_back_from_its_file_to_the_bit(tmp_path):
    module = network()
    ticket = ticket_of(module, optimizer_state(module), step=500, level=4, rate=0.2, note=None, rates={"*": 0.1})
    assert ticket.save(tmp_path / "a" / "b" / "ticket.safetensors") == tmp_path / "a" / "b" / "ticket.safetensors"
    back = Ticket.load(tmp_path / "a" / "b" / "ticket.safetensors")
    assert {name: mask.dtype for name, mask in back.masks.items()} == dict.fromkeys(ticket.masks, torch.bool)
    assert M.digest(back.masks) == M.digest(ticket.masks)
    assert back.rewind.step == 500
    assert same(dict(sorted(back.rewind.tensors.items())), dict(sorted(ticket.rewind.tensors.items())))
    assert same(back.rewind.training, ticket.rewind.training)
    assert list(back.rewind.training["optimizers"][0]["state"]) == list(range(6))
    assert isinstance(back.rewind.training["optimizers"][0]["param_groups"][1]["betas"], tuple)
    assert back.rewind.training["schedulers"][0]["milestones"] == Counter([1, 5])
    assert back.provenance == {"level": 4, "rate": 0.2, "note": None, "rates": {"*": 0.1}}
    assert (back.level, back.density) == (4, ticket.density)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_special_values_of_every_precision_come_back_to_the_bit(tmp_path, dtype):
    tensors = {"w": SPECIAL.to(dtype), "steps": torch.tensor(7), "scalar": SPECIAL[0].clone().to(dtype)}
    training = {"moment": -SPECIAL.to(dtype), "rate": float("inf"), "nan": float("nan"), "minus": -0.0, "tiny": 5e-324}
    ticket = Ticket({"w": torch.ones(7, dtype=torch.bool)}, RewindPoint(1, tensors, training))
    back = Ticket.load(ticket.save(tmp_path / "t"))
    assert same(back.rewind.tensors, {name: tensors[name] for name in back.rewind.tensors})
    assert set(back.rewind.tensors) == set(tensors)
    assert same(back.rewind.training, training)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.text(max_size=6),
    st.builds(lambda values: torch.tensor(values, dtype=torch.float32), st.lists(st.floats(width=32), max_size=3)),
)
KEYS = st.one_of(st.integers(-5, 5), st.text(max_size=4))
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["optimizers", "loops", "tensor", "dict"]), STATES, max_size=3))
def test_any_nest_of_primitives_and_tensors_comes_back(tmp_path_factory, training):
    ticket = Ticket({"w": torch.tensor([True, False])}, RewindPoint(2, {"w": torch.ones(2)}, training))
    back = Ticket.load(ticket.save(tmp_path_factory.getbasetemp() / "nest.safetensors"))
    assert same(back.rewind.training, training)


@pytest.mark.parametrize(
    "training",
    [
        {0: torch.tensor([1.0]), "0": torch.tensor([2.0])},
        {"a/b": torch.tensor([1.0]), "a": {"b": torch.tensor([2.0])}},
        {"a": [torch.tensor([1.0])], "a/0": torch.tensor([2.0])},
    ],
    ids=["integer and string key", "slash in a key", "list index"],
)
def test_tensors_under_keys_that_read_alike_are_kept_apart(tmp_path, training):
    ticket = Ticket({"w": torch.tensor([True])}, RewindPoint(1, {"w": torch.ones(1)}, training))
    assert same(Ticket.load(ticket.save(tmp_path / "t")).rewind.training, training)


def test_equal_tickets_give_equal_bytes_whatever_the_order_of_their_names(tmp_path):
    module = network()
    ticket = ticket_of(module, optimizer_state(module), step=9, seed=1, level=2)
    turned = Ticket(
        dict(reversed(ticket.masks.items())),
        RewindPoint(9, {n: t.clone() for n, t in reversed(ticket.rewind.tensors.items())}, ticket.rewind.training),
        {"level": 2, "seed": 1},
    )
    first = ticket.save(tmp_path / "one").read_bytes()
    assert ticket.save(tmp_path / "one").read_bytes() == first
    assert turned.save(tmp_path / "two").read_bytes() == first
    assert Ticket.load(tmp_path / "one").save(tmp_path / "three").read_bytes() == first
    other = Ticket(ticket.masks, ticket.rewind, {"level": 3, "seed": 1})
    assert other.save(tmp_path / "four").read_bytes() != first


def test_masks_that_share_one_storage_are_saved(tmp_path):
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0)}
    masks = M.keep_highest(weights, M.ones(weights), {("a", "b"): 5})  # views of one flat tensor
    back = Ticket.load(Ticket(masks, RewindPoint(0, weights)).save(tmp_path / "t"))
    assert M.digest(back.masks) == M.digest(masks)


def test_channels_last_weights_keep_their_values(tmp_path):
    weight = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    layered = weight.contiguous(memory_format=torch.channels_last)
    back = Ticket.load(Ticket({"w": layered > 0}, RewindPoint(0, {"w": layered})).save(tmp_path / "t"))
    assert torch.equal(back.rewind.tensors["w"], weight)
    assert torch.equal(back.masks["w"], weight > 0)


def test_a_state_that_is_no_primitive_is_refused_with_its_place(tmp_path):
    ticket = Ticket({"w": torch.tensor([True])}, RewindPoint(1, {}, {"schedulers": [{"decay": object()}]}))
    with pytest.raises(ValueError, match=r"^the state at training/schedulers/0/decay is a object, .*rewind to '0it'"):
        ticket.save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_level_and_density_of_a_bare_ticket():
    ticket = Ticket({"w": torch.tensor([True, False, False, False])}, RewindPoint(0, {}))
    assert (ticket.level, ticket.density, ticket.provenance) == (0, 0.25, {})


def test_the_file_is_plain_safetensors_with_masks_weights_and_a_json_header(tmp_path):
    path = ticket_of(network(), level=1).save(tmp_path / "t")
    tensors = safetensors.torch.load_file(path)
    assert {name for name in tensors if name.startswith("mask/")} == {"mask/0.weight", "mask/2.weight"}
    assert set(network().state_dict()) == {name[7:] for name in tensors if name.startswith("rewind/")}
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["ticket"])
    assert header["format"] == "lottery-ticket/1"
    assert header["provenance"] == {"level": 1}


def test_apply_puts_mask_times_weights_and_the_buffers_into_a_module():
    source = network(seed=1)
    source[1].running_mean.fill_(0.75)
    ticket = ticket_of(source)
    target = network(seed=2)
    assert ticket.apply_(target) is target
    state, own = source.state_dict(), target.state_dict()
    for name, mask in ticket.masks.items():
        assert same(own[name], torch.where(mask, state[name], torch.zeros(())))  # +0.0 also for negative weights
    assert all(same(own[name], state[name]) for name in state.keys() - ticket.masks.keys())


def test_a_ticket_is_not_touched_by_the_training_of_the_network_it_was_applied_to():
    source = network(seed=1)
    ticket = ticket_of(source)
    before = {name: tensor.clone() for name, tensor in ticket.rewind.tensors.items()}
    with torch.no_grad():
        for tensor in ticket.apply_(source).state_dict().values():
            tensor.add_(1)
    assert same(ticket.rewind.tensors, before)
    assert ticket.masks["0.weight"].sum() == ticket_of(network(seed=1)).masks["0.weight"].sum()


def test_load_snapshot_never_aliases_and_keeps_the_parameters_themselves():
    module, other = network(seed=1), network(seed=2)
    tensors = snapshot(other)
    addresses = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    load_snapshot(module, tensors)
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == addresses
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())
    assert not {t.data_ptr() for t in tensors.values()} & {t.data_ptr() for t in module.state_dict().values()}
    assert not {t.data_ptr() for t in tensors.values()} & {t.data_ptr() for t in other.state_dict().values()}


def test_for_submodule_gives_the_ticket_of_the_bare_network():
    class Wrapped(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.network = network(seed=seed)
            self.network2 = nn.Linear(2, 2)

    wrapped = Wrapped(1)
    ticket = ticket_of(wrapped, {"optimizers": [1]}, step=3, level=2)
    inner = ticket.for_submodule("network")
    assert set(inner.masks) == {"0.weight", "2.weight"}
    assert (inner.rewind.step, inner.rewind.training, inner.level) == (3, {}, 2)
    bare = inner.apply_(network(seed=5)).state_dict()
    assert same(dict(bare), dict(ticket.apply_(Wrapped(6)).network.state_dict()))
    assert "network.0.weight" in ticket.masks
    with pytest.raises(ValueError, match=r"^no mask below 'net': the ticket has network\.0\.weight, "):
        ticket.for_submodule("net")


def test_write_atomically_replaces_the_whole_file(tmp_path):
    path = tmp_path / "new" / "folder" / "file.bin"
    assert write_atomically(path, b"a" * 1000) == path
    write_atomically(str(path), b"b")
    assert path.read_bytes() == b"b"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_a_writer_that_fails_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path):
    path = write_atomically(tmp_path / "file.bin", b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")
    assert path.read_bytes() == b"old"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.bin", "folder"]


def test_a_bare_networks_ticket_becomes_one_of_the_module_around_it_and_back():
    bare = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    around = nn.ModuleDict({"network": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))})
    ticket = Ticket({"0.weight": torch.rand(4, 3) < 0.5}, RewindPoint(0, dict(bare.state_dict())), {"level": 2})
    outside = ticket.as_submodule("network")
    outside.apply_(around)
    assert torch.equal(around["network"][0].weight, bare[0].weight * ticket.masks["0.weight"])
    assert torch.equal(around["network"][1].weight, bare[1].weight)
    back = outside.for_submodule("network")
    assert (back.masks.keys(), back.rewind.tensors.keys()) == (ticket.masks.keys(), ticket.rewind.tensors.keys())
    assert outside.level == 2
