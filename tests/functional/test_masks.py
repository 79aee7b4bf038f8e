import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.scopes import SCOPES

SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_tensors(shapes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}


def random_masks(shapes, seed, probability=0.5):
    """Random masks with one weight at least in each tensor."""
    generator = torch.Generator().manual_seed(seed)
    masks = {f"t{i}": torch.rand(shape, generator=generator) < probability for i, shape in enumerate(shapes)}
    for mask in masks.values():
        mask.view(-1)[0] = True
    return masks


def bits_of(tensor):
    return tensor.view(INTEGER[tensor.element_size()])


def test_ones_keeps_everything_in_the_shape_of_the_weights():
    weights = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float64)}
    masks = M.ones(weights)
    assert {name: (mask.shape, mask.dtype) for name, mask in masks.items()} == {
        "a": (torch.Size([2, 3]), torch.bool),
        "b": (torch.Size([4]), torch.bool),
    }
    assert M.kept(masks) == {"a": 6, "b": 4}
    assert M.density(masks) == 1.0


def test_density_weighs_tensors_by_their_size():
    masks = {"big": torch.ones(30, dtype=torch.bool), "small": torch.zeros(10, dtype=torch.bool)}
    masks["small"][:2] = True
    assert M.kept(masks) == {"big": 30, "small": 2}
    assert M.density(masks) == 0.8


@pytest.mark.parametrize(
    ("alive", "rate", "rounds", "left"),
    [
        (10, 0.2, 1, 8),
        (8, 0.2, 1, 6),  # round(1.6) = 2
        (6, 0.2, 1, 5),  # round(1.2) = 1
        (10, 0.2, 3, 5),
        (266_200, 0.2, 1, 212_960),
        (2, 0.2, 50, 2),  # round(0.4) = 0: nothing more to remove
        (1, 0.99, 9, 1),
        (7, 0.0, 5, 7),
        (100, 0.999, 1, 1),
    ],
)
def test_survivors_of_rounded_levels(alive, rate, rounds, left):
    assert M.survivors(alive, rate, rounds) == left


@given(st.integers(1, 10**7), st.floats(0, 0.999), st.integers(0, 30))
def test_survivors_of_many_rounds_are_those_of_one_round_after_another(alive, rate, rounds):
    one_by_one = alive
    for _ in range(rounds):
        before, one_by_one = one_by_one, M.survivors(one_by_one, rate)
        assert 1 <= one_by_one <= before
    assert M.survivors(alive, rate, rounds) == one_by_one


def test_two_of_ten_are_removed_at_rate_one_fifth_and_they_are_the_smallest():
    scores = {"w": torch.tensor([5.0, 0.3, 2.0, 9.0, 0.1, 4.0, 7.0, 1.0, 8.0, 3.0])}
    new = M.keep_highest(scores, M.ones(scores), {("w",): M.survivors(10, 0.2)})
    assert (~new["w"]).nonzero().flatten().tolist() == [1, 4]


def test_constant_scores_are_removed_from_the_lowest_index_up():
    scores = {"w": torch.full((3, 4), 2.5)}
    new = M.keep_highest(scores, M.ones(scores), {("w",): 7})
    assert new["w"].flatten().tolist() == [False] * 5 + [True] * 7


def test_constant_scores_of_a_group_are_removed_in_the_order_of_its_names():
    scores = {"a": torch.ones(4), "b": torch.ones(2, 2)}
    new = M.keep_highest(scores, M.ones(scores), {("b", "a"): 3})
    assert list(new) == ["a", "b"]
    assert new["b"].flatten().tolist() == [False] * 4
    assert new["a"].tolist() == [False, True, True, True]


def test_ties_among_survivors_pass_over_what_is_pruned_already():
    masks = {"w": torch.tensor([True, False, True, True, True])}
    new = M.keep_highest({"w": torch.zeros(5)}, masks, {("w",): 2})
    assert new["w"].tolist() == [False, False, False, True, True]


