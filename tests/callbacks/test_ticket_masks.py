"""Masks of a ticket made by hand, what a ticket says of itself, and names that differ by a prefix."""

import copy
import pickle

import numpy as np
import pytest
import torch
from stranger import Blobs, Net, bits, fit_with, half_masks, seeded, ticket_of
from torch import nn

from lottery_callbacks import ApplyTicket, RewindPoint, Ticket
from lottery_callbacks.rewinding import snapshot

KEPT = torch.tensor([[True, False, True], [False, False, True]])


def network(seed=0):
    return seeded(seed, lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))


def with_mask(mask, name="0.weight"):
    return Ticket({name: mask}, RewindPoint(0, snapshot(network())))


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (KEPT.to(torch.uint8) * 255, "uint8 and holds 255"),
        (KEPT.int() * 2, "int32 and holds 2"),
        (KEPT.float() * 0.5, r"float32 and holds 0\.5"),
        (KEPT.double() - 1, r"float64 and holds -1\.0"),
        (KEPT.float() / 0, "float32 and holds inf"),
        (KEPT.numpy() * 3, "holds 3"),
        (KEPT.to_sparse(), "sparse"),
        (KEPT.to("meta"), "on the meta device"),
        ("all", "a str"),
        (None, "a NoneType"),
    ],
    ids=lambda value: "mask" if not isinstance(value, str) else value[:12],
)
def test_a_mask_of_other_values_than_0_and_1_is_refused_by_name(mask, says):
    with pytest.raises(ValueError, match=rf"^the mask of 0\.weight is .*{says}") as error:
        with_mask(mask)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "mask",
    [
        KEPT.to(torch.uint8), KEPT.float(), KEPT.bfloat16(), KEPT.long(), KEPT.numpy(), KEPT.numpy().astype("f8"),
        KEPT.tolist(), KEPT.t().contiguous().t(), (KEPT.to(torch.uint8) * 255).view(torch.bool),
    ],
    ids=["uint8", "float", "bfloat16", "long", "numpy", "numpy f8", "list", "strided", "bytes of 255"],
)  # fmt: skip
def test_a_mask_of_0_and_1_counts_as_its_boolean_form(mask):
    ticket = with_mask(mask)
    assert ticket.masks["0.weight"].dtype == torch.bool
    assert torch.equal(ticket.masks["0.weight"], KEPT)
    assert ticket.density == 0.5
    source, target = network(), network(1)
    ticket.apply_(target)
    assert torch.equal(target[0].weight, torch.where(KEPT, source[0].weight, torch.zeros(())))
    assert bits(ticket.state_dict()) == bits(with_mask(KEPT).state_dict())


def test_an_array_stays_the_callers():
    array = KEPT.numpy().copy()
    ticket = with_mask(array)
    array[:] = True
    assert torch.equal(ticket.masks["0.weight"], KEPT)


def test_a_mask_must_fit_a_tensor_of_the_rewind_point():
    with pytest.raises(ValueError, match=r"^the rewind point has no tensor 0\.wieght, .* it has 0\.weight, 0\.bias"):
        with_mask(KEPT, "0.wieght")
    with pytest.raises(ValueError, match=r"^the mask of 0\.weight is \(3, 2\), and its tensor .* \(2, 3\)$"):
        with_mask(KEPT.t())


def test_a_ticket_without_masks_is_the_dense_network(tmp_path):
    source = network()
    ticket = Ticket({}, RewindPoint(0, snapshot(source)))
    assert ticket.density == 1.0
    back = Ticket.load(ticket.save(tmp_path / "t"))
    assert bits(back.apply_(network(1))) == bits(source)
    assert bits(back.as_submodule("net").for_submodule("net").apply_(network(2))) == bits(source)
    with pytest.raises(ValueError, match=r'under another prefix: .* use ticket\.as_submodule\("net"\)$'):
        ticket.apply_(nn.ModuleDict({"net": network()}))


def test_a_ticket_of_masks_alone_says_so_where_weights_are_needed():
    ticket = Ticket({"0.weight": KEPT}, RewindPoint(0, {}))
    ticket.check(network())
    for use in (lambda: ticket.apply_(network()), ticket.state_dict):
        with pytest.raises(ValueError, match=r"^the ticket holds masks alone"):
            use()


