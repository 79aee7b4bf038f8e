"""Heavy-tailed noise: the bits of a loop by hand, on the right layers, and under masks."""

from functools import partial

import lightning.pytorch as L
import pytest
import torch
from noisy_fits import KINDS, LAYERS, SGD, Heavy, Noise, Still, Wide, fit, moved
from stranger import bits, half_masks, make_plain, masked, raw, seeded, ticket_of
from torch import nn

from lottery_callbacks import ApplyTicket, GradualPruning, IterativeMagnitudePruning, Pruning
from lottery_callbacks.heavy_tailed_noise import HeavyTailedNoise
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier


class ByHand(L.Callback):
    """Adds the same noise by itself, where Lightning has made a step."""

    def __init__(self, kind, alpha=1.6, scale=0.02, layers=LAYERS):
        self.kind, self.alpha, self.scale, self.layers = kind, alpha, scale, layers

    def on_train_start(self, trainer, pl_module):
        self.streams = {name: Noise(pl_module.get_parameter(name), name, self.kind, self.alpha) for name in self.layers}
        self.rates = {}

    def on_train_batch_start(self, trainer, pl_module, *args):
        for group in trainer.optimizers[0].param_groups:
            self.rates |= {parameter: group["lr"] for parameter in group["params"]}
        self.before = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *args):
        for name, noises in self.streams.items() if trainer.global_step > self.before else ():
            weight = pl_module.get_parameter(name)
            weight.add_(noises.next(), alpha=self.scale * self.rates[weight] ** (1 / self.alpha))


def groups(parameters):
    first, *others = parameters
    return torch.optim.SGD([{"params": [first], "lr": 0.03}, {"params": others}], lr=0.2, momentum=0.5)


CASES = {
    "sgd": (Wide, {}),
    "adam": (partial(Wide, partial(torch.optim.Adam, lr=0.01)), {}),
    "rmsprop": (partial(Wide, partial(torch.optim.RMSprop, lr=0.01)), {}),
    "lbfgs": (partial(Wide, partial(torch.optim.LBFGS, lr=0.1, max_iter=2)), {}),
    "groups": (partial(Wide, groups), {}),
    "schedule": (partial(Wide, schedule="onecycle"), {}),
    "accumulation": (Wide, {"accumulate_grad_batches": 3, "max_steps": 5}),
    "clipping": (Wide, {"gradient_clip_val": 0.1}),
    "bf16": (Wide, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "weight") for case in CASES), ("sgd", "neuron"), ("adam", "rotation")]
)
def test_a_fit_is_the_loop_that_adds_the_noise_by_hand(tmp_path, case, kind):
    make, options = CASES[case]
    module, reference, plain = (seeded(1, make) for _ in range(3))
    fit(tmp_path, module, Heavy(kind), **options)
    fit(tmp_path, reference, ByHand(kind), **options)
    fit(tmp_path, plain, **options)
    assert bits(module) == bits(reference)
    assert bits(module) != bits(plain)


def test_noise_of_scale_0_changes_no_bit_and_no_random_state(trace_fit):
    assert trace_fit(HeavyTailedNoise(1.75, 0.0, "weight", include=["network.4.weight"])) == trace_fit()
    noisy, plain = trace_fit(HeavyTailedNoise(1.75, 0.01)), trace_fit()
    assert noisy != plain
    assert [row[1:] for row in noisy] == [row[1:] for row in plain]  # flags and the global random states


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_the_rate_in_force_to_the_power_of_one_over_alpha(tmp_path, kind):
    module = seeded(1, partial(Still, partial(torch.optim.SGD, lr=0.1, momentum=0.0)))
    start = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    fit(tmp_path, module, HeavyTailedNoise(1.3, 0.5, kind, seed=3), max_steps=1)
    for name, weight in module.named_parameters():
        if name in LAYERS:
            expected = 0.5 * 0.1 ** (1 / 1.3) * Noise(weight, name, kind, 1.3, seed=3).next()
            torch.testing.assert_close(
                weight.detach() - start[name], expected.expand(weight.shape), rtol=1e-3, atol=1e-6
            )
            rows = (weight.detach() - start[name]).std(1)
            assert (rows < 1e-5).all() if kind == "neuron" else (rows > 1e-4).all()
        else:
            assert torch.equal(weight, start[name]), name


class Filters(Still):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1, bias=False),
            nn.Flatten(), nn.Linear(6, 8), nn.Linear(8, 5),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, ["net.1.weight", "net.3.weight", "net.5.weight"]),
        ({"first_convolution": False}, ["net.3.weight", "net.5.weight"]),
        ({"first_convolution": False, "include": "net.1.weight"}, ["net.1.weight", "net.3.weight", "net.5.weight"]),
        ({"exclude": ["net.5.*"]}, ["net.1.weight", "net.3.weight"]),
        ({"exclude": ["net.6.*"]}, ["net.1.weight", "net.3.weight", "net.5.weight"]),
        ({"exclude": ["net.1.*"], "first_convolution": False}, ["net.3.weight", "net.5.weight"]),
        ({"include": ["net.6.weight"], "exclude": "net.[135].weight"}, ["net.6.weight"]),
        ({"include": ["*.bias"], "exclude": ["*.weight"]}, ["net.1.bias", "net.2.bias", "net.5.bias", "net.6.bias"]),
    ],
)
def test_layers_are_chosen_by_patterns_and_only_they_move(tmp_path, options, layers):
    module = seeded(1, Filters)
    start = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    callback = Heavy("weight", **options)
    fit(tmp_path, module, callback, max_steps=2)
    assert moved(module, start) == callback.layers == layers


