"""Which parameters are weight matrices, by any name and in any layer, and why the others are left dense."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lottery_callbacks import Pruning
from lottery_callbacks.functional.slices import WHOLE
from lottery_callbacks.names import named_parameters, owners
from lottery_callbacks.prunable import input_dim, places, slices_of
from lottery_lightning import networks

NOT_A_NAME = nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag


class Holder(nn.Module):
    """A stranger's layer with one parameter."""

    def __init__(self, name, *shape, **options):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(shape, **options), options.get("dtype") is None))


def class_of(name):
    return type(name, (Holder,), {})


def reason(layer, name=None, **rule):
    module = nn.Sequential(layer, nn.Linear(3, 3))
    name = name or next(iter(named_parameters(module)))
    return Pruning(**rule).reason_to_leave(module, name, named_parameters(module)[name])


@pytest.mark.parametrize(
    "name", ["W", "kernel", "lora_A", "A_log", "gate_up_proj", "in_proj_weight", "weight_ih_l0", "_w"]
)
def test_a_matrix_is_pruned_whatever_it_is_called(name):
    assert reason(Holder(name, 3, 4)) is None
    assert reason(Holder(name, 2, 1, 4)) is None


@pytest.mark.parametrize("shape", [(), (5,), (5, 1, 1), (1, 5, 1, 1), (1, 1, 5), (1, 1, 1)])
@pytest.mark.parametrize("name", ["weight", "gamma"])
def test_what_has_one_dimension_greater_than_1_is_a_vector(name, shape):
    assert reason(Holder(name, *shape)) == "no weight matrix"
    assert reason(Holder(name, *shape), include=["0.*"]) is None


