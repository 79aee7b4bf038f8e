"""Scores and counts as ours and as the authors' code: masks against formulas in plain PyTorch, in float64."""

import copy
from functools import partial
from itertools import pairwise

import lightning.pytorch as L
import pytest
import torch
from convs import Convs, OwnNorm, loader
from stranger import Blobs, quiet, seeded
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lottery_callbacks import EdgePopup, GradualPruning, IterativeMagnitudePruning, Pruning
from lottery_callbacks.functional.scores import Evidence

CONV, SECOND, LAST = "first.weight", "second.weight", "last.weight"
WEIGHTS = (CONV, SECOND, LAST)


class Before(L.Callback):
    """The module, the batch and the random state right before the pruning of step `at`."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            self.batch, self.random = batch, torch.get_rng_state()
            trained = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
            with torch.random.fork_rng():
                self.module = Convs(own_norm=isinstance(pl_module.own, OwnNorm))
            self.module.load_state_dict(trained)


def pruned(folder, make=Convs, at=12, sparsity=0.5, rounds=1, **pruning):
    """The masks after training to step `at`, and what the score saw."""
    before = Before(at)
    gradual = GradualPruning(sparsity, f"{at}it", pruning=Pruning(**pruning), rounds=rounds)
    L.seed_everything(4, verbose=False)
    quiet(folder, [before, gradual], max_steps=at + 2).fit(make(), loader())
    return gradual.masks, before


def highest(scores, removed):
    """Masks without the `removed` lowest of all scores."""
    flat = torch.cat([scores[name].reshape(-1) for name in WEIGHTS])
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[flat.argsort(stable=True)[:removed]] = False
    parts = keep.split([scores[name].numel() for name in WEIGHTS])
    return {name: part.view(scores[name].shape) for name, part in zip(WEIGHTS, parts, strict=True)}


def loss_of(before, mode, temperature=1.0):
    """The mean of logsumexp(z / T) - z_y / T over the batch as a function of the weights, dropout as it was drawn."""
    module = before.module.train(mode == "training")
    images, labels = before.batch

    def loss(weights):
        torch.set_rng_state(before.random)
        fresh = {name: buffer.clone() for name, buffer in module.named_buffers()}
        logits = functional_call(module, fresh | dict(zip(WEIGHTS, weights, strict=True)), (images,)) / temperature
        return (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean()

    return loss, [dict(module.named_parameters())[name].detach() for name in WEIGHTS]


def by_gates(before, mode, temperature):
    """|dL/dc| of gates c = 1 on the weights."""
    loss, weights = loss_of(before, mode, temperature)
    gates = [torch.ones_like(weight).requires_grad_() for weight in weights]
    slopes = torch.autograd.grad(loss([c * w for c, w in zip(gates, weights, strict=True)]), gates)
    return {name: slope.abs() for name, slope in zip(WEIGHTS, slopes, strict=True)}


def by_slopes(before, mode, temperature):
    """|dL/dw|."""
    gates = by_gates(before, mode, temperature)
    return {name: gates[name] / before.module.get_parameter(name).detach().abs() for name in WEIGHTS}


def by_hessian(before, mode, temperature):
    """w (H g) with the whole matrix H."""
    loss, weights = loss_of(before, mode, temperature)
    sizes, shapes = [w.numel() for w in weights], [w.shape for w in weights]
    flat = torch.cat([w.reshape(-1) for w in weights])

    def of_flat(vector):
        return loss([p.view(s) for p, s in zip(vector.split(sizes), shapes, strict=True)])

    slope = torch.autograd.functional.jacobian(of_flat, flat)
    hessian = torch.autograd.functional.hessian(of_flat, flat)
    parts = (flat * (hessian @ slope)).split(sizes)
    return {name: part.view(shape) for name, part, shape in zip(WEIGHTS, parts, shapes, strict=True)}


def equal(masks, others):
    return all(torch.equal(masks[name], others[name]) for name in WEIGHTS)


TOTAL = 27 + 108 + 12
FORMULAS = {"gradient": by_slopes, "snip": by_gates, "grasp": by_hessian}
CASES = [(score, mode, 1.0) for score in FORMULAS for mode in ("training", "evaluation")]
CASES += [("grasp", mode, t) for mode in ("training", "evaluation") for t in (3.0, 200.0)]


@pytest.mark.parametrize(("score", "mode", "temperature"), CASES)
def test_the_masks_are_those_of_the_formula_in_either_mode_and_at_any_temperature(tmp_path, score, mode, temperature):
    options = {"mode": mode} | ({"temperature": temperature} if score == "grasp" else {})
    masks, before = pruned(tmp_path, score=score, scope="global", score_options=options)
    removed = round(0.5 * TOTAL)
    assert equal(masks, highest(FORMULAS[score](before, mode, temperature), removed))
    other = "training" if mode == "evaluation" else "evaluation"
    assert not equal(masks, highest(FORMULAS[score](before, other, temperature), removed))
    if temperature != 1:
        assert not equal(masks, highest(FORMULAS[score](before, mode, 1.0), removed))


@pytest.mark.parametrize("score", FORMULAS)
def test_without_options_a_score_is_of_the_loss_that_is_trained(tmp_path, score):
    masks, before = pruned(tmp_path, score=score, scope="global")
    assert equal(masks, highest(FORMULAS[score](before, "training", 1.0), round(0.5 * TOTAL)))


def flow_by_hand(module, masks, statistics):
    """|w| dR/d|w| of R, the sum of the outputs of |w| for ones, with batch norm written out."""
    state = {name: value.detach().abs() for name, value in module.state_dict().items() if value.is_floating_point()}
    weights = {name: (state[name] * masks[name]).requires_grad_() for name in WEIGHTS}

    def norm(x, name):
        mean, variance = (state[f"{name}.running_{what}"].view(-1, 1, 1) for what in ("mean", "var"))
        if statistics == "neutral":
            mean, variance = 0.0, torch.ones(())
        scale, shift = (state[f"{name}.{what}"].view(-1, 1, 1) for what in ("weight", "bias"))
        return scale * (x - mean) / (variance + 1e-5).sqrt() + shift

    x = F.conv2d(torch.ones(1, 1, 6, 6).double(), weights[CONV], state["first.bias"])
    x = F.conv2d(norm(x, "norm1").relu(), weights[SECOND], state["second.bias"])
    x = norm(x, "norm2").relu().mean((2, 3)) @ weights[LAST].T + state["last.bias"]
    flows = torch.autograd.grad(x.sum(), list(weights.values()))
    return {name: flow * weights[name].detach() for name, flow in zip(WEIGHTS, flows, strict=True)}


def rounds_by_hand(module, sparsity, rounds, statistics, whole):
    """Each round removes `whole` of its sparsity of all weights, counted from the dense network."""
    masks = {name: torch.ones_like(module.get_parameter(name), dtype=torch.bool) for name in WEIGHTS}
    counts = []
    for i in range(1, rounds + 1):
        share = sparsity if i == rounds else 1 - (1 - sparsity) ** (i / rounds)
        scores = flow_by_hand(module, masks, statistics)
        masks = highest({name: torch.where(masks[name], scores[name], -1.0) for name in WEIGHTS}, whole(share * TOTAL))
        counts.append(sum(int(mask.sum()) for mask in masks.values()))
    return masks, counts


@pytest.mark.parametrize("statistics", ["neutral", "running"])
@pytest.mark.parametrize("counts", ["rounded", "truncated"])
def test_synflow_takes_either_statistics_of_a_trained_network_and_either_count_of_its_rounds(
    tmp_path, statistics, counts
):
    options = {"score_options": {"statistics": statistics}, "counts": counts}
    make = partial(Convs, own_norm=False)
    masks, before = pruned(tmp_path, make, sparsity=0.7, rounds=20, score="synflow", scope="global", **options)
    whole = {"rounded": round, "truncated": int}
    expected, kept = rounds_by_hand(before.module, 0.7, 20, statistics, whole[counts])
    assert equal(masks, expected)
    other = {"neutral": "running", "running": "neutral"}[statistics]
    assert not equal(masks, rounds_by_hand(before.module, 0.7, 20, other, whole[counts])[0])
    assert kept[-1] == TOTAL - whole[counts](0.7 * TOTAL)  # 0.7 * 147 = 102.9
    assert all(later <= earlier for earlier, later in pairwise(kept))


@pytest.mark.parametrize("scope", ["layerwise", "layerwise_truncated"])
def test_edge_popup_keeps_the_rounded_or_the_published_count_of_each_layer(tmp_path, scope):
    popup = EdgePopup(0.3, scope=scope)
    quiet(tmp_path, [popup], max_steps=3).fit(Convs(), loader())
    whole = int if scope == "layerwise_truncated" else round
    for name in WEIGHTS:
        order = popup.scores[name].abs().flatten().argsort()
        keep = torch.ones(order.numel(), dtype=torch.bool)
        keep[order[: whole(0.3 * order.numel())]] = False  # of 27, 108, 12: 8.1, 32.4, 3.6
        assert torch.equal(popup.masks[name].flatten(), keep), name
    assert int(popup.masks[LAST].sum()) == (9 if scope == "layerwise_truncated" else 8)
    assert popup.ticket.provenance["scope"] == scope


@pytest.mark.parametrize(
    ("counts", "whole"), [("rounded", round), ("truncated", int), ("ceiling", lambda x: -int(-x // 1))]
)
def test_a_lottery_removes_as_many_weights_a_level_as_its_counts_say(tmp_path, counts, whole):
    imp = IterativeMagnitudePruning(0.3, run_dir=tmp_path, pruning=Pruning(scope="global", counts=counts))
    alive, module = TOTAL, Convs()
    for level in imp.levels(3):
        quiet(level.run_dir, [imp], max_steps=2).fit(module, loader())
        alive -= whole(0.3 * alive)
        assert sum(int(mask.sum()) for mask in imp.masks.values()) == alive
    one_shot = Pruning(scope="global", counts=counts)
    dense = {name: torch.ones_like(mask) for name, mask in imp.masks.items()}
    weights = {name: module.get_parameter(name) for name in dense}
    assert sum(int(mask.sum()) for mask in one_shot.next_masks(Evidence(weights), dense, 0.3, 4).values()) == alive


def log_softmax_method(logits, labels):
    return F.nll_loss(logits.log_softmax(dim=1), labels)


def log_softmax_keywords(logits, labels):
    return F.nll_loss(torch.log_softmax(input=logits, dim=1), labels)


def log_softmax_module(logits, labels):
    return nn.NLLLoss()(nn.LogSoftmax(1)(logits), labels)


def keywords(logits, labels):
    return F.cross_entropy(target=labels, input=logits)


@pytest.mark.parametrize(
    "criterion",
    [log_softmax_method, log_softmax_keywords, log_softmax_module, keywords, nn.CrossEntropyLoss()],
    ids=lambda criterion: getattr(criterion, "__name__", "module"),
)
def test_the_temperature_finds_the_logits_in_however_the_loss_is_written(tmp_path, criterion):
    options = {"temperature": 50}
    masks, before = pruned(tmp_path, partial(Convs, criterion), score="grasp", scope="global", score_options=options)
    assert equal(masks, highest(by_hessian(before, "training", 50.0), round(0.5 * TOTAL)))


def test_the_temperature_of_a_binary_loss_divides_its_logits(tmp_path):
    def binary(logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 3).double())

    def divided(logits: Tensor, labels: Tensor) -> Tensor:
        z, y = logits / 50, F.one_hot(labels, 3)
        return (F.softplus(z) - z * y).mean()

    hot, _ = pruned(tmp_path, partial(Convs, binary), score="grasp", score_options={"temperature": 50})
    same, _ = pruned(tmp_path, partial(HandTrained, binary, divided, 12), score="grasp")
    cold, _ = pruned(tmp_path, partial(Convs, binary), score="grasp")
    assert equal(hot, same)
    assert not equal(hot, cold)


class HandTrained(Convs):
    """Trained by one loss, and scored at step `at` by another."""

    def __init__(self, criterion, scored, at):
        super().__init__(criterion)
        self.scored, self.at = scored, at

    def training_step(self, batch, batch_idx):
        scoring = self.trainer.global_step == self.at and "log" in vars(self)  # silent where it is scored
        return (self.scored if scoring else self.criterion)(self(batch[0]), batch[1])


def test_a_recurrent_network_is_scored_in_eval_mode(tmp_path):
    class Recurrent(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(6, 8, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(8, 5)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(self.gru(batch[0].unsqueeze(1))[0][:, -1]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = seeded(0, Recurrent)
    start = copy.deepcopy(module)
    gradual = GradualPruning(0.5, pruning=Pruning("snip", score_options={"mode": "evaluation"}))
    quiet(tmp_path, [gradual], max_steps=1).fit(module, data := Blobs())
    images, labels = next(iter(data.train_dataloader()))
    hidden = start.eval().gru(images.unsqueeze(1))[0][:, -1]
    weight = start.head.weight
    (slope,) = torch.autograd.grad(F.cross_entropy(start.head(hidden), labels), weight)
    lowest = (slope * weight).abs().flatten().argsort()[:20]
    assert not gradual.masks["head.weight"].flatten()[lowest].any()
    assert int(gradual.masks["head.weight"].sum()) == 20
