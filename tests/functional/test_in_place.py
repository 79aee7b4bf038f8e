"""A network that others are put into is as it was afterwards, or is refused before anything is put in."""

import pytest
import torch
from torch import nn

from lottery_callbacks.functional.in_place import apart, load, preserved, same_draws, tensors_of


class Told(nn.Linear):
    """With a buffer, one that no state dict holds, and an extra state."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def get_extra_state(self):
        return {"told": 1}


def test_tensors_are_the_networks_own_without_extra_state():
    one = Told()
    found = tensors_of(one)
    assert found.keys() == {"weight", "bias", "kept"}
    assert found["weight"] is one.weight


def test_what_lies_in_the_networks_memory_is_copied_and_nothing_else():
    one, other = Told(), torch.zeros(2)
    found = apart(one.state_dict() | {"bias": other}, one)
    assert found.keys() == {"weight", "bias", "kept"}
    assert found["bias"] is other
    load(one, {"weight": torch.full((2, 2), 3.0), "bias": other, "kept": other})
    assert not (found["weight"] == 3).any()
    assert torch.equal(one.weight, torch.full((2, 2), 3.0))
    assert torch.equal(one.hidden, torch.ones(2))


def test_everything_is_back_after_the_block_also_of_a_network_of_buffers_alone():
    one = Told().eval()
    one.weight.grad = gradient = torch.ones(2, 2)
    before, hidden = {name: t.detach().clone() for name, t in tensors_of(one).items()}, one.hidden
    with preserved(one):
        assert one.weight.grad is None
        load(one, {name: t + 1 for name, t in before.items()})
        one.hidden = torch.zeros(2)
        one.kept.fill_(9)
        one.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(one).items())
    assert one.hidden is hidden
    assert one.weight.grad is gradient
    assert not one.training
    bare = nn.Module()
    bare.register_buffer("kept", torch.ones(2))
    with preserved(bare):
        bare.kept.zero_()
    assert bare.kept.tolist() == [1, 1]


@pytest.mark.parametrize("within", [False, True])
def test_what_cannot_be_put_back_is_refused_by_name_and_left_alone(within):
    scripted = torch.jit.script(nn.Linear(2, 2))
    expanded = nn.Linear(2, 2)
    expanded.register_buffer("wide", torch.ones(1).expand(3))
    name = "part." if within else ""
    for part, message in (
        (scripted, f"^{'part' if within else 'the network'} is scripted: give it as it was before torch.jit.script$"),
        (expanded, rf"^{name}wide is expanded, and cannot be written to: make it a tensor of its own by clone\(\)$"),
    ):
        weight = next(part.parameters())
        weight.grad = gradient = torch.ones_like(weight)
        network = nn.ModuleDict({"part": part}) if within else part
        with pytest.raises(ValueError, match=message), preserved(network):
            raise AssertionError("the block has begun")
        assert next(part.parameters()).grad is gradient
    single = nn.Module()
    single.register_buffer("one", torch.ones(()).expand(1))  # no entry is written twice
    with preserved(single):
        pass


def test_draws_are_put_back(global_rng):
    network = nn.Linear(2, 2)
    before = global_rng()
    with same_draws(network):
        torch.rand(3)
    assert global_rng() == before
