from dataclasses import replace

import pytest
import torch

from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.scores import (
    SCORES,
    Evidence,
    gradient,
    grasp,
    magnitude,
    movement,
    needs,
    random,
    snip,
    synflow,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_magnitude_is_the_absolute_value_and_draws_nothing():
    weights = {"w": torch.nn.Parameter(torch.tensor([[-3.0, 0.5], [-0.0, 2.0]])), "v": torch.tensor([-1.0]).double()}
    source = generator(4)
    scores = magnitude(Evidence(weights, source))
    assert scores["w"].tolist() == [[3.0, 0.5], [0.0, 2.0]]
    assert scores["v"].dtype == torch.float64
    assert not scores["w"].requires_grad
    assert weights["w"].tolist() == [[-3.0, 0.5], [0.0, 2.0]]
    assert torch.equal(source.get_state(), generator(4).get_state())


def test_large_negative_weights_are_kept_and_small_positive_ones_removed():
    weights = {"w": torch.tensor([-10.0, 0.1, 1.0, -0.2, 3.0])}
    new = M.keep_highest(magnitude(Evidence(weights)), M.ones(weights), {("w",): 3})
    assert new["w"].tolist() == [True, False, True, False, True]


def test_a_diverged_weight_is_not_ranked():
    weights = {"layer.weight": torch.tensor([1.0, float("nan"), 2.0])}
    with pytest.raises(ValueError, match=r"layer\.weight"):
        M.keep_highest(magnitude(Evidence(weights)), M.ones(weights), {("layer.weight",): 2})


@pytest.mark.usefixtures("global_rng_untouched")
def test_random_scores_depend_on_the_generator_alone():
    weights = {"w": torch.zeros(40, 5), "v": torch.zeros(7, dtype=torch.bfloat16)}
    others = {name: weight + 9 for name, weight in weights.items()}
    scores = random(Evidence(weights, generator(1)))
    assert {name: score.shape for name, score in scores.items()} == {"w": (40, 5), "v": (7,)}
    for name, score in scores.items():
        assert torch.equal(score, random(Evidence(others, generator(1)))[name])
        assert not torch.equal(score, random(Evidence(weights, generator(2)))[name])


def test_random_scores_are_uniform_and_free_of_ties_also_for_half_precision_weights():
    score = random(Evidence({"w": torch.zeros(100, 100, dtype=torch.bfloat16)}, generator(3)))["w"]
    assert score.min() >= 0
    assert score.max() < 1
    assert abs(float(score.double().mean()) - 0.5) < 4 / (12 * 10_000) ** 0.5
    assert abs(float(score.double().var()) - 1 / 12) < 0.005
    assert len(score.unique()) > 9_990


def network(seed=1):
    """Two layers without biases, their weights by name, and a batch."""
    source = generator(seed)
    weights = {"a": torch.randn(4, 3, generator=source), "b": torch.randn(2, 4, generator=source)}
    weights = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    x, y = torch.randn(6, 3, generator=source).double(), torch.randn(6, 2, generator=source).double()
    return weights, x, y


def evidence_of(weights, x, y, parts=1):
    def losses():
        for inputs, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
            yield ((inputs @ weights["a"].T).tanh() @ weights["b"].T - targets).square().mean()

    return Evidence(weights, losses=losses)


def nudged(evidence, name, index, by):
    """The mean loss with one weight moved."""
    with torch.no_grad():
        evidence.weights[name][index] += by
        loss = float(sum(evidence.losses())) / len(list(evidence.losses()))
        evidence.weights[name][index] -= by
    return loss


@pytest.mark.parametrize("parts", [1, 3])
def test_gradient_and_snip_equal_finite_differences_of_the_mean_loss(parts):
    evidence = evidence_of(*network(), parts)
    slopes, sensitivities = gradient(evidence), snip(evidence)
    for name, weight in evidence.weights.items():
        for index in torch.cartesian_prod(*map(torch.arange, weight.shape)):
            index = tuple(index.tolist())
            slope = (nudged(evidence, name, index, 1e-6) - nudged(evidence, name, index, -1e-6)) / 2e-6
            assert float(slopes[name][index]) == pytest.approx(abs(slope), abs=1e-7)
            # the gate c = 1 on the weight: dL/dc = w dL/dw
            assert float(sensitivities[name][index]) == pytest.approx(abs(slope * weight[index].item()), abs=1e-7)
    assert all(weight.grad is None for weight in evidence.weights.values())


def test_grasp_is_w_times_the_hessian_times_the_gradient():
    weights, x, y = network()
    sizes = [weight.numel() for weight in weights.values()]

    def loss(flat):
        a, b = (part.view(weight.shape) for part, weight in zip(flat.split(sizes), weights.values(), strict=True))
        return ((x @ a.T).tanh() @ b.T - y).square().mean()

    flat = torch.cat([weight.detach().reshape(-1) for weight in weights.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    slope = torch.autograd.functional.jacobian(loss, flat)
    scores = grasp(evidence_of(weights, x, y))
    found = torch.cat([score.reshape(-1) for score in scores.values()])
    assert torch.allclose(found, flat * (hessian @ slope), atol=1e-12)
    # The paper removes the highest of -w Hg: what raises the gradient norm most when it goes is what stays least.
    assert float(found.min()) < 0 < float(found.max())


def test_a_linear_loss_has_no_curvature_and_an_unused_weight_no_gradient():
    weights = {"used": torch.randn(3).requires_grad_(), "unused": torch.randn(2).requires_grad_()}
    evidence = Evidence(weights, losses=lambda: [weights["used"].sum()])
    assert gradient(evidence)["used"].tolist() == [1, 1, 1]
    assert gradient(evidence)["unused"].tolist() == [0, 0]
    assert all(not score.any() for score in grasp(evidence).values())


def test_the_gradient_is_averaged_over_processes_before_its_size_is_taken():
    weights = {"w": torch.tensor([1.0, 1.0]).requires_grad_()}
    evidence = Evidence(
        weights, losses=lambda: [(weights["w"] * torch.tensor([2.0, 3.0])).sum()], average=lambda g: (g - 5) / 2
    )
    assert gradient(evidence)["w"].tolist() == [1.5, 1.0]  # (2 - 5) / 2 and (3 - 5) / 2


def test_synflow_is_the_sum_over_paths_of_products_of_absolute_weights():
    weights, *_ = network()
    a, b = (weight.detach().abs() for weight in weights.values())
    flow = {"a": b.sum(0).unsqueeze(1).expand(4, 3), "b": a.sum(1).expand(2, 4)}  # dR/d|w| of R = 1' |b| |a| 1
    scores = synflow(Evidence(weights, flow=lambda: flow))
    for name, (after, before) in {"a": (b.sum(0), torch.ones(3)), "b": (torch.ones(2), a.sum(1))}.items():
        assert torch.allclose(scores[name], after[:, None] * weights[name].detach().abs() * before[None])
    assert float(scores["a"].sum()) == pytest.approx(float(scores["b"].sum()))  # the flow is conserved over layers


def test_movement_hands_on_what_the_fit_collected():
    moved = {"w": torch.tensor([1.0, -2.0])}
    assert movement(Evidence({"w": torch.zeros(2)}, movement=moved)) == moved


def test_the_registry_names_the_functions_and_what_they_need():
    assert list(SCORES) == ["magnitude", "random", "gradient", "snip", "grasp", "synflow", "movement"]
    assert all(score.__name__ == name for name, score in SCORES.items())
    needed = {name: getattr(score, "needs", None) for name, score in SCORES.items()}
    assert needed == {"magnitude": None, "random": None, "movement": "movement"} | dict.fromkeys(
        ("gradient", "snip", "grasp", "synflow"), "batches"
    )


def test_a_need_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"^needs\('batch'\) is not known: choose batches or movement$"):
        needs("batch")


def test_the_scale_of_the_losses_is_taken_out_of_gradients_and_products():
    evidence = evidence_of(*network())
    scaled = replace(evidence, losses=lambda: (8 * loss for loss in evidence.losses()), scale=8)
    for score in (gradient, snip):
        assert all(torch.allclose(score(scaled)[name], one) for name, one in score(evidence).items())
    vector = {name: torch.ones_like(w) for name, w in evidence.weights.items()}
    products = evidence.hessian_vector(vector)
    assert all(torch.allclose(p, products[name]) for name, p in scaled.hessian_vector(vector).items())
    assert any(p.any() for p in products.values())
