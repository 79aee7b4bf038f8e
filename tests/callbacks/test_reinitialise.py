"""`reinitialise` draws all that it says, from the seed alone, or refuses by name and leaves the module as it was."""

import random
from functools import partial

import numpy
import pytest
import torch
import torch.nn.utils.parametrizations as P
from stranger import Blobs, Net, bits, fit_with, raw, seeded, ticket_of
from torch import nn
from torch.nn.utils import parametrize, prune

from lottery_callbacks import ApplyTicket, random_state
from lottery_callbacks.apply_ticket import reinitialise


def layer():
    return nn.Linear(6, 6)


class Symmetric(nn.Module):
    """Without a right inverse."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


class Transposed(nn.Module):
    """What it returns is a view of what is trained."""

    def forward(self, weight):
        return weight.mT

    def right_inverse(self, weight):
        return weight.mT


class Scaled(nn.Module):
    """Has a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight * self.scale


class ScaledAndDrawn(Scaled):
    def reset_parameters(self):
        nn.init.ones_(self.scale)

    def right_inverse(self, weight):
        return weight / self.scale


def under(*steps):
    own = layer()
    for step in steps:
        parametrize.register_parametrization(own, "weight", step())
    return own


DRAWN = {
    "weight_norm": lambda: P.weight_norm(layer()),
    "spectral_norm": lambda: P.spectral_norm(layer()),
    "spectral_norm of a convolution": lambda: P.spectral_norm(nn.Conv2d(6, 6, 3), dim=1),
    "orthogonal": lambda: P.orthogonal(layer(), use_trivialization=False),
    "householder": lambda: P.orthogonal(layer(), orthogonal_map="householder", use_trivialization=False),
    "no right inverse": lambda: under(Symmetric),
    "view": lambda: under(Transposed),
    "own parameter": lambda: under(ScaledAndDrawn),
    "chain": lambda: under(ScaledAndDrawn, Transposed),
    "recurrent": lambda: P.weight_norm(nn.LSTM(6, 6), "weight_hh_l0"),
    "attention": lambda: P.weight_norm(nn.MultiheadAttention(6, 2), "in_proj_weight"),
}


