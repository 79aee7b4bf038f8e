"""The names of random masks: one each, whoever asks."""

from functools import partial

import pytest
import torch
from stranger import Net, seeded, ticket_of

from lottery_callbacks import ApplyTicket
from lottery_callbacks.functional import masks as M


@pytest.fixture
def ticket():
    module = seeded(1, Net)
    masks = {name: torch.rand(p.shape) < 0.4 for name, p in module.named_parameters() if p.ndim == 2}
    return ticket_of(module, masks)


def test_each_name_draws_what_its_former_name_drew(ticket):
    generator = partial(torch.Generator().manual_seed, 7)
    drawn = {
        name: M.digest(ApplyTicket(ticket, mask=name, seed=7).masks) for name in ("layerwise_random", "global_random")
    }
    assert drawn["layerwise_random"] == M.digest(M.shuffled(ticket.masks, generator()))
    assert drawn["global_random"] == M.digest(M.random_like(ticket.masks, generator()))


def test_layerwise_keeps_the_counts_of_layers_and_global_those_of_the_network_alone(ticket):
    own = M.kept(ticket.masks)
    assert all(M.kept(ApplyTicket(ticket, mask="layerwise_random", seed=s).masks) == own for s in range(4))
    counts = [M.kept(ApplyTicket(ticket, mask="global_random", seed=s).masks) for s in range(4)]
    assert all(sum(count.values()) == sum(own.values()) for count in counts)
    assert any(count != own for count in counts)


def test_shuffled_still_works_and_says_its_new_name(ticket):
    with pytest.warns(FutureWarning, match='mask="shuffled" is deprecated .* write mask="layerwise_random"') as told:
        old = ApplyTicket(ticket, mask="shuffled", seed=3)
    assert told[0].filename == __file__
    new = ApplyTicket(ticket, mask="layerwise_random", seed=3)
    assert old.mask == new.mask == "layerwise_random"
    assert M.digest(old.masks) == M.digest(new.masks)


def test_random_is_refused_in_one_line_that_names_both_and_says_which_it_was(ticket):
    with pytest.raises(ValueError, match='mask="random" is ambiguous') as refusal:
        ApplyTicket(ticket, mask="random")
    line = str(refusal.value)
    assert "\n" not in line
    assert '"global_random" (as many weights anywhere in the network, what "random" meant here)' in line
    assert '"layerwise_random"' in line
