"""Edge-popup's pure parts: exact counts with ties in any layout, draws by name alone, the straight-through rule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import popup


def reference(scores, kept):
    """By a stable full sort: of equal scores the lowest index."""
    flat = scores.abs().contiguous().flatten().double()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[(-flat).argsort(stable=True)[:kept]] = True
    return mask.view(scores.shape)


FEW = [-1.0, -0.5, -0.0, 0.0, 0.5, 1.0]  # many ties, and both zeros


@given(st.lists(st.sampled_from([*FEW, 1e-40, 3e38]), min_size=1, max_size=40), st.data())
def test_exactly_as_many_as_asked_are_kept_and_ties_go_to_the_lowest_index(values, data):
    scores, kept = torch.tensor(values), data.draw(st.integers(1, len(values)))
    assert torch.equal(popup.highest({"a": scores}, {("a",): kept})["a"], reference(scores, kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [popup.MANY, popup.MANY + 1, 5 * popup.MANY])
@pytest.mark.parametrize("draw", ["normal", "few values", "one value", "all magnitudes"])
def test_large_tensors_are_selected_from_as_a_full_sort_does(dtype, size, draw):
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(size, generator=generator)
    if draw == "few values":
        scores = torch.tensor(FEW)[torch.randint(len(FEW), (size,), generator=generator)]
    elif draw == "one value":
        scores = torch.full((size,), -0.25)
    elif draw == "all magnitudes":
        scores = scores * 10 ** torch.linspace(-40, 4 if dtype == torch.float16 else 37, size)  # subnormal ones too
    scores = scores.to(dtype)
    for kept in (1, 2, size // 2, size - 1, size):
        assert torch.equal(popup.highest({"a": scores}, {("a",): kept})["a"], reference(scores, kept)), kept
        assert popup.kth_highest(scores.abs(), kept) == scores.abs().sort(descending=True).values[kept - 1]


def test_channels_last_scores_give_the_mask_of_contiguous_ones():
    scores = torch.tensor(FEW)[torch.randint(len(FEW), (8, 6, 3, 3), generator=torch.Generator().manual_seed(0))]
    last = scores.contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    (mask,) = popup.highest({"a": last}, {("a",): 100}).values()
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == 100
    assert torch.equal(mask, popup.highest({"a": scores}, {("a",): 100})["a"])
    assert torch.equal(mask, reference(scores, 100))


def test_a_group_is_ranked_together_in_the_order_of_its_names():
    scores = {"a": torch.tensor([[1.0, 3.0], [2.0, 2.0]]), "b": torch.tensor([-2.0, 2.0, 9.0])}
    masks = popup.highest(scores, popup.budget({"a": 4, "b": 3}, 3 / 7, "global"))
    assert masks["a"].tolist() == [[False, True], [True, True]]
    assert masks["b"].tolist() == [False, False, True]


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1, exclude_max=True))
def test_budgets_are_exact(first, second, sparsity):
    layerwise = popup.budget({"a": first, "b": second}, sparsity, "layerwise")
    assert layerwise == {(n,): max(1, size - round(sparsity * size)) for n, size in (("a", first), ("b", second))}
    whole = first + second
    expected = {("a", "b"): max(1, whole - round(sparsity * whole))}
    assert popup.budget({"a": first, "b": second}, sparsity, "global") == expected


@pytest.mark.parametrize("size", [10, 2 * popup.MANY])
@pytest.mark.parametrize("kept", [1, 4, 10])
@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_scores_that_are_no_numbers_are_refused_by_name(size, kept, wrong):
    scores = {"fine": torch.ones(4), "torn": torch.linspace(0, 1, size)}
    scores["torn"][3] = wrong
    with pytest.raises(ValueError, match=r"^scores of torn are not finite: lower the learning rate"):
        popup.highest(scores, {("fine", "torn"): kept})


# ---- draws

SHAPES = {"dense": (200, 300), "group conv": (64, 16, 3, 3), "conv1d": (128, 40, 5)}
FAN_IN = {"dense": 300, "group conv": 144, "conv1d": 200}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("density", [0.5, 0.25])
def test_random_weights_have_the_variance_that_their_name_says(name, density):
    shape, fan_in = torch.Size(SHAPES[name]), FAN_IN[name]
    for scaled in ("", "scaled_"):
        deviation = math.sqrt(2 / (fan_in * (density if scaled else 1)))
        normal = popup.random_weights(name, shape, f"{scaled}kaiming_normal", density, 0)
        assert normal.mean().item() == pytest.approx(0, abs=5 * deviation / math.sqrt(normal.numel()))
        assert normal.std().item() == pytest.approx(deviation, rel=0.02)
        assert (normal.abs() > 1.96 * deviation).float().mean().item() == pytest.approx(0.05, abs=0.01)
        constant = popup.random_weights(name, shape, f"{scaled}signed_constant", density, 0)
        assert set(constant.unique().tolist()) == {torch.tensor(s * deviation).item() for s in (-1, 1)}
        assert torch.equal(constant > 0, normal > 0)


def test_scaling_is_by_the_kept_fraction_and_not_by_the_removed_one():
    """The published code multiplies fan_in by 1 - density: at a sparsity of .75 that is 3 times the variance."""
    shape = torch.Size((4, 100))
    scaled, plain = (popup.random_weights("a", shape, f"{s}signed_constant", 0.25, 0) for s in ("scaled_", ""))
    assert (scaled / plain).flatten().tolist() == pytest.approx([2.0] * 400)


def test_draws_depend_on_seed_and_name_alone(global_rng_untouched):
    def draw(name, seed):
        return popup.random_weights(name, torch.Size((3, 5)), "kaiming_normal", 1.0, seed)

    first = draw("a", 0)
    draw("b", 0)
    assert torch.equal(draw("a", 0), first)
    assert not torch.equal(draw("b", 0), first)
    assert not torch.equal(draw("a", 1), first)
    scores = popup.initial_scores("a", first, "kaiming_uniform", 0)
    assert torch.equal(popup.initial_scores("a", first, "kaiming_uniform", 0), scores)
    assert not torch.equal(popup.initial_scores("a", first, "kaiming_uniform", 1), scores)


def test_initial_scores_are_uniform_or_the_magnitudes():
    weights = popup.random_weights("a", torch.Size((64, 16, 3, 3)), "kaiming_normal", 1.0, 0)
    scores = popup.initial_scores("a", weights, "kaiming_uniform", 0)
    assert 0.99 / 12 < scores.max() <= 1 / 12  # fan_in 144
    assert -1 / 12 <= scores.min() < -0.99 / 12
    assert scores.var().item() == pytest.approx((2 / 12) ** 2 / 12, rel=0.03)
    magnitude = popup.initial_scores("a", weights.bfloat16(), "magnitude", 0)
    assert magnitude.dtype == torch.float32
    assert torch.equal(magnitude, weights.bfloat16().abs().float())


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_shifted_scores_begin_with_exactly_their_sparsity_and_keep_their_order(sparsity):
    scores = torch.randn((30, 7), generator=torch.Generator().manual_seed(0))
    moved = popup.shifted(scores, sparsity)
    assert int(popup.positive({"a": moved})["a"].sum()) == max(1, 210 - round(sparsity * 210))
    assert torch.equal(moved.flatten().argsort(), scores.flatten().argsort())


# ---- the gradient


class Popup(torch.autograd.Function):
    """The published one, written anew: forward a mask, backward the identity."""

    @staticmethod
    def forward(ctx, scores, kept):
        return reference(scores, kept).to(scores.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("signed", [False, True])
def test_the_gradient_is_the_straight_through_one(signed):
    generator = torch.Generator().manual_seed(0)
    weights, inputs = torch.randn((5, 7), generator=generator), torch.randn((3, 7), generator=generator)
    scores = torch.randn((5, 7), generator=generator)
    scores[0, :3] = 0
    scores.requires_grad_()
    sparse = weights * Popup.apply(scores if signed else scores.abs(), 20)
    sparse.retain_grad()
    torch.nn.functional.linear(inputs, sparse).square().sum().backward()
    own = popup.straight_through_(sparse.grad.clone(), weights, scores.detach(), signed)
    assert torch.equal(own, scores.grad)
    assert bool(own[0, :3].any()) == signed
