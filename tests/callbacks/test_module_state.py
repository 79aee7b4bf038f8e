"""Modules with caches, observers, expanded buffers and extra state: what is rewound, and what is refused."""

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.ao.quantization as Q
from stranger import frozen_state, quiet, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import ApplyTicket, GradualPruning, IterativeMagnitudePruning, Pruning, RewindPoint, Ticket
from lottery_callbacks.rewinding import snapshot, to_cpu

schedulers = torch.optim.lr_scheduler


def loader(shuffle=False):
    generator = torch.Generator().manual_seed(4)
    return DataLoader(TensorDataset(torch.randn(24, 6, generator=generator), torch.arange(24) % 6), 4, shuffle)


class Base(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.build()

    def build(self):
        pass

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), lr=0.1)


class Grows(Base):
    """A persistent buffer that is one longer after each step."""

    def build(self):
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        if self.training:
            self.seen = torch.cat([self.seen, x.detach().mean().view(1)])
        return self.layer(x)


class Resizes(Base):
    """A buffer that its owner resizes in place."""

    def build(self):
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen.resize_(len(self.seen) + 1).fill_(float(x[0, 0]))
        return self.layer(x)


class Expanded(Base):
    def build(self):
        self.register_buffer("scale", torch.full((1,), 2.0).expand(6))
        self.register_buffer("cache", torch.ones(1).expand(6), persistent=False)

    def forward(self, x):
        return self.layer(x * self.scale * self.cache)


class Comes(Base):
    """None until the first step."""

    def build(self):
        self.register_buffer("mean", None)

    def forward(self, x):
        if self.training and self.mean is None:
            self.mean = x.detach().mean(0)
        return self.layer(x if self.mean is None else x - self.mean)


class Goes(Base):
    """A tensor until the second step."""

    def build(self):
        self.register_buffer("first", torch.ones(6))
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        if self.first is not None:
            x = x * self.first
        if self.steps > 1:
            self.first = None
        return self.layer(x)


class Registers(Base):
    """Its forward registers a persistent buffer."""

    def forward(self, x):
        if not hasattr(self, "mean"):
            self.register_buffer("mean", x.detach().mean(0))
        return self.layer(x - self.mean)


class Deletes(Base):
    def build(self):
        self.register_buffer("first", torch.full((6,), 3.0))

    def forward(self, x):
        if hasattr(self, "first"):
            x = x + self.first
            del self.first
        return self.layer(x)


class Complex(Base):
    def build(self):
        self.register_buffer("phase", torch.ones(6, dtype=torch.complex64).mul_(1 + 2j).conj())

    def forward(self, x):
        if self.training:
            self.phase = self.phase * 1j
        return self.layer(x + self.phase.real)


class Observed(Base):
    """Quantisation-aware: observers' buffers get their shape in the first forward."""

    def build(self):
        network = nn.Sequential(Q.QuantStub(), nn.Linear(6, 6), Q.DeQuantStub()).train()
        network.qconfig = Q.get_default_qat_qconfig("fbgemm")
        self.layer = Q.prepare_qat(network)


class Validated(Base):
    """Each forward, also that of a validation in inference mode, makes its buffers again."""

    def forward(self, x):
        self.register_buffer("scale", torch.full((6,), 1.5))
        self.register_buffer("cache", torch.ones(6), persistent=False)
        return self.layer(x * self.scale * self.cache)


class Cached(Base):
    def build(self):
        self.register_buffer("cache", torch.zeros(0), persistent=False)
        self.register_buffer("later", None, persistent=False)

    def forward(self, x):
        if len(self.cache) < len(x):
            self.cache = torch.ones(len(x))
            self.later = torch.ones(3)
        return self.layer(x * self.cache[: len(x), None])


class Frozen(Base):
    """A parameter of one place in memory, that nothing trains."""

    def build(self):
        self.scale = nn.Parameter(torch.full((1,), 2.0).expand(6), requires_grad=False)

    def forward(self, x):
        return self.layer(x * self.scale)


