"""Networks under the wrappers of torch and Lightning go by the plain network's names, in tickets and measurements."""

import datetime

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from stranger import Blobs, Net, bits, fit_with, half_masks, quiet, seeded, ticket_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from lottery_callbacks import ApplyTicket, Pruning, RewindPoint, Ticket
from lottery_callbacks.foreign import plain
from lottery_callbacks.functional.curvature import Curvature
from lottery_callbacks.functional.hidden_units import permutation_groups
from lottery_callbacks.functional.narrowing import narrowed
from lottery_callbacks.functional.random_plane import random_plane
from lottery_callbacks.names import canonical, computed_from, further_names, named_buffers, named_parameters, owners
from lottery_callbacks.rewinding import snapshot


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    wait = datetime.timedelta(seconds=30)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=wait)
    yield
    torch.distributed.destroy_process_group()


def network(seed=0):
    """A tied weight, buffers, and a submodule of its own called `module`."""

    def make():
        layers = {"module": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "again": nn.Linear(4, 4, bias=False)}
        net = nn.Sequential()
        for name, layer in layers.items():
            net.add_module(name, layer)
        net.again.weight = net.module.weight
        return net

    return seeded(seed, make)


def checkpointed(module):
    apply_activation_checkpointing(module, check_fn=lambda part: isinstance(part, nn.Linear | nn.BatchNorm1d))
    return module


def fabric(module):
    return Fabric(accelerator="cpu", devices=1).setup_module(module)


def fabric_ddp(module):
    """As Fabric's strategy for several processes: it keeps the network a second time, without DDP."""
    return _FabricModule(DistributedDataParallel(module), Fabric(accelerator="cpu", devices=1).strategy, module)


def compiled(module):
    return torch.compile(module, backend="eager")


WAYS = {
    "compile": [compiled],
    "ddp": [DistributedDataParallel],
    "data parallel": [DataParallel],
    "averaged": [AveragedModel],
    "checkpointing": [checkpointed],
    "fabric": [fabric],
    "fabric with ddp": [fabric_ddp],
    "compile, ddp": [compiled, DistributedDataParallel],
    "ddp, compile": [DistributedDataParallel, compiled],
    "compile, fabric": [compiled, fabric],
    "fabric, compile": [fabric, compiled],
    "checkpointing, compile, fabric": [checkpointed, compiled, fabric],
    "checkpointing, ddp, averaged": [checkpointed, DistributedDataParallel, AveragedModel],
}


def wrap(module, way):
    for wrapper in WAYS[way]:
        module = wrapper(module)
    return module


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapped_network_has_the_plain_names_and_trains_the_plain_ticket(way):
    dense, around = network(), wrap(network(), way)
    assert list(named_parameters(around)) == [name for name, _ in dense.named_parameters()]
    assert list(named_buffers(around)) == [name for name, _ in dense.named_buffers()]
    assert further_names(around) == further_names(dense) == {"again.weight"}
    assert {canonical(key, around) for key in around.state_dict()} - {"n_averaged"} == set(dense.state_dict())
    assert [type(part) for part in owners(around, named_parameters(around)["module.weight"])] == [nn.Linear] * 2
    assert list(Pruning().prunable(around)) == list(Pruning().prunable(dense)) == ["module.weight"]
    keys = list(around.state_dict())
    source = network(1)
    ticket = Ticket({"module.weight": torch.eye(4) > 0}, RewindPoint(0, snapshot(source)))
    assert ticket.apply_(around) is around
    assert list(around.state_dict()) == keys
    expected = bits(ticket.apply_(network(2)))
    assert bits({**named_parameters(around), **named_buffers(around)}) == {
        name: value for name, value in expected.items() if name != "again.weight"
    }
    back = Ticket(ticket.masks, RewindPoint(0, snapshot(around))).apply_(network(3))  # found on the wrapped one
    assert bits(back) == expected


@pytest.mark.parametrize("way", WAYS)
def test_wrappers_deep_inside_a_module_are_seen_too(way):
    class Holder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.parts = nn.ModuleList([inner])

    names = list(named_parameters(Holder(wrap(network(), way))))
    assert names == [name for name, _ in Holder(network()).named_parameters()]