@pytest.mark.parametrize(("kernels", "same"), [(False, True), (True, False)])
def test_a_filter_or_each_of_its_kernels_has_one_number(tmp_path, kernels, same):
    module = seeded(1, Filters)
    before = module.net[3].weight.detach().clone(), module.net[1].weight.detach().clone()
    fit(tmp_path, module, Heavy(kernels=kernels), max_steps=1)
    filters, first = (module.net[3].weight.detach() - before[0]), (module.net[1].weight.detach() - before[1])
    assert (filters.std(1) < 1e-6).all() == same
    assert (first.flatten(1).std(1) < 1e-6).all()  # its filters have one kernel each
    assert (first.flatten() - first.mean()).abs().max() > 1e-4


def test_a_strangers_module_with_tied_frozen_and_idle_weights(tmp_path, caplog):
    caplog.set_level("INFO", "lightning.pytorch")

    class Stranger(type(make_plain())):
        pass

    module = seeded(0, make_plain)
    module.idle = nn.Linear(10, 10)
    module.configure_optimizers = lambda: torch.optim.Adam(
        [p for n, p in module.named_parameters() if not n.startswith("idle")], lr=0.01
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 6)), batch_size=4)
    callback = Heavy("rotation")
    for _ in range(2):
        fit(tmp_path, module, callback, data=data, max_steps=4)
    assert callback.layers == ["encoder.weight", "decoder.weight"]
    lines = [record.message for record in caplog.records if record.message.startswith("noise")]
    (line,) = lines  # once, though it was fitted twice
    assert line == (
        "noise (rotationally invariant, alpha 1.6, scale 0.02) on encoder.weight, decoder.weight; not on scale (no "
        "weight matrix), encoder.bias (bias), fixed.weight (frozen), fixed.bias (bias), decoder.bias (bias), tied.bias "
        "(bias), head.weight (output layer), head.bias (bias) and 2 more"
    )


# ---- under masks


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_weights_stay_0_and_the_others_get_the_noise(tmp_path, kind, first):
    module, reference = seeded(1, Wide), seeded(1, Wide)
    masks = half_masks(module)
    zeros = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            zeros.append(not any(any(raw(pl_module.get_parameter(n)[~mask])) for n, mask in masks.items()))

    ticket, heavy = ApplyTicket(ticket_of(module, masks)), Heavy(kind)
    fit(tmp_path, module, *([heavy, ticket] if first else [ticket, heavy]), Watch())
    assert zeros == [True] * 12

    class Masked(ByHand):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.streams = {
                name: Noise(pl_module.get_parameter(name), name, self.kind, level=1) for name in self.layers
            }

        @torch.no_grad()
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            for name, mask in masks.items():
                weight = pl_module.get_parameter(name)
                weight.copy_(masked(weight, mask))

    fit(tmp_path, reference, ApplyTicket(ticket_of(reference, masks)), Masked(kind))
    assert bits(module) == bits(reference)


def test_a_level_with_noise_is_a_fresh_fit_of_its_ticket_with_noise(tmp_path):
    imp, heavy, module, finals = IterativeMagnitudePruning(0.3, "4it", tmp_path), Heavy(), seeded(0, Wide), []
    for level in imp.levels(2):
        fit(level.run_dir, module, imp, heavy, seed=100 + level.number, max_steps=10)
        finals.append(bits(module))
    alone = seeded(9, Wide)
    fit(tmp_path, alone, Heavy(), ApplyTicket(imp.ticket_path(2)), seed=102, max_steps=10)
    assert bits(alone) == finals[2]
    assert len({final["net.0.weight"] for final in finals}) == 3


def test_each_level_and_each_seed_has_noise_of_its_own(tmp_path):
    module, found = seeded(1, Still), []
    for level, seed in ((1, 0), (2, 0), (1, 1), (1, 0)):
        ticket = ticket_of(seeded(1, Still), {})
        ticket.provenance["level"] = level
        fit(tmp_path, module, ApplyTicket(ticket), Heavy(seed=seed))
        found.append(bits(module)["net.0.weight"])
    assert len(set(found)) == 3
    assert found[0] == found[3]


def test_gradual_pruning_keeps_its_counts(tmp_path):
    module = seeded(1, Wide)
    gradual = GradualPruning(0.5, begin="3it", end="9it", every="3it", pruning=Pruning(exclude=["net.6.*"]))
    fit(tmp_path, module, gradual, Heavy("weight"))
    assert [int((module.get_parameter(name) == 0).sum()) for name in LAYERS] == [36, 54]


def test_visits_of_several_steps_have_the_same_bits(tmp_path):
    found = []
    for steps, masks in ((1, {}), (5, {}), (1, None), (5, None)):
        module = seeded(
            2, lambda steps=steps: ImageClassifier(Dense([6, 12, 9, 5]), SGD, num_classes=5, steps_per_visit=steps)
        )
        ticket = ApplyTicket(ticket_of(module, half_masks(module) if masks is None else masks))
        trainer = fit(tmp_path, module, ticket, Heavy("weight"))
        assert trainer.global_step == 12
        found.append(bits(module))
        if masks is None:
            assert all((module.get_parameter(name)[~mask] == 0).all() for name, mask in ticket.masks.items())
    assert found[0] == found[1] != found[2] == found[3]
