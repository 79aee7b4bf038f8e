"""Heavy-tailed noise: the bits of a loop by hand, on the right layers, at real steps alone, and after a kill too."""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from stranger import (
    Blobs,
    Interrupted,
    Net,
    StopAt,
    bits,
    half_masks,
    make_plain,
    masked,
    quiet,
    raw,
    seeded,
    ticket_of,
)
from torch import nn

from lottery_callbacks import ApplyTicket, EdgePopup, GradualPruning, IterativeMagnitudePruning, Pruning
from lottery_callbacks.functional.alpha_stable import factors
from lottery_callbacks.functional.noise_stream import BLOCK, NoiseStream
from lottery_callbacks.functional.stable_table import StableTable
from lottery_callbacks.heavy_tailed_noise import HeavyTailedNoise
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier

KINDS = ["neuron", "weight", "rotation"]
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
PLAIN = partial(torch.optim.SGD, lr=0.1)
Heavy = partial(HeavyTailedNoise, 1.6, 0.02)


class Wide(Net):
    """Two hidden layers, any optimizer, and a choice of loss."""

    def __init__(self, optimizer=SGD, schedule=None):
        super().__init__(schedule=schedule)
        self.net = nn.Sequential(
            nn.Linear(6, 12),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(12, 9),
            nn.ReLU(),
            nn.Linear(9, 5),
        )
        self.make_optimizer = optimizer

    def configure_optimizers(self):
        return super().configure_optimizers() if self.schedule else self.make_optimizer(self.parameters())


class Still(Wide):
    """Gradients that are exactly 0: plain SGD moves nothing, so that what moves is noise."""

    def __init__(self, optimizer=PLAIN):
        super().__init__(optimizer)

    def training_step(self, batch, batch_idx):
        return 0.0 * super().training_step(batch, batch_idx)


class Noise:
    """The noise of one weight, as the docstrings say it is drawn."""

    def __init__(self, parameter, name, kind="neuron", alpha=1.6, seed=0, level=0):
        table = StableTable(alpha).draw
        self.factors = [
            NoiseStream(draw, shape, "cpu", f"{seed} {level} {name} {part}")
            for part, (shape, draw) in enumerate(factors(kind, alpha, tuple(parameter.shape), draw=table))
        ]

    def next(self):
        return math.prod(factor.next().clone() for factor in self.factors)


def used(callback):
    """How many steps each weight has had noise in, where all are of one block."""
    return {stream["used"] for streams in callback.state_dict()["streams"].values() for stream in streams}


LAYERS = ["net.0.weight", "net.4.weight"]  # not net.6.weight, the output


def fit(folder, module, *callbacks, seed=5, data=None, checkpoint=None, **options):
    trainer = quiet(folder, callbacks, **({"max_steps": 12, "limit_val_batches": 0} | options))
    L.seed_everything(seed, verbose=False)
    trainer.fit(module, Blobs() if data is None else data, ckpt_path=checkpoint)
    return trainer


class Rates(L.Callback):
    """The rates of all groups where each batch begins: those of the step that follows."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, *args):
        self.rows.append([group["lr"] for group in trainer.optimizers[0].param_groups])


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


def moved(module, start):
    return [name for name, weight in module.named_parameters() if not torch.equal(weight, start[name])]


class Conv(Still):
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
    module = seeded(1, Conv)
    start = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    callback = Heavy("weight", **options)
    fit(tmp_path, module, callback, max_steps=2)
    assert moved(module, start) == callback.layers == layers


@pytest.mark.parametrize(("kernels", "same"), [(False, True), (True, False)])
def test_a_filter_or_each_of_its_kernels_has_one_number(tmp_path, kernels, same):
    module = seeded(1, Conv)
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


# ---- which steps are steps


class Overflowing(Wide):
    """Its loss is infinite at visit 3, so that the GradScaler skips that step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if batch_idx == 3 else loss


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_gets_no_noise(tmp_path, fused):
    rows = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            rows.append(bits(dict(pl_module.named_parameters())))

    heavy = Heavy("weight")
    module = seeded(1, partial(Overflowing, partial(torch.optim.SGD, lr=0.1, fused=fused)))
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024))
    fit(tmp_path, module, heavy, Watch(), plugins=[scaler], max_steps=8)
    assert rows[3] == rows[2]
    changes = [before["net.0.weight"] != after["net.0.weight"] for before, after in pairwise(rows)]
    assert changes == [True, True, False, True, True, True, True]
    assert used(heavy) == {8 if fused else 7}