def test_a_ticket_and_a_rewind_point_print_as_one_line():
    module = seeded(0, Net)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in module.named_parameters() if p.ndim == 2}
    masks["net.1.weight"][:6] = False
    ticket = Ticket(masks, RewindPoint(500, snapshot(module), {"optimizers": [torch.ones(10)]}), {"level": 3})
    assert repr(ticket) == (
        "Ticket(level 3, density 0.7273, kept 96 of 132 weights, masks 2, "
        "RewindPoint(step 500, tensors 9, training state: optimizers))"
    )
    assert str(RewindPoint(0, {})) == "RewindPoint(step 0, tensors 0)"
    assert f"{Ticket({}, RewindPoint(0, {}))}".count("\n") == 0


def test_copies_and_pickles_of_a_ticket_are_equal_tickets(tmp_path):
    ticket = with_mask(KEPT)
    expected = ticket.save(tmp_path / "one").read_bytes()
    for other in (pickle.loads(pickle.dumps(ticket)), copy.deepcopy(ticket), copy.copy(ticket)):
        assert other.save(tmp_path / "other").read_bytes() == expected


# ---- prefixes


def test_a_ticket_of_the_module_around_a_network_names_for_submodule():
    source = seeded(0, Net)
    ticket = ticket_of(source, half_masks(source))
    bare = seeded(1, Net).net
    for use in (ticket.check, ticket.apply_):
        with pytest.raises(ValueError, match="prefix") as error:
            use(bare)
        assert str(error.value) == (
            "the ticket is for this network under another prefix: net.1.weight in the ticket is 1.weight in the "
            'network; use ticket.for_submodule("net")'
        )
    ticket.for_submodule("net").apply_(bare)  # the advice works
    with pytest.raises(ValueError, match=r'use ticket\.for_submodule\("net"\)\.as_submodule\("body"\)$'):
        ticket.apply_(nn.ModuleDict({"body": seeded(1, Net).net}))


def test_a_ticket_of_a_bare_network_names_as_submodule(tmp_path):
    source = seeded(0, Net)
    ticket = ticket_of(source, half_masks(source)).for_submodule("net")
    with pytest.raises(ValueError, match=r"1\.weight in the ticket is net\.1\.weight .*as_submodule\(\"net\"\)$"):
        fit_with(tmp_path, seeded(1, Net), Blobs(), ApplyTicket(ticket), max_steps=1)
    ticket.as_submodule("net").apply_(seeded(1, Net))
    more = nn.ModuleDict({"net": seeded(1, Net).net, "head": nn.Linear(5, 2)})
    with pytest.raises(ValueError, match=r"use ticket\.apply_\(module\.net\)$"):  # as_submodule would lack the head
        ticket.apply_(more)
    ticket.apply_(more.net)


def test_other_shapes_below_the_prefix_are_another_architecture():
    source = seeded(0, Net)
    ticket = ticket_of(source, half_masks(source))
    with pytest.raises(ValueError, match=r"^the ticket is for another architecture"):
        ticket.apply_(seeded(1, lambda: Net((6, 13, 5))).net)
    with pytest.raises(ValueError, match=r"^the ticket is for another architecture"):
        ticket.apply_(nn.Sequential(*seeded(1, Net).net, nn.Linear(5, 5)))


def test_for_submodule_takes_the_names_of_a_compiled_or_checkpointed_module():
    source = seeded(0, Net)
    ticket = ticket_of(source, half_masks(source))
    for name in ("net", "_orig_mod.net", "net._orig_mod", "net._checkpoint_wrapped_module"):
        assert list(ticket.for_submodule(name).masks) == ["1.weight", "5.weight"]


def test_numpy_masks_of_a_whole_network_train(tmp_path):
    source = seeded(0, Net)
    masks = {name: np.asarray(mask) for name, mask in half_masks(source).items()}
    ticket = Ticket(masks, RewindPoint(0, snapshot(source)))
    module, *_ = fit_with(tmp_path, seeded(1, Net), Blobs(), ApplyTicket(ticket), max_steps=3)
    for name, mask in masks.items():
        assert not module.get_parameter(name)[~torch.from_numpy(mask)].any()
