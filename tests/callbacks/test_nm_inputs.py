"""N:M runs along the input of each layer: known, declared, or left dense by name."""

import logging

import lightning.pytorch as L
import pytest
import torch
from stranger import quiet, seeded
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import NMPruning, Pruning
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.nm import indivisible, keep_n_of_m
from lottery_callbacks.names import named_parameters
from lottery_callbacks.prunable import input_dim, places


class Conv1D(nn.Module):
    """As in transformers: a linear layer that stores (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.1), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Own(nn.Module):
    """A layer that nobody knows; its matrix is (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.W = nn.Parameter(torch.randn(inputs, outputs) * 0.3)

    def forward(self, x):
        return x @ self.W


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(8, 3, 2)

    def forward(self, x):
        return self.up(x.unsqueeze(2)).flatten(1)


class Task(L.LightningModule):
    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(*layers)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch), batch[:, :3])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(folder, module, callback):
    data = DataLoader(TensorDataset(torch.randn(32, 8)), 8, collate_fn=lambda rows: torch.stack([x for (x,) in rows]))
    quiet(folder, [callback], max_steps=4).fit(module, data)
    return module


def holds(weight, dim, n=2, m=4):
    """Whether each m consecutive weights along `dim` have exactly n that are not 0."""
    return bool(((weight.detach() != 0).movedim(dim, -1).unflatten(-1, (-1, m)).sum(-1) == n).all())


DIMS = [
    (lambda: nn.Linear(8, 4), {"weight": 1}),
    (lambda: nn.Bilinear(8, 4, 2), {"weight": 1}),
    (lambda: nn.Conv2d(8, 4, 3, groups=2), {"weight": 1}),
    (lambda: nn.ConvTranspose2d(8, 4, 3), {"weight": 0}),
    (lambda: nn.LSTM(8, 6, proj_size=4), {"weight_ih_l0": 1, "weight_hh_l0": 1, "weight_hr_l0": 1}),
    (lambda: nn.GRUCell(8, 4), {"weight_ih": 1, "weight_hh": 1}),
    (lambda: nn.MultiheadAttention(8, 2), {"in_proj_weight": 1, "out_proj.weight": 1}),
    (lambda: nn.MultiheadAttention(8, 2, kdim=4), {"q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}),
    (lambda: Conv1D(4, 8), {"weight": 0}),
    (lambda: Own(8, 4), {"W": None}),
    (lambda: parametrizations.weight_norm(nn.ConvTranspose1d(8, 4, 3)), {"parametrizations.weight.original1": 0}),
]


@pytest.mark.parametrize(("make", "dims"), DIMS)
def test_the_input_dimension_of_each_layer(make, dims):
    layer = make()
    held, own = places(layer), named_parameters(layer)
    assert {name: input_dim(held[own[name]]) for name in dims} == dims


def test_tied_weights_have_an_input_dimension_where_their_layers_agree():
    def tied(first, second):
        second.weight = first.weight
        held = places(nn.Sequential(first, second))
        return input_dim(held[first.weight])

    assert tied(nn.Embedding(8, 4), nn.Linear(4, 8)) == 1
    assert tied(nn.Linear(4, 4), Conv1D(4, 4)) is None
    assert tied(nn.Linear(4, 4), nn.Linear(4, 4)) == 1
    assert input_dim(places(nn.Embedding(8, 4)).popitem()[1]) is None


def test_transposed_layers_hold_the_pattern_along_their_own_input(tmp_path):
    module = seeded(0, lambda: Task(Conv1D(8, 8), nn.Linear(8, 8), Up(), nn.Linear(6, 3)))
    fit(tmp_path, module, NMPruning(2, 4))
    conv1d, linear, up = module.net[0].weight, module.net[1].weight, module.net[2].up.weight
    assert holds(conv1d, 0)
    assert not holds(conv1d, 1)
    assert holds(linear, 1)
    assert holds(up, 0)  # (in 8, out 3, 2)


def test_what_nobody_knows_stays_dense_and_is_named_unless_it_is_declared(tmp_path, caplog):
    def run(**options):
        module, callback = seeded(0, lambda: Task(Own(8, 8), Own(8, 8), nn.Linear(8, 3))), NMPruning(2, 4, **options)
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning.pytorch"):
            fit(tmp_path, module, callback)
        return module, callback

    module, _ = run()
    unknown = "(input dimension unknown: declare it in input_dims)"
    assert f"net.0.W {unknown}, net.1.W {unknown}" in caplog.text
    assert not (module.net[0].W == 0).any()
    assert holds(module.net[2].weight, 1)
    module, callback = run(input_dims={"*W": 1, "net.0.*": 0})  # the last match wins
    assert "unknown" not in caplog.text
    assert holds(module.net[0].W, 0)
    assert not holds(module.net[0].W, 1)
    assert holds(module.net[1].W, 1)
    assert callback.rule["input_dims"] == {"*W": 1, "net.0.*": 0}
    module, _ = run(input_dims={"*": 0})  # before the layer's own: net.2.weight is (3, 8)
    assert holds(module.net[1].W, 0)
    assert "net.2.weight (input of 3, no multiple of 4)" in caplog.text
    assert not (module.net[2].weight == 0).any()


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"*.V": 0}, r"^input_dims names '\*\.V', which is no prunable weight: there are net\.0\.W, net\.1\.weight$"),
        ({"*.W": 2}, r"^input_dims gives net\.0\.W dimension 2, and its shape is \(8, 8\)$"),
        ({"*.W": -3}, r"^input_dims gives net\.0\.W dimension -3, "),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(tmp_path, dims, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Task(Own(8, 8), nn.Linear(8, 3)), NMPruning(input_dims=dims))