class Skipping(Still):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_weights_without_a_gradient_get_no_noise(tmp_path):
    heavy = Heavy()
    fit(tmp_path, seeded(1, Skipping), heavy, max_steps=6)
    assert used(heavy) == {3}


class Duel(Still):
    """Two optimizers stepped by hand; `wrapped=False` steps torch's own objects past Lightning's."""

    automatic_optimization = False

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers(use_pl_optimizer=self.wrapped):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        first = torch.optim.SGD(self.net[0].parameters(), lr=0.1)
        return first, torch.optim.SGD([*self.net[4].parameters(), *self.net[6].parameters()], lr=torch.tensor(0.4))


@pytest.mark.parametrize("wrapped", [True, False])
def test_several_optimizers_have_their_own_rates_and_steps(tmp_path, wrapped):
    module = seeded(1, partial(Duel, wrapped))
    start = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    fit(tmp_path, module, Heavy("weight"), max_steps=-1, max_epochs=1)
    for name, rate in zip(LAYERS, (0.1, 0.4), strict=True):
        weight = module.get_parameter(name)
        noises = Noise(weight, name, "weight")
        total = sum(noises.next() for _ in range(9)) * 0.02 * rate ** (1 / 1.6)
        torch.testing.assert_close(weight.detach() - start[name], total, rtol=1e-4, atol=1e-5)
    assert moved(module, start) == LAYERS


def test_a_step_that_calls_its_parents_is_one_step(tmp_path):
    class Child(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # from now on the parent's step calls hooks as well
    heavy = Heavy()
    fit(tmp_path, seeded(1, partial(Wide, partial(Child, lr=0.1))), heavy, max_steps=6)
    assert used(heavy) == {6}


class Precise(Still):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].to(self.dtype), batch[1]), batch_idx)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_weights_of_other_precisions(tmp_path, precision):
    module = seeded(1, Precise)
    start = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    fit(tmp_path, module, Heavy("weight"), precision=precision, max_steps=3)
    for name in LAYERS:
        weight = module.get_parameter(name)
        noises = Noise(weight, name, "weight")
        expected = start[name].double() + sum(noises.next().double() for _ in range(3)) * 0.02 * 0.1 ** (1 / 1.6)
        tolerance = {"bf16-true": 2e-2, "16-true": 3e-3, "64-true": 1e-6}[precision]
        torch.testing.assert_close(weight.detach().double(), expected, rtol=tolerance, atol=tolerance)


# ---- a fit that goes on


@pytest.mark.parametrize(("kind", "block"), [("neuron", BLOCK), ("neuron", 40), ("weight", 300), ("rotation", 1)])
@pytest.mark.parametrize("cut", [4, 9, 10])
def test_a_resumed_fit_ends_in_the_bits_of_an_unbroken_one(tmp_path, monkeypatch, kind, block, cut):
    monkeypatch.setattr("lottery_callbacks.functional.noise_stream.BLOCK", block)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == cut:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    def setting():
        module = seeded(1, Wide)
        return module, ApplyTicket(ticket_of(module)), Heavy(kind)

    module, *callbacks = setting()
    fit(tmp_path, module, *callbacks, max_steps=20)
    broken, *callbacks = setting()
    with pytest.raises(Interrupted):
        fit(tmp_path, broken, *callbacks, Save(), StopAt(cut + 2), max_steps=20)
    resumed, *callbacks = setting()
    fit(tmp_path, resumed, *callbacks, seed=977, checkpoint=tmp_path / "cut.ckpt", max_steps=20)
    assert bits(resumed) == bits(module)
    assert torch.load(tmp_path / "cut.ckpt", weights_only=True)["callbacks"]["HeavyTailedNoise"]["rule"]["alpha"] == 1.6