@given(SHAPES, st.integers(0, 10**6), st.floats(0, 0.95), st.integers(1, 8), st.booleans(), st.sampled_from(FLOATS))
def test_counts_are_exact_and_no_pruned_weight_returns_over_many_levels(shapes, seed, rate, levels, together, dtype):
    masks = random_masks(shapes, seed, 0.9)
    for level in range(levels):
        scores = random_tensors(shapes, seed + level, dtype)
        alive = M.kept(masks)
        groups = [tuple(masks)] if together else [(name,) for name in masks]
        budget = {group: M.survivors(sum(alive[name] for name in group), rate) for group in groups}
        new = M.keep_highest(scores, masks, budget)
        assert {name: mask.shape for name, mask in new.items()} == {name: mask.shape for name, mask in masks.items()}
        for group, keep in budget.items():
            assert sum(M.kept(new)[name] for name in group) == keep >= 1
            kept = torch.cat([scores[name][new[name]] for name in group])
            removed = torch.cat([scores[name][masks[name] & ~new[name]] for name in group])
            assert not len(removed) or removed.max() <= kept.min()
        for name in masks:
            assert not (new[name] & ~masks[name]).any()
            assert together or new[name].any()
        masks = new


def test_keeping_all_survivors_changes_nothing_and_keeps_the_argument_whole():
    masks = random_masks([(5, 4), (7,)], 3)
    before = {name: mask.clone() for name, mask in masks.items()}
    new = M.keep_highest(random_tensors([(5, 4), (7,)], 4), masks, {(name,): n for name, n in M.kept(masks).items()})
    for name, mask in before.items():
        assert torch.equal(new[name], mask)
        assert torch.equal(masks[name], mask)
    new = M.keep_highest(random_tensors([(5, 4), (7,)], 4), masks, {(name,): 1 for name in masks})
    assert M.kept(new) == {"t0": 1, "t1": 1}
    assert all(torch.equal(masks[name], mask) for name, mask in before.items())


@pytest.mark.parametrize("keep", [-1, 0, 4, 5])
def test_a_budget_outside_one_to_survivors_is_refused(keep):
    masks = {"layer.weight": torch.tensor([True, True, True, False, False])}
    with pytest.raises(ValueError, match=rf"cannot keep {keep} of the 3 surviving weights of layer\.weight$"):
        M.keep_highest({"layer.weight": torch.rand(5)}, masks, {("layer.weight",): keep})


