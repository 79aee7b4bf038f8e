import warnings

import pytest
import torch
from torch import nn

from lottery_callbacks import Pruning
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.scores import Evidence


class Zoo(nn.Module):
    """A parameter of every kind."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 4)
        self.conv = nn.Conv2d(3, 8, 3)
        self.batch_norm = nn.BatchNorm2d(8)
        self.hidden = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 6, bias=False)])
        self.layer_norm = nn.LayerNorm([6, 6])
        self.attention = nn.MultiheadAttention(6, 2, add_bias_kv=True)
        self.gru = nn.GRU(6, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(6))
        self.prompt = nn.Parameter(torch.ones(2, 6))
        self.output = nn.Linear(5, 4)


PRUNABLE = [
    "conv.weight",
    "hidden.0.weight",
    "hidden.1.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "gru.weight_ih_l0",
    "gru.weight_hh_l0",
    "output.weight",
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(module, rule):
    return M.ones(rule.prunable(module))


def weights_of(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def test_weight_matrices_are_prunable_by_default_in_the_modules_order():
    module = Zoo()
    prunable = Pruning().prunable(module)
    assert [name for name, _ in module.named_parameters() if name in prunable] == list(prunable)
    assert sorted(prunable) == sorted(PRUNABLE)
    assert prunable["conv.weight"] is module.conv.weight


def test_everything_else_is_left_out_with_its_reason():
    module = Zoo()
    reasons = Pruning(exclude=["output.*"]).excluded(module)
    assert reasons == {
        "words.weight": "embedding",
        "conv.bias": "bias",
        "batch_norm.weight": "norm layer",
        "batch_norm.bias": "norm layer",
        "hidden.0.bias": "bias",
        "layer_norm.weight": "norm layer",
        "layer_norm.bias": "norm layer",
        "attention.in_proj_bias": "bias",
        "attention.out_proj.bias": "bias",
        "attention.bias_k": "bias",
        "attention.bias_v": "bias",
        "gru.bias_ih_l0": "bias",
        "gru.bias_hh_l0": "bias",
        "frozen.weight": "frozen",
        "frozen.bias": "bias",
        "scale": "no weight matrix",
        "prompt": "embedding",
        "output.weight": "excluded",
        "output.bias": "excluded",
    }
    assert not set(reasons) & set(Pruning(exclude=["output.*"]).prunable(module))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.BatchNorm1d(3), "norm layer"),
        (nn.InstanceNorm2d(3, affine=True), "norm layer"),
        (nn.SyncBatchNorm(3), "norm layer"),
        (nn.GroupNorm(1, 3), "norm layer"),
        (nn.RMSNorm([3, 3]), "norm layer"),
        (nn.LayerNorm([3, 3]), "norm layer"),
        (nn.EmbeddingBag(3, 3), "embedding"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_norm_layer_and_embedding_is_known(layer, reason):
    module = nn.Sequential(layer, nn.Linear(3, 3))
    assert Pruning().excluded(module)["0.weight"] == reason


def test_exclude_takes_names_and_patterns_and_wins_over_include():
    rule = Pruning(exclude=["hidden.*", "gru.weight_ih_l0"], include=["hidden.0.weight", "hidden.1.weight"])
    rule.check(Zoo())
    left = set(PRUNABLE) - set(rule.prunable(Zoo()))
    assert left == {"hidden.0.weight", "hidden.1.weight", "gru.weight_ih_l0"}


def test_include_brings_back_norm_layers_biases_embeddings_and_others():
    asked = ["words.weight", "batch_norm.*", "conv.bias", "scale", "frozen.weight"]
    rule = Pruning(include=asked)
    rule.check(Zoo())
    extra = set(rule.prunable(Zoo())) - set(PRUNABLE)
    assert extra == {"words.weight", "batch_norm.weight", "batch_norm.bias", "conv.bias", "scale", "frozen.weight"}


def test_included_norm_layers_and_biases_are_really_pruned():
    module = nn.Sequential(nn.Linear(4, 10), nn.BatchNorm1d(10))
    rule = Pruning(include=["1.weight", "0.bias"])
    masks = rule.next_masks(Evidence(weights_of(module), generator()), dense(module, rule), 0.2)
    assert M.kept(masks) == {"0.weight": 32, "0.bias": 8, "1.weight": 8}
    assert masks["1.weight"].tolist() == [False] * 2 + [True] * 8  # a fresh norm layer is constant: ties by index


def test_tied_weights_count_once():
    module = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    module["second"].weight = module["first"].weight
    assert list(Pruning().prunable(module)) == ["first.weight"]
    assert M.density(dense(module, Pruning())) == 1
    assert sum(M.kept(dense(module, Pruning())).values()) == 16


def test_rates_match_by_name_or_pattern_and_the_last_match_wins():
    rule = Pruning(rates={"*": 0.5, "hidden.*": 0.3, "hidden.1.weight": 0.0})
    assert [rule.rate_of(name, 0.2) for name in ("conv.weight", "hidden.0.weight", "hidden.1.weight")] == [0.5, 0.3, 0]
    assert Pruning(rates={"*output.weight": 0.1}).rate_of("network.output.weight", 0.2) == 0.1
    assert Pruning().rate_of("anything", 0.2) == 0.2


def test_a_layer_of_rate_zero_stays_dense_while_the_others_are_pruned():
    module = nn.ModuleDict({"hidden": nn.Linear(10, 10), "output": nn.Linear(10, 5)})
    rule = Pruning(rates={"*output.weight": 0})
    masks = dense(module, rule)
    for kept in (80, 64, 51):
        masks = rule.next_masks(Evidence(weights_of(module), generator()), masks, 0.2)
        assert M.kept(masks) == {"hidden.weight": kept, "output.weight": 50}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": ["conv2.weight"]}, r"^exclude names 'conv2\.weight'.*: there are scale, .* and 18 more$"),
        ({"include": ["*.gamma"]}, r"^include names '\*\.gamma'.*: there are scale, prompt, words\.weight, "),
        ({"rates": {"*outputs*": 0.1}}, r"^rates names '\*outputs\*', which is no .*: there are conv\.weight, "),
        ({"rates": {"batch_norm.weight": 0.1}}, r"^rates names 'batch_norm\.weight'"),
        ({"rates": {"output.weight": 0.1}, "exclude": ["output.weight"]}, r"^rates names 'output\.weight'"),
        ({"exclude": ["*"]}, r"nothing to prune: no trainable weight matrix is left; name parameters in `include`"),
    ],
)  # fmt: skip
def test_a_pattern_that_matches_nothing_is_refused_with_the_layers_there_are(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        Pruning(**arguments).check(Zoo())
    assert "\n" not in str(error.value)


def test_a_network_without_weight_matrices_has_nothing_to_prune():
    with pytest.raises(ValueError, match="nothing to prune"):
        Pruning().check(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3).requires_grad_(False)))


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_a_rate_outside_zero_to_one_is_refused_by_its_layer(rate):
    with pytest.raises(ValueError, match=rf"^the rate of 'a\.weight' is {rate}: a rate lies in \[0, 1\)"):
        Pruning(rates={"b.weight": 0.5, "a.weight": rate})


def test_unknown_scores_and_scopes_are_refused_with_the_choices():
    with pytest.raises(
        ValueError, match=r"^score='size' is not known: choose one of magnitude, random, .*, movement, or give a f"
    ):
        Pruning(score="size")
    with pytest.raises(ValueError, match=r"^scope='layer' is not known: choose one of layerwise, global, erk$"):
        Pruning(scope="layer")


def test_a_score_of_ones_own_decides_what_is_kept():
    def smallest(evidence):
        return {name: -weight.abs() for name, weight in evidence.weights.items()}

    module = nn.Sequential(nn.Linear(5, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[9.0, -1.0, 5.0, 2.0, -8.0], [3.0, 4.0, 7.0, -6.0, 0.5]]))
    weights, rule = weights_of(module), Pruning(score=smallest)
    masks = rule.next_masks(Evidence(weights, generator()), dense(module, rule), 0.5)
    assert weights["0.weight"][masks["0.weight"]].abs().sort().values.tolist() == [0.5, 1, 2, 3, 4]
    assert str(rule) == "smallest, layerwise"
    assert str(Pruning(scope="erk")) == "magnitude, erk"


def test_a_score_of_ones_own_sees_the_prunable_weights_and_the_generator():
    seen = {}

    def score(evidence):
        seen["names"], seen["generator"] = list(evidence.weights), evidence.generator
        return {name: weight.abs() for name, weight in evidence.weights.items()}

    module, source = nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2)), generator(8)
    Pruning(score=score).next_masks(Evidence(weights_of(module), source), dense(module, Pruning()), 0.5)
    assert seen["names"] == ["0.weight"]
    assert seen["generator"] is source


def test_scope_global_prunes_small_weights_wherever_they_are():
    weights = {"big": torch.full((10, 10), 2.0), "small": torch.full((10, 10), 0.1)}
    masks = Pruning(scope="global").next_masks(Evidence(weights, generator()), M.ones(weights), 0.25)
    assert M.kept(masks) == {"big": 100, "small": 50}


def test_rates_per_layer_are_refused_by_scopes_of_one_rate():
    module = nn.ModuleDict({"hidden": nn.Linear(10, 10), "output": nn.Linear(10, 5)})
    rule = Pruning(scope="global", rates={"output.weight": 0.1})
    with pytest.raises(ValueError, match=r"^rates per layer need scope='layerwise'; with scope='global'"):
        rule.check(module)
    with pytest.raises(ValueError, match="rates per layer need scope='layerwise'"):
        rule.next_masks(Evidence(weights_of(module), generator()), dense(module, rule), 0.2)


@pytest.mark.parametrize("scope", ["layerwise", "global", "erk"])
def test_one_shot_keeps_the_counts_of_so_many_levels(scope):
    module = nn.ModuleDict({"hidden": nn.Linear(30, 20), "output": nn.Linear(20, 7)})
    rule, weights = Pruning(scope=scope), weights_of(module)
    masks = dense(module, rule)
    for rounds in range(1, 7):
        masks = rule.next_masks(Evidence(weights, generator()), masks, 0.2)
        one_shot = rule.next_masks(Evidence(weights, generator()), dense(module, rule), 0.2, rounds=rounds)
        assert sum(M.kept(one_shot).values()) == sum(M.kept(masks).values())
        if scope == "layerwise":
            assert M.kept(one_shot) == M.kept(masks)


def test_random_scores_depend_on_the_generator_and_magnitude_does_not():
    weights = {"w": torch.randn(20, 20, generator=generator(1))}

    def drawn(score):
        rule = Pruning(score=score)
        return [
            M.digest(rule.next_masks(Evidence(weights, generator(seed)), M.ones(weights), 0.5)) for seed in (0, 0, 1)
        ]

    by_seed = {score: drawn(score) for score in ("random", "magnitude")}
    assert by_seed["random"][0] == by_seed["random"][1] != by_seed["random"][2]
    assert len(set(by_seed["magnitude"])) == 1


def test_a_diverged_layer_is_named():
    module = nn.ModuleDict({"hidden": nn.Linear(4, 4), "output": nn.Linear(4, 2)})
    weights = weights_of(module)
    weights["output.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"scores of output\.weight are not finite: did the training diverge"):
        Pruning().next_masks(Evidence(weights, generator()), dense(module, Pruning()), 0.2)


def test_a_layer_that_would_be_empty_at_the_next_level_is_named_before():
    weights = {"big": torch.full((10, 10), 2.0), "small": torch.full((10, 2), 0.1)}
    rule = Pruning(scope="global")
    with pytest.warns(
        UserWarning, match=r"^layer small is about to collapse: .* at the next pruning, and 8 of 20 now"
    ) as seen:
        masks = rule.next_masks(Evidence(weights), M.ones(weights), 0.1)
    assert M.kept(masks) == {"big": 100, "small": 8}
    assert len(seen) == 1
    with pytest.warns(UserWarning, match=r"^layer small is about to collapse: it keeps 0 weights now"):
        masks = rule.next_masks(Evidence(weights), masks, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what has collapsed is not about to
        rule.next_masks(Evidence(weights), masks, 0.1)


def test_integer_and_boolean_scores_rank_like_numbers():
    weights = {"w": torch.tensor([[4.0, 3.0, 2.0, 1.0]])}
    for score in (
        lambda evidence: {"w": evidence.weights["w"].long()},
        lambda evidence: {"w": evidence.weights["w"] > 2},
    ):
        masks = Pruning(score=score).next_masks(Evidence(weights), M.ones(weights), 0.5)
        assert masks["w"].tolist() == [[True, True, False, False]]


def test_a_score_of_the_loss_without_a_running_fit_is_refused_in_one_line():
    weights = {"w": torch.ones(2, 2)}
    for score, what in (("snip", "the training loss"), ("synflow", "the synaptic flow"), ("movement", "the movement")):
        with pytest.raises(ValueError, match=rf"^the score needs {what}.*, which only a running fit has: choose m"):
            Pruning(score=score).next_masks(Evidence(weights), M.ones(weights), 0.5)
    with pytest.raises(ValueError, match=r"^batches=0: a score of the loss sees one batch at least$"):
        Pruning(score="snip", batches=0)
