"""Options of score functions on evidence by hand, and the loss functions that a temperature divides."""

from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lottery_callbacks.functional.score_options import Positive, score_options
from lottery_callbacks.functional.scores import SCORES, Evidence, gradient, grasp, needs, snip, synflow
from lottery_callbacks.functional.synaptic_flow import synaptic_flow
from lottery_callbacks.functional.temperature import Tempered


def asked(score, **options):
    """What losses and flow are asked for by a score."""
    weights = {"w": torch.tensor([1.0, -2.0]).requires_grad_()}
    seen = []

    def losses(**given):
        seen.append(given)
        yield weights["w"].square().sum()

    def flow(**given):
        seen.append(given)
        return {"w": torch.ones(2)}

    score(Evidence(weights, losses=losses, flow=flow), **options)
    return seen


@pytest.mark.parametrize(
    ("score", "options", "expected"),
    [
        (snip, {}, [{}]),
        (snip, {"mode": "training"}, [{}]),
        (snip, {"mode": "evaluation"}, [{"mode": "evaluation"}]),
        (gradient, {"mode": "evaluation"}, [{"mode": "evaluation"}]),
        (grasp, {}, [{}, {}]),
        (grasp, {"temperature": 9.0}, [{"temperature": 9.0}] * 2),  # of g, and of H
        (grasp, {"temperature": 1.0, "mode": "evaluation"}, [{"mode": "evaluation"}] * 2),
        (synflow, {"statistics": "neutral"}, [{}]),
        (synflow, {"statistics": "running"}, [{"statistics": "running"}]),
    ],
)
def test_a_score_asks_for_what_its_options_change_and_no_more(score, options, expected):
    assert asked(score, **options) == expected


def test_every_option_of_every_score_has_a_default_that_needs_no_mention():
    for score in SCORES.values():
        assert score_options(score, {}) == {}
    assert score_options(grasp, {"temperature": 1, "mode": "training"}) == {}
    assert score_options(grasp, {"temperature": 2, "mode": "evaluation"}) == {"mode": "evaluation", "temperature": 2.0}


def test_a_score_of_ones_own_may_use_any_kind_of_parameter():
    @needs("batches")
    def score(evidence, kind: Literal["a", "b"] = "a", *, power: Positive = 2.0, anything=None, **rest):
        return {}

    given = {"anything": [1], "power": 3, "kind": "b"}
    assert score_options(score, given) == {"kind": "b", "power": 3.0, "anything": [1]}
    with pytest.raises(
        ValueError, match=r"^score score has no option 'rest': choose kind \('a' or 'b'\), power \(a fin"
    ):
        score_options(score, {"rest": 1})
    with pytest.raises(ValueError, match=r"^kind=True is not known: choose 'a' or 'b'$"):
        score_options(score, {"kind": True})
    with pytest.raises(ValueError, match=r"^power=True is not known: choose a finite number above 0$"):
        score_options(score, {"power": True})


LOSSES = {
    "function": lambda z, y: F.cross_entropy(z, y),
    "smoothed": lambda z, y: F.cross_entropy(input=z, target=y, label_smoothing=0.1),
    "module": lambda z, y: nn.CrossEntropyLoss()(z, y),
    "method": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
    "functional": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
    "torch": lambda z, y: F.nll_loss(torch.log_softmax(input=z, dim=1), y),
    "special": lambda z, y: F.nll_loss(torch.special.log_softmax(z, 1), y),
    "layer": lambda z, y: nn.NLLLoss()(nn.LogSoftmax(1)(z), y),
    "binary": lambda z, y: nn.BCEWithLogitsLoss()(z, F.one_hot(y, 4).double()),
    "two heads": lambda z, y: F.cross_entropy(z, y) + F.cross_entropy(2 * z, y),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_logits_of_each_way_to_write_a_loss_are_divided_once(name):
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 0])
    with (mode := Tempered(8.0)):
        tempered = LOSSES[name](logits, labels)
    mode.check()
    by_hand = LOSSES[name](logits / 8, labels)
    assert torch.equal(tempered, by_hand)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (tempered, by_hand)))
    assert torch.equal(LOSSES[name](logits, labels), LOSSES[name](logits.detach(), labels))  # only within the block
    assert not torch.equal(LOSSES[name](logits, labels), tempered)


def test_attention_and_softmax_are_left_as_they_are():
    attention, x = nn.MultiheadAttention(4, 2), torch.randn(3, 2, 4)
    plain = attention(x, x, x)[0], x.softmax(1), F.gelu(x)
    with Tempered(8.0):
        inside = attention(x, x, x)[0], x.softmax(1), F.gelu(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (
            lambda z, y: z.logsumexp(1).mean(),
            "calls none of cross_entropy, binary_cross_entropy_with_logits, log_softmax",
        ),
        (
            lambda z, y: F.cross_entropy(z.log_softmax(1), y),
            "calls cross_entropy and log_softmax: leave temperature out",
        ),
    ],
)
def test_a_loss_without_known_logits_or_with_two_kinds_is_refused(loss, said):
    with (mode := Tempered(8.0)):
        loss(torch.randn(3, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=f"^temperature=8 divides the logits of one loss function, and .*{said}"):
        mode.check()


def network():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0), nn.ReLU(), nn.Linear(4, 2)).double()
    net[1].running_mean.copy_(torch.tensor([-0.3, 0.1, 0.2, -0.1]))
    net[1].running_var.copy_(torch.tensor([4.0, 0.25, 1.0, 9.0]))
    return net


def test_synaptic_flow_at_running_statistics_subtracts_their_absolute_means():
    net = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    first, second = net[0].weight.detach().abs(), net[3].weight.detach().abs()
    weights = {"0.weight": net[0].weight, "3.weight": net[3].weight}
    flow = synaptic_flow(net, weights, torch.randn(2, 3), "running")
    deviation, mean = torch.tensor([2.0, 0.5, 1.0, 3.0]), torch.tensor([0.3, 0.1, 0.2, 0.1])
    hidden = ((first.sum(1) + net[0].bias.detach().abs() - mean) / deviation).relu()
    passes = (hidden > 0) * second.sum(0) / deviation
    assert torch.allclose(flow["0.weight"], passes[:, None].expand(4, 3))
    assert torch.allclose(flow["3.weight"], hidden.expand(2, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    neutral = synaptic_flow(net, weights, torch.randn(2, 3))
    assert torch.allclose(neutral["0.weight"], second.sum(0)[:, None].expand(4, 3))


def test_on_a_new_network_both_statistics_are_the_same_and_closed_relus_are_refused():
    net = network()
    net[1].reset_running_stats()
    weights = {"0.weight": net[0].weight}
    flows = [synaptic_flow(net, weights, torch.randn(2, 3), kind)["0.weight"] for kind in ("neutral", "running")]
    assert torch.equal(*flows)
    net[1].running_mean.fill_(-1e3)
    with pytest.raises(ValueError, match=r"or running means give none: choose another score, or statistics='neutral'$"):
        synaptic_flow(net, weights, torch.randn(2, 3), "running")