def test_an_empty_mask_has_nothing_to_keep():
    masks = {"w": torch.zeros(4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="cannot keep 1 of the 0 surviving weights of w"):
        M.keep_highest({"w": torch.rand(4)}, masks, {("w",): 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused_by_the_name_of_its_tensor(value):
    scores = {"fine.weight": torch.rand(6), "broken.weight": torch.rand(2, 3)}
    scores["broken.weight"][1, 1] = value
    with pytest.raises(ValueError, match=r"^scores of broken\.weight are not finite"):
        M.keep_highest(scores, M.ones(scores), {tuple(scores): 5})


def test_the_score_of_a_pruned_weight_may_be_anything():
    scores = {"w": torch.tensor([float("nan"), 3.0, float("inf"), 1.0, 2.0])}
    masks = {"w": torch.tensor([False, True, False, True, True])}
    assert M.keep_highest(scores, masks, {("w",): 2})["w"].tolist() == [False, True, False, False, True]


def test_a_channels_last_tensor_is_ranked_as_its_contiguous_copy():
    scores = torch.randint(0, 4, (4, 3, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    layered = scores.contiguous(memory_format=torch.channels_last)
    assert layered.stride() != scores.stride()
    plain = M.keep_highest({"w": scores}, {"w": torch.ones_like(scores, dtype=torch.bool)}, {("w",): 123})["w"]
    mask = {"w": torch.ones_like(layered, dtype=torch.bool)}  # in channels_last, too
    assert torch.equal(M.keep_highest({"w": layered}, mask, {("w",): 123})["w"], plain)
    assert int(plain.sum()) == 123


def test_float64_scores_are_ranked_beyond_float32_resolution():
    scores = 1 + 1e-13 * torch.tensor([3, 1, 4, 2, 0], dtype=torch.float64)
    assert len(scores.float().unique()) == 1
    new = M.keep_highest({"w": scores}, {"w": torch.ones(5, dtype=torch.bool)}, {("w",): 2})
    assert new["w"].tolist() == [True, False, True, False, False]


def test_a_group_of_mixed_precision_is_ranked_in_the_widest():
    scores = {"half": torch.tensor([1.0, 3.0], dtype=torch.bfloat16), "double": torch.tensor([1 + 1e-12, 2.0]).double()}
    scores["double"][0] = 1 + 1e-12
    new = M.keep_highest(scores, M.ones(scores), {("double", "half"): 3})
    assert (new["half"].tolist(), new["double"].tolist()) == ([False, True], [True, True])


def test_bfloat16_ties_are_broken_by_index():
    scores = {"w": torch.tensor([1.0, 1.001, 1.002, 2.0], dtype=torch.bfloat16)}  # the first three round to 1
    assert M.keep_highest(scores, M.ones(scores), {("w",): 2})["w"].tolist() == [False, False, True, True]


@pytest.mark.usefixtures("global_rng_untouched")
def test_shuffled_keeps_the_counts_per_layer_and_depends_on_the_generator_alone():
    masks = random_masks([(30, 20), (5, 4, 3, 3), (50,)], 0, 0.3)
    first = M.shuffled(masks, torch.Generator().manual_seed(5))
    torch.testing.assert_close(M.shuffled(masks, torch.Generator().manual_seed(5)), first, rtol=0, atol=0)
    assert M.kept(first) == M.kept(masks)
    assert M.digest(first) != M.digest(masks)
    assert M.digest(first) != M.digest(M.shuffled(masks, torch.Generator().manual_seed(6)))
    assert [mask.shape for mask in first.values()] == [mask.shape for mask in masks.values()]


def test_shuffled_reaches_every_place_equally_often():
    masks = {"w": torch.tensor([True] * 3 + [False] * 9)}
    generator = torch.Generator().manual_seed(0)
    total = sum(M.shuffled(masks, generator)["w"].int() for _ in range(2000))
    assert (total.double() / 2000 - 0.25).abs().max() < 4 * (0.25 * 0.75 / 2000) ** 0.5


@given(SHAPES, st.integers(0, 10**6), st.floats(0, 1))
def test_random_like_keeps_the_total_and_one_a_tensor_at_least(shapes, seed, probability):
    masks = random_masks(shapes, seed, probability)
    new = M.random_like(masks, torch.Generator().manual_seed(seed))
    assert sum(M.kept(new).values()) == sum(M.kept(masks).values())
    assert min(M.kept(new).values()) >= 1
    assert {name: mask.shape for name, mask in new.items()} == {name: mask.shape for name, mask in masks.items()}
    assert M.digest(new) == M.digest(M.random_like(masks, torch.Generator().manual_seed(seed)))


@pytest.mark.usefixtures("global_rng_untouched")
def test_random_like_spreads_the_total_over_layers_by_their_size():
    masks = {"big": torch.zeros(300, 100, dtype=torch.bool), "small": torch.ones(100, 100, dtype=torch.bool)}
    new = M.kept(M.random_like(masks, torch.Generator().manual_seed(0)))
    assert sum(new.values()) == 10_000
    assert abs(new["big"] - 7_500) < 4 * 40  # standard deviation of the hypergeometric count: 37.5
    assert new != M.kept(M.random_like(masks, torch.Generator().manual_seed(1)))


@given(SHAPES, st.integers(0, 10**6), st.data())
def test_digests_are_equal_exactly_for_equal_masks(shapes, seed, data):
    masks = random_masks(shapes, seed)
    copy = {name: masks[name].clone() for name in reversed(masks)}
    assert M.digest(copy) == M.digest(masks)
    name = data.draw(st.sampled_from(sorted(masks)))
    place = data.draw(st.integers(0, masks[name].numel() - 1))
    copy[name].view(-1)[place] ^= True
    assert M.digest(copy) != M.digest(masks)
    copy[name].view(-1)[place] ^= True
    assert M.digest(copy) == M.digest(masks)


def test_digest_sees_names_and_shapes_but_not_the_memory_layout():
    mask = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    digest = M.digest({"w": mask})
    assert M.digest({"w": mask.contiguous(memory_format=torch.channels_last)}) == digest
    assert M.digest({"v": mask}) != digest
    assert M.digest({"w": mask.reshape(4, 12)}) != digest
    assert M.digest({"w": mask, "v": mask}) != digest
    assert len(digest) == 64


@pytest.mark.parametrize("dtype", FLOATS)
def test_as_bits_sets_all_bits_where_kept(dtype):
    bits = M.as_bits(torch.tensor([True, False]), torch.zeros(2, dtype=dtype))
    assert bits.dtype == INTEGER[dtype.itemsize]
    assert bits.tolist() == [-1, 0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_as_bits_leaves_the_mask_alone(dtype):
    mask = torch.tensor([True, False])
    M.as_bits(mask, torch.zeros(2, dtype=dtype))
    assert mask.tolist() == [True, False]


@pytest.mark.parametrize("dtype", FLOATS)
@given(st.lists(st.tuples(st.floats(width=32), st.booleans()), min_size=1, max_size=30))
def test_zero_pruned_gives_plus_zero_and_leaves_kept_bits_alone(dtype, entries):
    special = [(v, k) for v in (float("nan"), float("inf"), -float("inf"), -0.0, -1.5, 1e-45) for k in (True, False)]
    values, kept = zip(*entries, *special, strict=True)
    tensor, mask = torch.tensor(values, dtype=torch.float64).to(dtype), torch.tensor(kept)
    before = tensor.clone()
    M.zero_pruned_(tensor, M.as_bits(mask, tensor))
    assert torch.equal(bits_of(tensor)[mask], bits_of(before)[mask])
    assert (bits_of(tensor)[~mask] == 0).all()


def test_zero_pruned_works_in_place_on_views_parameters_and_channels_last():
    mask = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    parameter = torch.nn.Parameter(-torch.ones(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    address = parameter.data_ptr()
    M.zero_pruned_(parameter, M.as_bits(mask, parameter))
    assert parameter.data_ptr() == address
    assert parameter.is_leaf
    assert parameter.requires_grad
    assert torch.equal(parameter.detach(), torch.where(mask, -1.0, 0.0))
    base = -torch.ones(6, 8)
    M.zero_pruned_(base[::2, ::2], M.as_bits(torch.zeros(3, 4, dtype=torch.bool), base))
    assert int((base == 0).sum()) == 12
    assert (base[::2, ::2] == 0).all()


def test_a_tensor_that_is_empty_already_keeps_nothing():
    masks = {"a": torch.zeros(3, dtype=torch.bool), "b": torch.ones(4, dtype=torch.bool)}
    scores = {name: torch.arange(mask.numel()).float() for name, mask in masks.items()}
    for scope in SCOPES.values():
        new = M.keep_highest(scores, masks, scope(masks, {"a": 0.5, "b": 0.5}, 1))
        assert M.kept(new) == {"a": 0, "b": 2}
    with pytest.raises(ValueError, match="cannot keep 0 of the 4 surviving weights of b"):
        M.keep_highest(scores, masks, {("a",): 0, ("b",): 0})