def test_names_that_only_look_like_a_wrappers_stay():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self._forward_module = nn.Linear(2, 2)
            self.module = nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)})
            self.register_buffer("n_averaged", torch.zeros(1))

    own = Own()
    raw = [name for name, _ in own.named_parameters()]
    for module in (own, DataParallel(own), AveragedModel(own), torch.compile(own)):
        assert list(named_parameters(module)) == raw
        assert list(named_buffers(module)) == ["n_averaged"]
    ticket = Ticket({raw[0]: torch.eye(2) > 0}, RewindPoint(0, snapshot(own)))
    assert int((ticket.apply_(DataParallel(Own())).module._forward_module.weight != 0).sum()) == 2


def test_parametrised_tensors_keep_their_names_and_say_what_they_make():
    layer = nn.Sequential(weight_norm(nn.Linear(3, 2)), spectral_norm(nn.Linear(2, 2)))
    names = list(named_parameters(torch.compile(layer)))
    assert names == [name for name, _ in layer.named_parameters()]
    made = {name: computed_from(name) for name in names if computed_from(name)}
    assert made == {
        "0.parametrizations.weight.original0": "0.weight",
        "0.parametrizations.weight.original1": "0.weight",
        "1.parametrizations.weight.original": "1.weight",
    }
    dense = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    ticket = Ticket({"0.weight": torch.ones(2, 3) > 0}, RewindPoint(0, snapshot(dense)))
    with pytest.raises(ValueError, match=r"^0\.weight is parametrised in the network alone, as 0\.param"):
        ticket.apply_(layer)
    found = Ticket({names[2]: torch.ones(2, 3) > 0}, RewindPoint(0, snapshot(layer)))
    with pytest.raises(ValueError, match=r"^0\.weight is parametrised in the ticket alone"):
        found.check(dense)


def test_a_lightning_module_around_a_wrapped_network_trains_a_ticket_of_the_plain_one(tmp_path):
    class Parallel(Net):
        def __init__(self):
            super().__init__()
            self.net = DataParallel(self.net)

    source = seeded(0, Net)
    ticket = ticket_of(source, half_masks(source))
    around, *_ = fit_with(tmp_path, seeded(1, Parallel), Blobs(), ApplyTicket(ticket), max_steps=4, seed=3)
    dense, *_ = fit_with(tmp_path, seeded(1, Net), Blobs(), ApplyTicket(ticket), max_steps=4, seed=3)
    assert bits(named_parameters(around)) == bits(named_parameters(dense))
    trainer = quiet(tmp_path, [ApplyTicket(ticket)], max_steps=2)
    trainer.fit(torch.compile(seeded(2, Parallel), backend="eager"), Blobs())


def test_state_dicts_of_averaged_networks_read_as_the_plain_one():
    dense = network()
    for way in ("averaged", "checkpointing, ddp, averaged", "compile, ddp"):
        assert bits(plain(wrap(network(), way).state_dict())[0]) == bits(dense)
    assert bits(plain(DistributedDataParallel(AveragedModel(network())).state_dict())[0]) == bits(dense)


def layers(seed=0):
    return seeded(seed, lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))


@pytest.mark.parametrize("way", ["compile", "data parallel", "checkpointing", "fabric", "fabric with ddp"])
def test_measurements_take_the_masks_of_a_plain_ticket_and_give_the_plain_results(way):
    masks = {"0.weight": torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) > 0.5}
    images, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 2, 0, 1])
    found = []
    for module in (layers(), wrap(layers(), way)):
        plane = random_plane(module, torch.Generator().manual_seed(0), masks)
        state = {canonical(name, module): tensor for name, tensor in plane.at(0.3, -0.2).items()}
        hessian = Curvature(module, [(images, labels)], masks=masks)
        column = torch.eye(len(hessian._kept))[:, :3]
        found.append((bits(state), hessian.sizes, hessian @ column))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2])
    assert bits(layers()) != found[0][0]


@pytest.mark.parametrize("way", ["data parallel", "fabric", "compile, ddp", "averaged"])
def test_hidden_units_are_cut_under_any_wrapper(way):
    dense, around = layers(), wrap(layers(), way)
    masks = {"0.weight": torch.arange(6).reshape(6, 1).expand(6, 4) > 2}
    assert permutation_groups(around) == permutation_groups(dense)
    example = torch.randn(2, 4)
    assert bits(narrowed(around, masks, example)[0]) == bits(narrowed(dense, masks, example)[0])
