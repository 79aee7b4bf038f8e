"""Optimizer state belongs to a parameter's name: in rewind points, in resumed checkpoints, for any order of listing."""

import copy
import random

import lightning.pytorch as L
import pytest
import torch
from stranger import bits, frozen_state, half_masks, quiet, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, Ticket
from lottery_callbacks.optimizer_state import parameter_names, states_by_name

optim, schedulers = torch.optim, torch.optim.lr_scheduler


def loader():
    generator = torch.Generator().manual_seed(4)
    return DataLoader(TensorDataset(torch.randn(48, 6, generator=generator), torch.arange(48) % 6), 4)


def sgd(groups):
    return [optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-3)], []


def adam(groups):
    return [optim.Adam(groups, lr=0.01)], []


def amsgrad(groups):
    """With a schedule that keeps something a group."""
    optimizer = optim.AdamW(groups, lr=0.01, amsgrad=True)
    return [optimizer], [schedulers.ExponentialLR(optimizer, 0.9)]


def named(groups):
    """With the names that torch keeps in a group."""
    return [optim.Adam([group | {"params": list(group["params"].items())} for group in groups], lr=0.01)], []


def two(groups):
    """Two optimizers of two kinds, each of a part of the groups."""
    first = [group for group in groups if group["of"] == 0]
    second = [group for group in groups if group["of"] == 1]
    optimizers = [optim.SGD(first, lr=0.05, momentum=0.9), optim.Adam(second, lr=0.01)]
    return optimizers, [schedulers.LinearLR(optimizers[1], 0.1, 1.0, 9)]


class Layers(L.LightningModule):
    """Four layers of one shape, so that no shape gives a wrong order away; `plan` lists the groups for `make`."""

    def __init__(self, make, plan):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.make, self.plan, self.automatic_optimization = make, plan, False

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.d(self.c(self.b(self.a(batch[0]).relu()).relu()).relu()), batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers(use_pl_optimizer=True) if self.make is two else [self.optimizers()]:
            optimizer.step()
            optimizer.zero_grad()
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.step()

    def configure_optimizers(self):
        own = dict(self.named_parameters())
        groups = [{**settings, "params": {name: own[name] for name in names}} for names, settings in self.plan]
        if self.make is not named:
            groups = [group | {"params": list(group["params"].values())} for group in groups]
        return self.make(groups)


class Automatic(Layers):
    """The same with Lightning's own steps: one optimizer."""

    def __init__(self, make, plan):
        super().__init__(make, plan)
        self.automatic_optimization = True

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.d(self.c(self.b(self.a(batch[0]).relu()).relu()).relu()), batch[1])


PLAN = [
    (["a.weight", "b.weight"], {"lr": 0.03, "weight_decay": 0.1, "of": 0}),
    (["c.weight", "d.weight"], {"lr": 0.01, "weight_decay": 0.0, "of": 1}),
    (["a.bias", "b.bias"], {"lr": 0.02, "weight_decay": 0.2, "of": 0}),
    (["c.bias", "d.bias"], {"lr": 0.04, "weight_decay": 0.3, "of": 1}),
]


def shuffled(plan, seed):
    draw = random.Random(seed)
    turned = [(draw.sample(names, len(names)), settings) for names, settings in plan]
    return draw.sample(turned, len(turned))


class State(L.Callback):
    """What the optimizers hold of each parameter, by name, when the first batch begins; and the number of steps."""

    def __init__(self):
        self.seen, self.steps = None, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.seen is None:
            self.seen = held(trainer.optimizers, pl_module)

    def on_train_batch_end(self, *args):
        self.steps += 1


