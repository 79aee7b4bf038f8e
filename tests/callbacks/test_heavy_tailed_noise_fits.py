"""Heavy-tailed noise at real steps alone, in fits that go on to the same bits, and what is refused."""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from noisy_fits import LAYERS, Heavy, Noise, Still, Wide, fit, moved, used
from stranger import Blobs, Interrupted, StopAt, bits, quiet, seeded, ticket_of
from torch import nn

from lottery_callbacks import ApplyTicket, EdgePopup
from lottery_callbacks.functional.noise_stream import BLOCK
from lottery_callbacks.heavy_tailed_noise import HeavyTailedNoise

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
    checkpoint["callbacks"]["HeavyTailedNoise"]["streams"]["net.0.weight"][0]["device"] = "cuda"
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
