import pytest
import torch

from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.scores import SCORES, magnitude, random


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_magnitude_is_the_absolute_value_and_draws_nothing():
    weights = {"w": torch.nn.Parameter(torch.tensor([[-3.0, 0.5], [-0.0, 2.0]])), "v": torch.tensor([-1.0]).double()}
    source = generator(4)
    scores = magnitude(weights, source)
    assert scores["w"].tolist() == [[3.0, 0.5], [0.0, 2.0]]
    assert scores["v"].dtype == torch.float64
    assert not scores["w"].requires_grad
    assert weights["w"].tolist() == [[-3.0, 0.5], [0.0, 2.0]]
    assert torch.equal(source.get_state(), generator(4).get_state())


def test_large_negative_weights_are_kept_and_small_positive_ones_removed():
    weights = {"w": torch.tensor([-10.0, 0.1, 1.0, -0.2, 3.0])}
    new = M.keep_highest(magnitude(weights, generator()), M.ones(weights), {("w",): 3})
    assert new["w"].tolist() == [True, False, True, False, True]


def test_a_diverged_weight_is_not_ranked():
    weights = {"layer.weight": torch.tensor([1.0, float("nan"), 2.0])}
    with pytest.raises(ValueError, match=r"layer\.weight"):
        M.keep_highest(magnitude(weights, generator()), M.ones(weights), {("layer.weight",): 2})


@pytest.mark.usefixtures("global_rng_untouched")
def test_random_scores_depend_on_the_generator_alone():
    weights = {"w": torch.zeros(40, 5), "v": torch.zeros(7, dtype=torch.bfloat16)}
    others = {name: weight + 9 for name, weight in weights.items()}
    scores = random(weights, generator(1))
    assert {name: score.shape for name, score in scores.items()} == {"w": (40, 5), "v": (7,)}
    for name, score in scores.items():
        assert torch.equal(score, random(others, generator(1))[name])
        assert not torch.equal(score, random(weights, generator(2))[name])


def test_random_scores_are_uniform_and_free_of_ties_also_for_half_precision_weights():
    score = random({"w": torch.zeros(100, 100, dtype=torch.bfloat16)}, generator(3))["w"]
    assert score.min() >= 0
    assert score.max() < 1
    assert abs(float(score.double().mean()) - 0.5) < 4 / (12 * 10_000) ** 0.5
    assert abs(float(score.double().var()) - 1 / 12) < 0.005
    assert len(score.unique()) > 9_990


def test_the_registry_names_the_functions():
    assert SCORES["magnitude"] is magnitude
    assert SCORES["random"] is random