def held(optimizers, module):
    """Moments and hyperparameters of each parameter, as bits."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        names.get(p, "other"): frozen_state(
            [dict(optimizer.state.get(p, {})), {k: v for k, v in g.items() if k not in ("params", "param_names")}]
        )
        for optimizer in optimizers
        for g in optimizer.param_groups
        for p in g["params"]
    }


def lottery(folder, module, **options):
    imp = IterativeMagnitudePruning(**({"rewind": "5it", "run_dir": folder} | options))
    imp.select(0)
    quiet(folder, [imp], max_steps=12).fit(module, loader())
    return imp.ticket_path(1)


def fit(folder, module, ticket, **options):
    state = State()
    trainer = quiet(folder, [ApplyTicket(ticket), state], **({"max_steps": 12} | options))
    trainer.fit(module, loader())
    return state, module


KINDS = [(sgd, Layers), (sgd, Automatic), (adam, Automatic), (amsgrad, Automatic), (named, Automatic), (two, Layers)]


@pytest.mark.parametrize(("make", "kind"), KINDS, ids=lambda value: value.__name__)
def test_a_rewound_optimizer_of_another_order_trains_to_the_same_bits(tmp_path, make, kind):
    ticket = lottery(tmp_path, seeded(0, lambda: kind(make, PLAN)))
    same, module = fit(tmp_path, seeded(1, lambda: kind(make, PLAN)), ticket)
    assert len(same.seen) == 8
    assert all(len(state) for state, _ in same.seen.values())
    for seed in range(2):
        other, again = fit(tmp_path, seeded(1, lambda seed=seed: kind(make, shuffled(PLAN, seed))), ticket)
        assert other.seen == same.seen
        assert bits(again) == bits(module)


@pytest.mark.parametrize(("make", "kind"), KINDS, ids=lambda value: value.__name__)
def test_a_resumed_optimizer_of_another_order_trains_to_the_same_bits(tmp_path, make, kind):
    ticket = Ticket.load(lottery(tmp_path, seeded(0, lambda: kind(make, PLAN)), rewind="0it"))
    trainer = quiet(tmp_path, [ApplyTicket(ticket)], max_epochs=1)
    trainer.fit(seeded(1, lambda: kind(make, PLAN)), loader())
    trainer.save_checkpoint(tmp_path / "c.ckpt")

    def resumed(plan):
        state, module = State(), kind(make, plan)
        quiet(tmp_path, [ApplyTicket(ticket), state], max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "c.ckpt")
        assert state.steps == 12
        return state.seen, bits(module)

    expected = resumed(PLAN)
    assert all(resumed(shuffled(PLAN, seed)) == expected for seed in range(2))


def renamed(plan, old, new):
    return [([new if name == old else name for name in names], settings) for names, settings in plan]


def without(plan, gone):
    return [([name for name in names if name != gone], settings) for names, settings in plan]


ONE = [(["a.weight", "b.weight", "c.weight"], {}), (["a.bias", "b.bias"], {"lr": 0.02})]
REFUSED = {
    "fewer": (adam, without(ONE, "b.weight"), "has no b.weight, which {} has state of: give it the parameters"),
    "more": (adam, [(["d.weight", *ONE[0][0]], {}), ONE[1]], "has d.weight, which {} has no state of"),
    "others": (adam, renamed(ONE, "c.weight", "d.weight"), "has no c.weight, which {} has state of"),
    "moved": (adam, [(["a.weight", "b.weight"], {}), ([*ONE[1][0], "c.weight"], {})], "has a.weight in another param"),
    "one group": (adam, [(ONE[0][0] + ONE[1][0], {})], "has a.weight in another parameter group than {}"),
    "an empty group": (adam, [*ONE, ([], {})], "has nothing in another parameter group than {}"),
    "kind": (sgd, ONE, "{} holds the state of other optimizers or schedulers: the groups of optimizer 0 .SGD. have"),
    "schedule": (
        lambda groups: ((o := adam(groups)[0]), [schedulers.ExponentialLR(o[0], 0.9)]),
        ONE,
        "{} holds the state of other optimizers or schedulers: 0 schedulers there and 1 now",
    ),
    "number": (
        lambda groups: (adam(groups[:1])[0] + adam(groups[1:])[0], []),
        ONE,
        "{} holds the state of other optimizers or schedulers: 1 optimizers there and 2 now",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_parameters_and_other_optimizers_are_told_from_each_other_before_the_first_step(tmp_path, what):
    make, plan, said = REFUSED[what]
    ticket = Ticket.load(lottery(tmp_path, Layers(adam, ONE)))
    state, before = State(), quiet(tmp_path, [ApplyTicket(ticket)], max_epochs=1)
    before.fit(Layers(adam, ONE), loader())
    before.save_checkpoint(tmp_path / "c.ckpt")
    for source, path in (("the rewind point", None), ("the checkpoint", tmp_path / "c.ckpt")):
        with pytest.raises(ValueError, match=said.format(source)) as refusal:
            quiet(tmp_path, [ApplyTicket(ticket), state], max_epochs=2).fit(
                Layers(make, plan), loader(), ckpt_path=path
            )
        assert "\n" not in str(refusal.value)
        assert str(refusal.value).endswith("rewind to '0it'" if path is None else "start without ckpt_path")
    assert (state.seen, state.steps) == (None, 0)


def test_a_schedule_of_another_kind_is_refused_not_loaded(tmp_path):
    ticket = lottery(tmp_path, Layers(amsgrad, PLAN))

    def cosine(groups):
        optimizer = amsgrad(groups)[0][0]
        return [optimizer], [schedulers.CosineAnnealingLR(optimizer, 9)]

    with pytest.raises(ValueError, match=r"scheduler 0 \(CosineAnnealingLR\) has T_max, eta_min, which is not in the"):
        fit(tmp_path, Layers(cosine, PLAN), ticket)


def test_a_list_that_may_go_by_group_is_refused_only_where_groups_change_places(tmp_path):
    class PerGroup(schedulers.ExponentialLR):
        def __init__(self, optimizer):
            self.factors = [1.0, 0.9, 0.8, 0.7]
            super().__init__(optimizer, 0.9)

    def make(groups):
        optimizer = optim.Adam(groups)
        return [optimizer], [PerGroup(optimizer)]

    ticket = lottery(tmp_path, Layers(make, PLAN))
    fit(tmp_path, Layers(make, PLAN), ticket)
    with pytest.raises(ValueError, match=r"scheduler 0 \(PerGroup\) keeps factors, which may go by parameter group"):
        fit(tmp_path, Layers(make, PLAN[::-1]), ticket)


def test_nested_schedules_of_functions_a_group_follow_their_groups(tmp_path):
    def make(groups):
        optimizer = optim.SGD(groups, momentum=0.9)
        powers = [lambda step, power=group["power"]: power**step for group in groups]
        parts = [schedulers.LambdaLR(optimizer, powers), schedulers.LinearLR(optimizer, 0.5, 1.0, 5)]
        return [optimizer], [schedulers.SequentialLR(optimizer, parts, [7])]

    plan = [(["a.weight"], {"lr": 0.1, "power": 0.9}), (["b.weight", "c.weight"], {"lr": 0.01, "power": 0.8})]
    ticket = lottery(tmp_path, Layers(make, plan))
    same, other = (fit(tmp_path, seeded(1, lambda p=p: Layers(make, p)), ticket) for p in (plan, plan[::-1]))
    assert other[0].seen == same[0].seen
    assert bits(other[1]) == bits(same[1])


def test_a_file_without_names_goes_by_position_and_refuses_other_shapes_by_name(tmp_path):
    whole = Ticket.load(lottery(tmp_path, Layers(adam, PLAN)))
    old = copy.deepcopy(whole)
    del old.rewind.training["parameters"]
    same, again = (
        fit(tmp_path, Layers(adam, PLAN), ticket) for ticket in (whole, Ticket.load(old.save(tmp_path / "o")))
    )
    assert again[0].seen == same[0].seen
    assert bits(again[1]) == bits(same[1])
    turned = [(["a.bias", "b.weight"], {}), (["a.weight", "b.bias"], {}), *PLAN[1::2]]
    mixed = [(["a.weight", "b.weight"], {}), (["a.bias", "b.bias"], {}), *PLAN[1::2]]
    ticket = Ticket.load(lottery(tmp_path / "mixed", Layers(adam, mixed)))
    del ticket.rewind.training["parameters"]
    with pytest.raises(ValueError, match=r"has state of shape \(6, 6\) for a\.bias, which is \(6,\) now"):
        fit(tmp_path, Layers(adam, turned), ticket)
    with pytest.raises(ValueError, match=r"has groups of 2, 2, 2 parameters, and the rewind point of 2, 2, 2, 2"):
        fit(tmp_path, Layers(adam, mixed[:3]), ticket)


def test_a_checkpoint_without_names_resumes_as_before(tmp_path):
    ticket = Ticket.load(lottery(tmp_path, Layers(adam, PLAN)))
    trainer = quiet(tmp_path, [ApplyTicket(ticket)], max_epochs=1)
    trainer.fit(Layers(adam, PLAN), loader())
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert checkpoint.pop("optimizer_parameters") == [[names for names, _ in PLAN]]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    states = [State(), State()]
    for state, name in zip(states, ("new.ckpt", "old.ckpt"), strict=True):
        callbacks = [ApplyTicket(ticket), state]
        quiet(tmp_path, callbacks, max_epochs=2).fit(Layers(adam, PLAN), loader(), ckpt_path=tmp_path / name)
    assert states[0].seen == states[1].seen


def test_parameters_outside_the_module_go_by_their_order(tmp_path):
    class Outside(Layers):
        def configure_optimizers(self):
            self.extra = [torch.ones(6, requires_grad=True), torch.ones(2, requires_grad=True)][: self.plan]
            own = [*self.parameters()] if self.plan else [*self.parameters()][::-1]
            return optim.Adam([self.extra[0], *own, *self.extra[1:]] if self.extra else own)

    ticket = lottery(tmp_path, Outside(None, 2))
    assert Ticket.load(ticket).rewind.training["parameters"][0][0][::9] == [
        "parameter 0 outside the module",
        "parameter 1 outside the module",
    ]
    state, _ = fit(tmp_path, Outside(None, 2), ticket)
    assert len(state.seen) == 9  # 8 of the module
    with pytest.raises(ValueError, match="has no parameter 1 outside the module, which the rewind point has state of"):
        fit(tmp_path, Outside(None, 1), ticket)


def test_learning_rates_of_fine_tuning_go_with_their_groups(tmp_path):
    ticket = lottery(tmp_path, Layers(two, PLAN), rewind="0it", retrain="fine_tune")
    rates = [
        {name: settings["lr"] for name, (_, settings) in fit(tmp_path, Layers(two, plan), ticket)[0].seen.items()}
        for plan in (PLAN, PLAN[::-1])
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0].values())) == 4
    with pytest.raises(ValueError, match=r"the learning rates of \[2, 2\] parameter groups, .* have \[2, 1\]"):
        fit(tmp_path, Layers(two, PLAN[:3]), ticket)


@pytest.mark.parametrize("seed", range(8))
def test_any_reordering_gives_each_parameter_its_own_state(seed):
    draw = random.Random(seed)
    module = seeded(seed, lambda: nn.ModuleDict({letter: nn.Linear(3, 3) for letter in "abcdef"}))
    own, makes = dict(module.named_parameters()), [sgd, adam, amsgrad]

    def build(plans):
        made = [make([{"params": [own[n] for n in names], **g} for names, g in plan]) for make, plan in plans]
        return [o for optimizers, _ in made for o in optimizers], [s for _, of_all in made for s in of_all]

    names = draw.sample(list(own), len(own))
    cuts = sorted(draw.sample(range(1, 12), 5))
    pieces = [names[i:j] for i, j in zip([0, *cuts], [*cuts, 12], strict=True)]
    plans = [
        (make, [(pieces[2 * i], {"lr": 0.1 + i}), (pieces[2 * i + 1], {"lr": 0.2 + i})]) for i, make in enumerate(makes)
    ]
    optimizers, schedules = build(plans)
    for parameter in own.values():
        parameter.grad = torch.randn(parameter.shape)
    for each in (*optimizers, *schedules):
        each.step()
    saved = [each.state_dict() for each in optimizers], [each.state_dict() for each in schedules]
    others, other_schedules = build([(make, shuffled(plan, seed)) for make, plan in plans])
    there = parameter_names(optimizers, module)
    states, of_schedules = states_by_name(others, other_schedules, module, *saved, there)
    for each, state in zip((*others, *other_schedules), (*states, *of_schedules), strict=True):
        each.load_state_dict(state)
    assert held(others, module) == held(optimizers, module)
    rates = [
        {frozenset(names): rate for names, rate in zip(groups, schedule.get_last_lr(), strict=True)}
        for groups, schedule in ((there[2], schedules[0]), (parameter_names(others, module)[2], other_schedules[0]))
    ]
    assert rates[0] == rates[1]


def test_masks_stay_where_the_reordered_state_goes(tmp_path):
    module = Layers(adam, PLAN)
    ticket = Ticket.load(lottery(tmp_path, module))
    ticket = Ticket(half_masks(module), ticket.rewind, {"level": 1})
    _, trained = fit(tmp_path, Layers(adam, shuffled(PLAN, 2)), ticket)
    own = dict(trained.named_parameters())
    assert all(not own[name][~mask].any() for name, mask in ticket.masks.items())