def saved(folder, callback):
    trainer = fit(folder, seeded(1, Wide), callback, max_steps=4)
    trainer.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt"


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (HeavyTailedNoise(1.7, 0.02), "alpha is 1.6 there and 1.7 now"),
        (HeavyTailedNoise(1.6, 0.03), "scale is 0.02 there and 0.03 now"),
        (HeavyTailedNoise(1.6, 0.02, "weight"), "kind is 'neuron' there and 'weight' now"),
        (Heavy(seed=4), "seed is 0 there and 4 now"),
        (Heavy(kernels=True), "kernels is False there and True now"),
        (Heavy(exclude=["net.0.*"]), r"layers is \['net.0.weight', 'net.4.weight'\] there and \['net.4.weight'\] now"),
    ],
)
def test_a_checkpoint_of_other_noise_is_refused(tmp_path, other, difference):
    with pytest.raises(
        ValueError, match=f"saved.ckpt was trained with other noise: {difference}; resume it with its own"
    ):
        fit(tmp_path, seeded(1, Wide), other, checkpoint=saved(tmp_path, Heavy()))


def test_a_checkpoint_of_another_kind_of_device_goes_on_with_a_warning(tmp_path):
    path = saved(tmp_path, Heavy())
    checkpoint = torch.load(path, weights_only=True)
    for states in checkpoint["callbacks"]["HeavyTailedNoise"]["streams"].values():
        states[0]["device"] = "cuda"
    torch.save(checkpoint, path)
    with pytest.warns(
        UserWarning, match="noise on net.0.weight was drawn on another kind of device: it goes on with other"
    ):
        fit(tmp_path, seeded(1, Wide), Heavy(), checkpoint=path)


def test_a_callback_that_is_used_again_begins_anew(tmp_path):
    heavy, found = Heavy(), []
    path = saved(tmp_path, heavy)
    for checkpoint in (None, path, None):
        module = seeded(1, Wide)
        fit(tmp_path, module, heavy, checkpoint=checkpoint)
        found.append(bits(module))
    assert found[0] == found[2]


@pytest.mark.parametrize("stop", [None, 3])
def test_after_the_fit_the_optimizer_is_free_again(tmp_path, stop):
    module, heavy = seeded(1, Wide), Heavy()
    trainer = quiet(tmp_path, [heavy, *([StopAt(stop)] if stop else [])], max_steps=6, limit_val_batches=0)
    if stop:
        with pytest.raises(Interrupted):
            trainer.fit(module, Blobs())
    else:
        trainer.fit(module, Blobs())
    (optimizer,) = trainer.optimizers
    optimizer.step()
    assert used(heavy) == {stop or 6}
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0, "scale": 1}, "alpha=0 is outside"),
        ({"alpha": 2.1, "scale": 1}, "alpha=2.1 is outside"),
        ({"alpha": math.nan, "scale": 1}, "alpha=nan is outside"),
        ({"alpha": 1.5, "scale": -1}, "scale=-1 is no scale of noise"),
        ({"alpha": 1.5, "scale": math.inf}, "scale=inf is no scale of noise"),
        ({"alpha": 1.5, "scale": math.nan}, "scale=nan is no scale of noise"),
        (
            {"alpha": 1.5, "scale": 1, "kind": "column"},
            "kind='column' is not known: choose one of neuron, weight, rotation",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeavyTailedNoise(**arguments)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([Heavy(exclude=["*head*"])], r"exclude names '\*head\*', which is no parameter: there are net.0.weight"),
        ([Heavy(include=["head"])], "include names 'head', which is no parameter"),
        (
            [Heavy(exclude=["net.0.*", "net.4.*"])],
            "no weight is left for noise, of net.0.weight.* name some in include",
        ),
        ([Heavy(), EdgePopup(0.5)], "EdgePopup trains scores of weights that stay: leave the noise out"),
    ],
)
def test_what_cannot_have_noise_is_refused_in_one_line(tmp_path, callbacks, message):
    with pytest.raises(ValueError, match=message) as refusal:
        fit(tmp_path, seeded(1, Wide), *callbacks)
    assert "\n" not in str(refusal.value)


def test_optimizers_without_a_rate_and_sharded_weights_are_refused(tmp_path):
    class Rateless(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1)
            for group in self.param_groups:
                del group["lr"]

    with pytest.raises(ValueError, match="Rateless has no lr in its parameter groups"):
        fit(tmp_path, seeded(1, partial(Wide, Rateless)), Heavy())
    strategy = type("FSDPStrategy", (), {"restore_checkpoint_after_setup": True})()
    trainer = SimpleNamespace(strategy=strategy, callbacks=[])
    with pytest.raises(ValueError, match="FSDPStrategy shards parameters: add noise with ddp"):
        Heavy().setup(trainer, None, "fit")