@pytest.mark.parametrize("shape", [(5, 1), (1, 5)])
def test_a_single_row_or_column_is_a_matrix_where_it_is_called_weight(shape):
    assert reason(Holder("weight", *shape)) is None
    assert reason(Holder("gain", *shape)) == "no weight matrix"


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Linear(5, 1), "0.weight"), (nn.Linear(1, 5), "0.weight"), (nn.Conv1d(1, 1, 5), "0.weight"),
        (nn.Conv2d(5, 5, 1, groups=5), "0.weight"), (nn.ConvTranspose3d(1, 1, (1, 1, 4)), "0.weight"),
        (nn.Bilinear(1, 1, 5), "0.weight"), (nn.GRU(1, 1), "0.weight_ih_l0"), (nn.LSTMCell(1, 2), "0.weight_hh"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_the_weights_of_torchs_layers_are_matrices_in_any_shape(layer, name):
    assert reason(layer, name) is None


@pytest.mark.parametrize(
    "name", ["pos_embedding", "pos_embed", "pos_emb", "position_embeddings", "rel_pos_h", "positional", "cls_token",
             "query_tokens", "prompt", "patchembed", "embedding_weight"]
)  # fmt: skip
def test_embeddings_of_positions_and_tokens_are_left_dense_by_their_names(name):
    assert reason(Holder(name, 2, 7, 4)) == "embedding"
    assert reason(Holder(name, 2, 7, 4), include=["0.*"]) is None


@pytest.mark.parametrize("name", ["token_mixing", "composed", "opposite", "member", "positive"])
def test_a_name_that_only_sounds_like_one_is_a_matrix(name):
    assert reason(Holder(name, 2, 7)) is None


def test_norms_and_embeddings_of_others_are_known_by_their_classes():
    for name in ("LlamaRMSNorm", "LayerNorm2d", "MyNorm"):
        assert reason(class_of(name)("weight", 3, 4)) == "norm layer"
    for name in ("VocabEmbedding", "PatchEmbeddings"):
        assert reason(class_of(name)("weight", 3, 4)) == "embedding"
    for name in ("NormalizedLinear", "WeightNormLinear", "EmbeddingMixer"):
        assert reason(class_of(name)("weight", 3, 4)) is None


def test_biases_of_any_shape_are_left_dense():
    for name in ("bias", "bias_k", "relative_position_bias_table"):
        assert reason(Holder(name, 3, 4)) == "bias"


def test_lists_and_dicts_of_parameters_and_the_modules_own_are_reached():
    module = nn.Module()
    module.factors = nn.ParameterList(torch.ones(3, 4) for _ in range(2))
    module.pos_embeds = nn.ParameterList([torch.ones(3, 4)])
    module.tables = nn.ParameterDict({"A": torch.ones(2, 3), "bias": torch.ones(2, 3), "g": torch.ones(3)})
    module.own = nn.Parameter(torch.ones(2, 2))
    assert list(Pruning().prunable(module)) == ["own", "factors.0", "factors.1", "tables.A"]
    assert Pruning().excluded(module) == {
        "pos_embeds.0": "embedding", "tables.bias": "bias", "tables.g": "no weight matrix"
    }  # fmt: skip


# ---- parametrised layers


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def normed(wrap, layer=None, **options):
    return nn.Sequential(wrap(layer or nn.Linear(4, 4), **options), nn.Linear(4, 2))


@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.parametrize(
    ("wrap", "gain", "direction"),
    [
        (nn.utils.weight_norm, "0.weight_g", "0.weight_v"),
        (parametrizations.weight_norm, "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
    ],
    ids=["old", "new"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_of_weight_norm_the_direction_is_pruned_and_never_the_gain(wrap, gain, direction, dim):
    module = normed(wrap, dim=dim)
    assert set(Pruning().prunable(module)) == {direction, "1.weight"}
    assert Pruning().excluded(module)[gain] == "gain of weight_norm"
    # torch takes dim=-1 for the norm of the whole tensor
    assert slices_of(module, [direction, "1.weight"]) == {direction: WHOLE if dim is None else dim}
    with pytest.raises(
        ValueError, match=rf"^include names {gain}, which cannot be pruned \(gain of weight_norm\): excl"
    ):
        Pruning(include=["0.*"], exclude=["*bias"]).check(module)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_layer_behind_a_direction_is_known():
    old = nn.utils.weight_norm(nn.LSTM(1, 1), "weight_hh_l0")
    assert reason(old, "0.weight_hh_l0_v") is None
    assert reason(old, "0.weight_hh_l0_g") == "gain of weight_norm"
    for wrap in (nn.utils.weight_norm, parametrizations.weight_norm, nn.utils.spectral_norm):
        module = normed(wrap, nn.ConvTranspose1d(4, 4, 3))
        held, own = places(module), named_parameters(module)
        (name,) = [name for name in Pruning().prunable(module) if name.startswith("0.")]
        assert input_dim(held[own[name]]) == 0


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, parametrizations.spectral_norm], ids=["old", "new"])
def test_of_spectral_norm_the_original_is_pruned(wrap):
    name = "0.weight_orig" if wrap is nn.utils.spectral_norm else "0.parametrizations.weight.original"
    module = normed(wrap)
    assert list(Pruning().prunable(module)) == [name, "1.weight"]
    assert slices_of(module, [name, "1.weight"]) == {name: WHOLE}


def test_other_parametrizations_are_left_dense_by_name():
    name = "0.parametrizations.weight.original"
    orthogonal = normed(parametrizations.orthogonal)
    assert Pruning().excluded(orthogonal)[name] == "orthogonal: zeros in it are not zeros in the weight"
    with pytest.raises(ValueError, match=r"which cannot be pruned \(orthogonal"):
        Pruning(include=["*original"]).check(orthogonal)
    alone = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"nothing to prune: .*0\.parametrizations\.weight\.original \(orthogonal"):
        Pruning().check(alone)

    def symmetric(layer):
        parametrize.register_parametrization(layer, "weight", Symmetric())
        return layer

    assert Pruning().excluded(normed(symmetric))[name] == "parametrized by Symmetric"
    assert list(Pruning(include=[name]).prunable(normed(symmetric))) == [name, "1.weight"]
    both = normed(lambda layer: symmetric(parametrizations.spectral_norm(layer)))
    assert Pruning().excluded(both)[name] == "parametrized by Symmetric"


# ---- tensors that no mask can hold


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.ones(2, 3, dtype=torch.int8), "int8"),
        (lambda: torch.ones(2, 3, dtype=torch.bool), "bool"),
        (lambda: torch.ones(2, 3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.eye(3).to_sparse(), "sparse_coo layout"),
        (lambda: torch.eye(4).to_sparse_csr(), "sparse_csr layout"),
        (lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]), "nested"),
        (lambda: torch.ones(0, 3), "empty"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:.*[Nn]ested", "ignore:.*[Ss]parse CSR", "ignore:.*quantize_per_tensor")
def test_tensors_that_no_mask_can_hold_are_left_dense_and_never_included(make, why):
    module = nn.Sequential(nn.Linear(3, 3))
    module.odd = nn.Parameter(make(), requires_grad=False)
    assert Pruning().excluded(module)["odd"] == why
    Pruning().check(module)
    with pytest.raises(ValueError, match=rf"^include names odd, which cannot be pruned \({why}\): exclude it$"):
        Pruning(include=["odd"]).check(module)


def test_complex_matrices_are_pruned_and_scores_of_real_ones_refused():
    layer = Holder("F", 3, 4)
    layer.F = nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))
    assert reason(layer) is None
    for score in ("grasp", "synflow", "movement"):
        with pytest.raises(ValueError, match=rf"^score {score} ranks real weights, and F is complex: exclude it$"):
            Pruning(score).check(layer)
    Pruning("snip").check(layer)