def test_where_no_input_is_known_the_weights_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"^nothing to prune to 2:4: there are net\.0\.W \(input dimension unknown: decl"
    ):
        fit(tmp_path, Task(Own(8, 3)), NMPruning())


def test_a_direction_that_is_normalised_along_its_input_stays_dense(tmp_path):
    wrapped = parametrizations.weight_norm(nn.Linear(8, 8), dim=1)
    module = fit(tmp_path, Task(wrapped, nn.Linear(8, 3)), NMPruning(1, 4))
    assert not (wrapped.weight == 0).any()
    assert holds(module.net[1].weight, 1, n=1)
    rows = parametrizations.weight_norm(nn.Linear(8, 3))
    fit(tmp_path, Task(rows), NMPruning(1, 4))
    assert holds(rows.weight, 1, n=1)


def test_gpt2_holds_the_pattern_along_its_inputs():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    network = transformers.GPT2LMHeadModel(config)
    prunable, held = Pruning().prunable(network), places(network)
    dims = {name: input_dim(held[parameter]) for name, parameter in prunable.items()}
    assert set(dims.values()) == {0}
    assert len(dims) == 4
    assert {name: prunable[name].shape[dim] for name, dim in dims.items()} == {
        "transformer.h.0.attn.c_attn.weight": 16, "transformer.h.0.attn.c_proj.weight": 16,
        "transformer.h.0.mlp.c_fc.weight": 16, "transformer.h.0.mlp.c_proj.weight": 64,
    }  # fmt: skip


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_given_dimension_is_the_pattern_of_the_tensor_that_is_moved_there(dim):
    scores = torch.rand(4, 8, 12, generator=torch.Generator().manual_seed(1))
    masks = {"w": torch.rand(4, 8, 12, generator=torch.Generator().manual_seed(2)) < 0.8}
    new = keep_n_of_m({"w": scores}, masks, 1, 4, {"w": dim})["w"]
    moved = keep_n_of_m({"w": scores.movedim(dim, 1)}, {"w": masks["w"].movedim(dim, 1)}, 1, 4)["w"]
    assert torch.equal(new, moved.movedim(1, dim))
    assert new.is_contiguous()
    assert indivisible({"w": masks["w"], "v": M.ones({"v": scores[:, :, :2]})["v"]}, 4, {"v": 2}) == ["v"]
    assert indivisible({"w": masks["w"]}, 5, {"w": dim}) == ["w"]
