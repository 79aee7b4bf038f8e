"""Scores trained in the place of weights: those of a loop by hand, however and in whatever precision one steps."""

import copy
import math
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from popup_fits import FIRST, LAST, SIZES, Searched, Watch, adam, counts, fit, hidden_masks, sgd
from stranger import Blobs, Net, bits, masked, raw, seeded
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lottery_callbacks import EdgePopup
from lottery_callbacks.functional import masks as M
from lottery_lightning.data import EpochOrder
from lottery_lightning.tasks import ImageClassifier


def by_hand(module, popup, scores, scope, trained=(), every=1, clip=None, seed=5):
    """The search in plain PyTorch: the scores and masks after each of 20 visits."""
    scores = {name: score.clone().requires_grad_() for name, score in scores.items()}
    optimizer = module.optimizer(
        [{"params": [scores[FIRST], *map(module.get_parameter, trained)]}, {"params": [scores[LAST]], "lr": 0.03}]
    )
    data, seen = Blobs(), []
    data.setup("fit")
    images, labels = data.splits["train"]
    torch.manual_seed(seed)
    module.train()
    for visit in range(20):
        order = EpochOrder(0, 0)
        order.set_epoch(visit // 9)
        rows = order.permutation(len(labels)).split(7)[visit % 9]
        chosen = hidden_masks(scores, scope)
        network = {name.removeprefix("net."): popup.fixed[name] * mask for name, mask in chosen.items()}
        loss = F.cross_entropy(functional_call(module.net, network, images[rows]), labels[rows])
        (loss / every).backward()
        if (visit % 9 + 1) % every == 0:
            if clip:
                groups = [p for group in optimizer.param_groups for p in group["params"]]
                assert torch.nn.utils.clip_grad_norm_(groups, clip) > clip
            optimizer.step()
            optimizer.zero_grad()
        seen.append({name: score.detach().clone() for name, score in scores.items()})
    return seen


def nesterov(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)


class Nested(torch.optim.Adam):
    """A step of its own around its parent's: torch calls the hooks of both."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(0.99)
        return loss


def plain_and_nested(parameters):
    return Nested(parameters, lr=0.02)


RULES = {  # optimizer, EdgePopup's arguments, the Trainer's
    "sgd": (sgd, {}, {}),
    "adam": (adam, {}, {}),
    "nesterov, global": (nesterov, {"scope": "global"}, {}),
    "a learned threshold": (sgd, {"scope": "threshold"}, {}),
    "a threshold, normal weights": (adam, {"scope": "threshold", "weights": "kaiming_normal"}, {}),
    "scaled": (sgd, {"weights": "scaled_kaiming_normal", "scores": "magnitude"}, {}),
    "norms too": (adam, {"norms": "trained"}, {}),
    "accumulated": (adam, {}, {"accumulate_grad_batches": 3, "max_steps": 6}),
    "clipped": (sgd, {}, {"gradient_clip_val": 0.1}),
    "a step around a step": (plain_and_nested, {}, {}),
}


@pytest.mark.parametrize("name", RULES)
def test_scores_and_masks_are_those_of_straight_through_in_a_plain_loop(tmp_path, name):
    optimizer, arguments, options = RULES[name]
    start = seeded(1, partial(Searched, optimizer))
    popup = EdgePopup(**arguments)
    watch, first = Watch(popup), {}
    begin = L.Callback()
    begin.on_train_start = lambda *_: first.update(copy.deepcopy(popup.scores))
    fit(tmp_path, popup, begin, watch, module=copy.deepcopy(start), **options)
    for key, parameter in start.named_parameters():
        if "bias" in key and "2" not in key:
            parameter.data.zero_()
    trained = ("net.2.weight", "net.2.bias") if popup.norms == "trained" else ()
    every, clip = options.get("accumulate_grad_batches", 1), options.get("gradient_clip_val")
    expected = by_hand(start, popup, first, popup.scope, trained, every, clip)
    for seen, scores, masks in zip(watch.scores, expected, watch.masks, strict=False):
        for key in SIZES:
            torch.testing.assert_close(seen[key], scores[key], rtol=0, atol=1e-6)
            assert torch.equal(masks[key], hidden_masks(scores, popup.scope)[key].bool())
    moved = [key for key in SIZES if not torch.equal(watch.masks[0][key], watch.masks[-1][key])]
    assert moved == list(SIZES)
    assert len(watch.scores) == (18 if every == 3 else 20)


# ---- visits


def classifier(steps_per_visit):
    network = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 5))
    return ImageClassifier(network, adam, num_classes=5, steps_per_visit=steps_per_visit)


class Listener(L.Callback):
    """Makes Lightning call every hook of each step, also within visits."""

    def on_train_start(self, trainer, pl_module):
        self.visits = not pl_module.automatic_optimization

    def on_after_backward(self, trainer, pl_module):
        pass


class Quiet(Listener):
    on_after_backward = L.Callback.on_after_backward


def test_visits_of_several_steps_give_the_bits_of_one(tmp_path):
    found = []
    for steps, callback in ((1, Quiet()), (7, Quiet()), (7, Listener())):
        popup = EdgePopup(0.5, end="11it")
        module = fit(tmp_path, popup, callback, module=seeded(1, partial(classifier, steps)))
        assert callback.visits == (steps > 1)
        found.append((bits(module), bits(popup.scores), popup.step))
    assert found[0] == found[1] == found[2]


# ---- precisions


def scaled():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024))]}


class HalfAware(Searched):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0].to(self.dtype)).float(), batch[1])


@pytest.mark.parametrize(
    "precision", ["bf16-mixed", "bf16-true", "16-true", "64-true", "scaled", "scaled, clipped", "scaled, fused"]
)
def test_every_precision_keeps_exact_counts_of_unchanged_weights(tmp_path, precision):
    options = {"precision": precision} if "scaled" not in precision else scaled()
    options |= {"gradient_clip_val": 0.1} if "clipped" in precision else {}
    popup = EdgePopup(0.5)
    watch = Watch(popup)
    optimizer = partial(torch.optim.Adam, lr=0.02, fused=True) if "fused" in precision else sgd
    module = fit(tmp_path, popup, watch, module=seeded(1, partial(HalfAware, optimizer)), **options)
    assert all(watch.baked)
    assert all(M.kept(masks) == counts(0.5) for masks in watch.masks)
    assert M.digest(watch.masks[0]) != M.digest(watch.masks[-1])
    assert popup.fixed[FIRST].dtype == module.get_parameter(FIRST).dtype
    assert len(popup.fixed[FIRST].unique()) == 2


class Overflowing(Searched):
    """Its loss is infinite at visit 3, so that the GradScaler skips that step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if batch_idx == 3 else loss


def test_a_step_that_the_scaler_skips_leaves_the_pruned_network_and_the_scores(tmp_path):
    popup = EdgePopup()
    watch = Watch(popup)
    fit(tmp_path, popup, watch, module=seeded(1, Overflowing), max_steps=9, **scaled())
    assert all(watch.baked)
    moved = [bits(b) != bits(a) for a, b in zip(watch.scores, watch.scores[1:], strict=False)]
    assert moved == [True, True, False, True, True, True, True, True]
    assert popup.step == 8


def test_scaled_steps_are_those_without_a_scaler(tmp_path):
    """The scale is a power of two, and on a CPU in full precision it divides out exactly."""
    found = []
    for plugin in ({}, {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64))]}):
        popup = EdgePopup()
        for precision in plugin.get("plugins", []):
            precision.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        fit(tmp_path, popup, max_steps=9, **plugin)
        found.append(popup.scores)
    for name, score in found[0].items():
        torch.testing.assert_close(found[1][name], score, rtol=0, atol=1e-6)