def test_weights_without_values_are_refused():
    for layer in (nn.LazyLinear(3), nn.Linear(3, 3, device="meta")):
        with pytest.raises(ValueError, match=r"^1\.weight, 1\.bias have no shape yet: run the module on one batch"):
            Pruning().check(nn.Sequential(nn.Linear(2, 2), layer))


def test_a_network_that_torch_prunes_has_no_masks_of_ours_also_where_it_is_compiled():
    def pruned(how, **options):
        inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        how(inner[0], "weight", **options)
        return nn.Sequential(torch.compile(inner))

    class Mine(prune.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t, default_mask):
            return default_mask * (t > 0)

    kinds = [(prune.l1_unstructured, {"amount": 0.5}), (prune.identity, {}), (Mine.apply, {}),
             (prune.ln_structured, {"amount": 0.5, "n": 2, "dim": 0})]  # fmt: skip
    for how, options in kinds:
        with pytest.raises(
            ValueError, match=r"^0\.0\.weight_orig was pruned by torch\.nn\.utils\.prune, whose .*remove"
        ):
            Pruning().initial_masks(pruned(how, **options))
    Pruning(exclude=["0.0.*"]).initial_masks(pruned(prune.identity))


# ---- what was pruned before still is


def before(module):
    """The names that were pruned when only names with "weight" in them were."""
    found = []
    for name, parameter in named_parameters(module).items():
        leaf, held = name.rpartition(".")[2], owners(module, parameter)
        if "weight" in leaf and "bias" not in leaf and parameter.ndim > 1 and parameter.requires_grad:
            found += [] if any(isinstance(holder, NOT_A_NAME) for holder in held) else [name]
    return found


def vision(name):
    return lambda: getattr(pytest.importorskip("torchvision").models, name)(weights=None)


KNOWN = {
    "Dense": (lambda: networks.Dense([6, 5, 3]), 2),
    "LeNet5": (networks.LeNet5, 5),
    "Conv-6": (lambda: networks.Conv(6), 9),
    "ConvNet": (networks.ConvNet, 4),
    "GroupCNN": (networks.GroupCNN, None),
    "MeanField": (lambda: networks.MeanField(6, 5), 1),
    "one output": (lambda: networks.Dense([6, 1, 1]), 2),
    "RedundantDense": (lambda: networks.RedundantDense([6, 5, 3], 4), 4),
    "ResNet20": (lambda: networks.ResNet20(), None),
    "ResNet18": (lambda: networks.ResNet18(4), None),
    "VGG19": (networks.VGG19, None),
    "Transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16), 10),
    "resnet18": (vision("resnet18"), 21),
    "vgg11_bn": (vision("vgg11_bn"), 11),
    "vit_b_16": (vision("vit_b_16"), 50),
    "swin_t": (vision("swin_t"), 53),
    "convnext_tiny": (vision("convnext_tiny"), 59),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_sets_of_known_networks_are_what_they_were(name):
    make, count = KNOWN[name]
    network = make()
    assert list(Pruning().prunable(network)) == before(network)
    assert count in (None, len(before(network)))