def trained(module):
    """Other values in every parameter and buffer."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.rand_like(tensor.float()))
    return module


@pytest.mark.parametrize("kind", DRAWN)
def test_a_parametrized_layer_gets_the_weights_of_its_seed_whatever_it_held(kind):
    module, names = seeded(0, DRAWN[kind]), [name for name, _ in seeded(0, DRAWN[kind]).named_parameters()]
    objects = [*module.parameters(), *module.buffers()]
    drawn = []
    for seed in (3, 3, 4):
        before = bits(module if "spectral" in kind or len(drawn) == 1 else trained(module))
        reinitialise(module, seed)
        drawn.append(bits(module))
        assert all(drawn[-1][name] != before[name] for name in names) or drawn[-1] == before
        assert all(own.isfinite().all() for own in module.parameters())
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert all(one is other for one, other in zip(objects, [*module.parameters(), *module.buffers()], strict=True))


@pytest.mark.parametrize("wrap", [P.weight_norm, P.spectral_norm, partial(P.orthogonal, use_trivialization=False)])
def test_what_is_drawn_is_what_a_new_layer_holds(wrap):
    """The plain layer's draw, then the parametrization's: as when it was registered after the same seed."""
    module = trained(wrap(layer())) if wrap is not P.spectral_norm else wrap(layer())
    reinitialise(module, 5)
    fresh = seeded(5, lambda: wrap(layer()))
    assert bits(dict(module.named_parameters())) == bits(dict(fresh.named_parameters()))
    torch.testing.assert_close(module.eval().weight, fresh.eval().weight, rtol=1e-2, atol=1e-2)


def test_the_parametrized_control_trains_other_weights_for_another_seed(tmp_path):
    def make():
        module = Net()
        P.weight_norm(module.net[5])
        return module

    ends = []
    for seed in (1, 1, 2):
        masks = {"net.1.weight": torch.arange(72).view(12, 6) % 2 == 0}
        control = ApplyTicket(ticket_of(seeded(0, make), masks), weights="reinit", seed=seed)
        module, *_ = fit_with(tmp_path, seeded(0, make), Blobs(), control, max_steps=1, limit_val_batches=0)
        ends.append(raw(module.net[5].weight))
    assert ends[0] == ends[1] != ends[2]


class Forgets(nn.Module):
    """Its reset_parameters leaves out the class token."""

    def __init__(self):
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.zeros(3)), layer()

    def reset_parameters(self):
        self.inner.reset_parameters()


class DrawsHalf(nn.Linear):
    def reset_parameters(self):
        with torch.no_grad():
            nn.init.normal_(self.weight[:3])
            nn.init.zeros_(self.bias)


class Rescales(nn.Linear):
    """Makes new values of the old ones."""

    def reset_parameters(self):
        nn.init.zeros_(self.bias)
        self.weight.data.mul_(0.5)


class Fails(nn.Linear):
    built = False

    def reset_parameters(self):
        if self.built:
            raise RuntimeError("of two\nlines")
        super().reset_parameters()


def failing():
    module = Fails(6, 6)
    module.built = True
    return module


REFUSED = {
    "orthogonal": (lambda: P.orthogonal(layer()), r"1\.parametrizations\.weight\.original: .*use_trivialization=False"),
    "own parameter": (lambda: under(Scaled), r"1\.parametrizations\.weight\.0\.scale: give the module that owns it"),
    "old weight_norm": (
        lambda: nn.utils.weight_norm(layer()),
        r"1: use torch\.nn\.utils\.parametrizations\.weight_norm",
    ),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(layer()), r"1: use torch\.nn\.utils\.parametrizations\.spec"),
    "prune": (
        lambda: prune.l1_unstructured(layer(), "weight", 0.5),
        r"1: make the masks .* by prune\.remove",
    ),
    "forgotten": (Forgets, r"1\.token: give the module that owns it reset_parameters\(\) that draws it \(Forgets's"),
    "half": (lambda: DrawsHalf(6, 6), r"1\.weight: give the module that owns it reset_parameters\(\) that draws it"),
    "rescaled": (lambda: Rescales(6, 6), r"1\.weight: give the module that owns it reset_parameters\(\) that draws it"),
    "failing": (failing, r"1: Fails\.reset_parameters\(\) failed \(of two lines\)"),
    "lists": (lambda: nn.ParameterList([torch.zeros(2)]), r"1\.0: give the module that owns it reset_parameters\(\)$"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_drawn_is_refused_by_name_and_nothing_changes(kind):
    make, message = REFUSED[kind]
    module = nn.Sequential(layer(), make(), nn.BatchNorm1d(6))
    module[2].running_mean.fill_(3.0)
    before = bits(module)
    storage = [own.data_ptr() for own in module.parameters()]
    torch.manual_seed(8)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"^cannot reinitialise {message}") as refusal:
        reinitialise(module, 1)
    assert "\n" not in str(refusal.value)
    assert bits(module) == before
    assert [own.data_ptr() for own in module.parameters()] == storage
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: nn.Linear(2, 3, device="meta")])
def test_tensors_without_values_are_refused_by_name(make):
    with pytest.raises(ValueError, match=r"^cannot reinitialise 0\.weight, 0\.bias without values: materialise"):
        reinitialise(nn.Sequential(make()), 0)


def test_ordinary_modules_hold_what_their_constructors_draw():
    """Children before parents, from one seed: the bits that each version of this project drew."""
    module = nn.Sequential(nn.BatchNorm1d(6), layer(), nn.Embedding(3, 4, padding_idx=1), nn.GRU(4, 5))
    reinitialise(trained(module), 7)
    torch.manual_seed(7)
    expected = [nn.GRU(4, 5), nn.Embedding(3, 4, padding_idx=1), layer(), nn.BatchNorm1d(6)]
    assert bits(module) == bits(nn.Sequential(*reversed(expected)))


def test_draws_of_numpy_and_python_come_from_the_seed_and_leave_their_generators():
    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))

        def reset_parameters(self):
            self.first = nn.Parameter(torch.from_numpy(numpy.random.randn(4)).float())  # noqa: NPY002
            self.second.data = torch.tensor([random.random()])

    module = Drawn()
    first, drawn = module.first, []
    for seed in (1, 1, 2):
        random.seed(40 + len(drawn))
        numpy.random.seed(40 + len(drawn))  # noqa: NPY002
        before = repr(random_state.collect())
        reinitialise(module, seed)
        drawn.append(bits(module))
        assert repr(random_state.collect()) == before
    assert drawn[0] == drawn[1] != drawn[2]
    assert module.first is first  # the optimizer's


def test_frozen_weights_under_a_hook_and_a_parametrization_stay():
    module = nn.Sequential(nn.utils.weight_norm(layer()), P.weight_norm(layer()), layer())
    module[:2].requires_grad_(False)
    before = bits(module)
    reinitialise(module, 2)
    assert [name for name, digest in bits(module).items() if digest != before[name]] == ["2.weight", "2.bias"]


def test_buffers_in_odd_places_are_let_be():
    module = nn.Sequential(layer(), nn.Module())
    with torch.inference_mode():
        made = torch.ones(3)
    expanded, sparse = torch.ones(1).expand(4), torch.eye(3).to_sparse()
    for name, tensor in (("made", made), ("expanded", expanded), ("sparse", sparse), ("none", None)):
        module[1].register_buffer(name, tensor)
    reinitialise(module, 0)
    assert module[1].made is made
    assert module[1].expanded is expanded
    assert module[1].sparse is sparse


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_seed_gives_the_same_weights_on_a_gpu_in_the_same_memory():
    def make():
        return nn.Sequential(layer(), P.weight_norm(layer()), nn.GRU(6, 6), nn.BatchNorm1d(6))

    here, there = make(), make().cuda()
    places, state = [own.data_ptr() for own in there.parameters()], torch.cuda.get_rng_state()
    for module in (here, there):
        reinitialise(module, 3)
    assert bits(there) == bits(here)
    assert [own.data_ptr() for own in there.parameters()] == places
    assert torch.equal(torch.cuda.get_rng_state(), state)