# ---- manual optimization


class Manual(Searched):
    """Steps by hand: through Lightning, by the bare optimizer, or with a closure."""

    automatic_optimization = False

    def __init__(self, way):
        super().__init__()
        self.way = way

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer="bare" not in self.way)

        def closure():
            optimizer.zero_grad()
            loss = super(Manual, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        if "closure" in self.way:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("way", ["lightning", "lightning's closure", "bare"])
def test_manual_steps_are_automatic_ones(tmp_path, way):
    automatic, manual = EdgePopup(), EdgePopup()
    expected = bits(fit(tmp_path, automatic, max_steps=9))
    options = {"max_steps": -1, "max_epochs": 1} if way == "bare" else {"max_steps": 9}  # Lightning counts no bare ones
    assert bits(fit(tmp_path, manual, module=seeded(1, partial(Manual, way)), **options)) == expected
    assert bits(manual.scores) == bits(automatic.scores)
    assert manual.step == 9


class Duel(Net):
    """An optimizer for each layer, which step in one visit; the second one in the first five visits alone."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for number, optimizer in enumerate(self.optimizers()):
            if number == 0 or self.trainer.global_step < 10:
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    def configure_optimizers(self):
        return [sgd(self.net[layer].parameters()) for layer in (1, 5)]


@pytest.mark.parametrize("scope", ["layerwise", "global"])
def test_several_optimizers_move_the_scores_of_their_own_layers(tmp_path, scope):
    popup = EdgePopup(0.5, scope, end="15it")
    watch = Watch(popup)
    module = fit(tmp_path, popup, watch, module=seeded(1, Duel))
    assert all(watch.baked)
    if scope == "global":  # all are ranked together whichever of them has stepped
        for scores, masks in zip(watch.scores[9:], watch.masks[9:], strict=True):
            assert all(torch.equal(masks[n], mask.bool()) for n, mask in hidden_masks(scores, scope).items())
    assert bits(watch.scores[4])[LAST] == bits(watch.scores[-1])[LAST]
    assert bits(watch.scores[4])[FIRST] != bits(watch.scores[-1])[FIRST]
    assert sum(M.kept(popup.masks).values()) == 66
    assert M.kept(popup.masks) == {n: int(module.get_parameter(n).count_nonzero()) for n in SIZES}


# ---- what is refused


class Lbfgs(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Twice(torch.optim.SGD):
    def step(self, closure=None):
        closure()
        return super().step(closure)


REFUSED = {
    "lbfgs": (Lbfgs, "^LBFGS evaluates its closure several times a step, and the network holds sco"),
    "twice": (partial(Searched, partial(Twice, lr=0.1)), "^Twice evaluates its closure several time"),
    "bare closure": (
        partial(Manual, "bare closure"),
        r"^SGD was given a closure past Lightning: step the optimizers of self\.optimizers\(\), or without a closure$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_ways_to_step_are_refused_in_one_line(tmp_path, name):
    make, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        fit(tmp_path, EdgePopup(), module=make())


def test_a_torn_step_leaves_the_pruned_network(tmp_path):
    class Torn(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                parameter.data.fill_(7)
            raise KeyError("torn")

    popup, module = EdgePopup(), seeded(1, partial(Searched, partial(Torn, lr=0.1)))
    with pytest.raises(KeyError):
        fit(tmp_path, popup, module=module)
    for key, mask in popup.masks.items():
        assert raw(module.get_parameter(key)) == raw(masked(popup.fixed[key], mask))
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize("scope", ["layerwise", "global", "threshold"])
def test_scores_that_diverge_are_named(tmp_path, scope):
    diverges = seeded(1, partial(Searched, partial(torch.optim.SGD, lr=math.inf)))
    with pytest.raises(ValueError, match=r"^scores of net\.1\.weight are not finite: lower the learning rate, or clip"):
        fit(tmp_path, EdgePopup(scope=scope), module=diverges)