class Extra(Base):
    """State that is neither parameter nor buffer."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.state = {"calls": 0, "sum": torch.zeros(2), "names": ["a", ("b", None)]}

        def get_extra_state(self):
            return self.state

        def set_extra_state(self, state):
            self.state = state

    def build(self):
        self.counter = self.Counter()

    def forward(self, x):
        if self.training:
            self.counter.state["calls"] += 1
            self.counter.state["sum"] += x.detach().sum()
        return self.layer(x)


STRANGE = [
    Grows, Resizes, Expanded, Comes, Goes, Registers, Deletes, Complex, Observed, Validated, Cached, Frozen, Extra,
]  # fmt: skip


class Seen(L.Callback):
    """The persistent state at step `at`, before the batch after it."""

    def __init__(self, at):
        self.at, self.state, self.steps = at, None, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.state is None and trainer.global_step == self.at:
            state = {name: value for name, value in pl_module.state_dict().items() if name[:5] != "layer"}
            self.state = frozen_state(
                to_cpu({n: v.resolve_conj() if torch.is_tensor(v) else v for n, v in state.items()})
            )
        self.steps += 1


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("new", [False, True], ids=["same module", "new module"])
@pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)
def test_every_level_begins_with_the_state_of_the_rewind_point(tmp_path, make, new, at):
    imp, module, states = IterativeMagnitudePruning(run_dir=tmp_path, rewind=f"{at}it"), seeded(0, make), []
    for level in imp.levels(2):
        module = seeded(level.number, make) if new and level.number else module
        seen = Seen(at)
        quiet(level.run_dir, [imp, seen], max_epochs=1).fit(module, loader())
        quiet(level.run_dir, []).validate(module, loader(), verbose=False)
        states.append(seen.state)
    fresh = seeded(7, make)
    quiet(tmp_path, [ApplyTicket(imp.ticket_path(2)), seen := Seen(at)], max_epochs=1).fit(fresh, loader())
    assert states == [states[0]] * 3
    assert seen.state == states[0]
    assert states[0] is not None


def refused(make, said, *callbacks):
    seen = Seen(0)
    with pytest.raises(ValueError, match=said) as refusal:
        quiet(".", [*callbacks, seen], max_epochs=1).fit(make(), loader())
    assert "\n" not in str(refusal.value)
    assert seen.steps == 0


def holding(name, make, buffer=True):
    class Holds(Base):
        def build(self):
            self.register_buffer(name, make()) if buffer else self.register_parameter(name, make())

    return Holds


def in_inference_mode():
    with torch.inference_mode():
        return nn.Parameter(torch.ones(6))


class Lazy(Base):
    def build(self):
        self.rest = nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.LazyLinear(3))


REFUSED = {
    "sparse": (
        holding("graph", lambda: torch.eye(3).to_sparse()),
        r"^graph \(sparse_coo\) is of a kind that no ticket",
    ),
    "csr": (holding("graph", lambda: torch.eye(3).to_sparse_csr()), r"^graph \(sparse_csr\) is of a kind"),
    "quantised": (
        holding("table", lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
        r"^table \(qint8\) is of a kind that no ticket holds: make it a dense tensor, or a buffer with pers",
    ),
    "nested": (
        holding("ragged", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        r"^ragged \(nested\) is",
    ),
    "complex128": (
        holding("phase", lambda: torch.ones(3, dtype=torch.complex128)),
        r"^phase \(complex128\) is of a kind",
    ),
    "expanded": (
        holding("gain", lambda: nn.Parameter(torch.ones(1).expand(6)), False),
        r"^gain is expanded, .* clone\(",
    ),
    "inference": (
        holding("gain", in_inference_mode, False),
        r"^gain is made in inference mode: build the module outside",
    ),
    "lazy": (Lazy, r"^rest\.1\.weight, rest\.1\.bias.* run the module on one batch before"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_rewind_point_holds_is_refused_by_name_before_the_first_step(tmp_path, what):
    make, said = REFUSED[what]
    ticket = Ticket({"layer.weight": torch.rand(6, 6) > 0.5}, RewindPoint(0, snapshot(Base())), {"level": 1})
    refused(make, said, IterativeMagnitudePruning(run_dir=tmp_path, rewind="3it"))
    refused(make, said, ApplyTicket(ticket))
    with pytest.raises(ValueError, match=said):
        RewindPoint.of(make())


@pytest.mark.parametrize("what", ["sparse", "quantised", "nested", "complex128"])
def test_the_same_kinds_are_left_alone_in_a_cache(tmp_path, what):
    tensor = next(REFUSED[what][0]().buffers())

    class Holds(Base):
        def build(self):
            self.register_buffer("cache", tensor, persistent=False)

    imp, module = IterativeMagnitudePruning(run_dir=tmp_path), Holds()
    for level in imp.levels(1):
        quiet(level.run_dir, [imp], max_epochs=1).fit(module, loader())
    assert module.cache is tensor
    assert set(Ticket.load(imp.ticket_path(1)).rewind.tensors) == {"layer.weight", "layer.bias"}


def test_parameters_of_another_shape_and_buffers_of_other_names_are_another_architecture():
    class Other(Base):
        def build(self):
            self.layer = nn.Linear(6, 5)

    point = RewindPoint.of(Base())
    with pytest.raises(ValueError, match=r"another architecture: layer\.weight is \(6, 6\) in the ticket and \(5, 6\)"):
        point.load_(Other())
    with pytest.raises(ValueError, match=r"seen is absent in the ticket and \(0,\) in the network"):
        point.load_(Grows())
    with pytest.raises(ValueError, match=r"seen is \(0,\) in the ticket and absent in the network"):
        RewindPoint.of(Grows()).load_(Base())
    tracking, without = nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    for one, other in ((tracking, without), (without, tracking)):
        with pytest.raises(ValueError, match=r"another architecture: running_mean"):
            RewindPoint.of(one).load_(other)
    assert without.running_mean is None


def test_extra_state_goes_through_files_and_submodules_without_being_shared(tmp_path):
    source = Extra()
    source.counter.state |= {"calls": 5, "number": np.float32(0.5)}
    whole = Ticket({"layer.weight": torch.ones(6, 6) > 0}, RewindPoint.of(source), {})
    captured = frozen_state(whole.rewind.training["module"]["extra_state"]["counter._extra_state"])
    source.counter.state["sum"] += 1
    ticket = Ticket.load(whole.as_submodule("inner").save(tmp_path / "t")).for_submodule("inner")
    for target in (Extra(), Extra()):
        ticket.apply_(target)
        assert frozen_state(target.counter.state) == captured
        assert (target.counter.state["calls"], type(target.counter.state["number"])) == (5, float)
        target.counter.state["sum"] += 1  # the next one gets its own
    with pytest.raises(ValueError, match=r"the ticket holds counter\._extra_state, which the network has no place for"):
        ticket.apply_(Base())


def test_extra_state_that_is_no_primitive_is_named():
    source = Extra()
    source.counter.state = object()
    with pytest.warns(UserWarning, match=r"cannot hold the state of counter\._extra_state: it is not rewound"):
        assert RewindPoint.of(source).training == {}


class Sees:
    """A function with an attribute, which LambdaLR keeps in its state."""

    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return np.float32(0.9) ** step


def scheduled(value, optimizer=torch.optim.SGD):
    class Scheduled(Base):
        def configure_optimizers(self):
            made = optimizer(self.parameters(), lr=0.1)
            return [made], [{"scheduler": schedulers.LambdaLR(made, Sees(value)), "interval": "step"}]

    return Scheduled


def test_a_schedule_that_no_file_holds_is_refused_before_the_first_step_of_a_later_rewind(tmp_path):
    said = r"^the state at training/schedulers/0/lr_lambdas/0/value is a object, .*rewind to '0it'"
    refused(scheduled(object()), said, IterativeMagnitudePruning(run_dir=tmp_path / "a", rewind="3it"))
    imp = IterativeMagnitudePruning(run_dir=tmp_path / "b")
    for level in imp.levels(1):
        quiet(level.run_dir, [imp], max_epochs=1).fit(scheduled(object())(), loader())
    assert imp.ticket_path(2).exists()


def test_numbers_of_numpy_become_numbers(tmp_path):
    imp = IterativeMagnitudePruning(run_dir=tmp_path, rewind="3it")
    for level in imp.levels(1):
        quiet(level.run_dir, [imp], max_epochs=1).fit(scheduled(np.int64(3))(), loader())
    [state] = Ticket.load(imp.ticket_path(1)).rewind.training["schedulers"]
    assert state["lr_lambdas"] == [{"value": 3}]
    assert type(state["_last_lr"][0]) is float


def test_optimizer_state_that_no_file_holds_is_refused_at_capture(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["note"] = object()
            return loss

    imp, seen = IterativeMagnitudePruning(run_dir=tmp_path, rewind="3it"), Seen(0)
    with pytest.raises(ValueError, match=r"^the state at training/optimizers/0/state/0/note is a object"):
        quiet(tmp_path, [imp, seen], max_epochs=1).fit(scheduled(1, Odd)(), loader())
    assert seen.steps == 3


def test_a_ticket_found_within_a_fit_applies_to_a_new_module_too():
    module = seeded(0, Observed)
    pruning = GradualPruning(0.5, begin="1it", end="4it", every="1it")
    quiet(".", [pruning], max_epochs=1).fit(module, loader())
    fresh = pruning.ticket(module).apply_(seeded(1, Observed))
    assert frozen_state(dict(fresh.state_dict())) == frozen_state(dict(module.state_dict()))


@pytest.mark.parametrize("make", [Validated, Expanded], ids=lambda make: make.__name__)
def test_a_score_of_batches_leaves_buffers_that_cannot_be_written_to(tmp_path, make):
    imp, module = IterativeMagnitudePruning(run_dir=tmp_path, pruning=Pruning(score="snip")), make()
    for level in imp.levels(1):
        quiet(level.run_dir, [imp], max_epochs=1).fit(module, loader(), loader())
    assert imp.ticket_path(2).exists()
