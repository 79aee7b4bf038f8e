"""Fits of strangers' layers: each is pruned and stays sparse, is named as left dense, or is refused before step 1."""

import logging

import lightning.pytorch as L
import pytest
import torch
from stranger import bits, quiet, raw, seeded
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import (
    ApplyTicket,
    EdgePopup,
    GradualPruning,
    IterativeMagnitudePruning,
    NMPruning,
    Pruning,
    RewindPoint,
    Ticket,
)
from lottery_callbacks.functional import masks as M

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*about to collapse"),
]


class Task(L.LightningModule):
    """A stranger's classifier around any network, trained by SGD with momentum."""

    def __init__(self, network, momentum=0.9):
        super().__init__()
        self.net, self.momentum = network, momentum
        self.started = 0

    def training_step(self, batch, batch_idx):
        self.started += 1
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum)


def loader(tokens=False):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    inputs = torch.randn(40, 8, generator=generator) + labels.unsqueeze(1)
    inputs = torch.randint(0, 11, (40, 3), generator=generator) if tokens else inputs
    return DataLoader(TensorDataset(inputs, labels), batch_size=8, shuffle=True)


def two(wrap=lambda layer: layer):
    return nn.Sequential(wrap(nn.Linear(8, 12)), nn.ReLU(), nn.Linear(12, 4))


def fit(folder, module, callback, tokens=False, **options):
    L.seed_everything(4, verbose=False)
    quiet(folder, [callback], **{"max_steps": 5} | options).fit(module, loader(tokens))
    return module


def callbacks(folder, masks):
    """One of each callback that prunes, by its name."""
    return {
        "IterativeMagnitudePruning": lambda: IterativeMagnitudePruning(run_dir=folder),
        "GradualPruning": lambda: GradualPruning(0.5),
        "NMPruning": lambda: NMPruning(2, 4),
        "EdgePopup": lambda: EdgePopup(0.5),
        "ApplyTicket": lambda: ApplyTicket(Ticket(masks, RewindPoint(0, {}), {"level": 1})),
    }


PRUNERS = ["IterativeMagnitudePruning", "GradualPruning", "NMPruning", "EdgePopup"]
ALL = [*PRUNERS, "ApplyTicket"]


def refusal_of(folder, module, name, masks=None):
    """The message of the refusal, after checking that it came before the first step and changed nothing."""
    fresh = {key: value.clone() for key, value in module.state_dict().items() if not nn.parameter.is_lazy(value)}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the caller looks at the message)
        fit(folder, module, callbacks(folder, masks or {})[name]())
    assert module.started == 0
    assert bits(fresh) == bits({key: module.state_dict()[key] for key in fresh})
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# ---- parametrised layers

WRAPS = {
    "old weight_norm": (nn.utils.weight_norm, "net.0.weight_v"),
    "new weight_norm": (parametrizations.weight_norm, "net.0.parametrizations.weight.original1"),
    "old spectral_norm": (nn.utils.spectral_norm, "net.0.weight_orig"),
    "new spectral_norm": (parametrizations.spectral_norm, "net.0.parametrizations.weight.original"),
}


@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.filterwarnings("ignore:.*more are kept than asked")
def test_a_lottery_over_normalised_layers_prunes_the_weight_and_stays_finite(tmp_path, kind):
    wrap, name = WRAPS[kind]
    module, imp = seeded(1, lambda: Task(two(wrap))), IterativeMagnitudePruning(0.7, run_dir=tmp_path)
    for level in imp.levels(5):
        fit(level.run_dir, module, imp)
        mask = imp.fit_masks[name]
        module.net.eval()(torch.randn(2, 8))  # the older forms compute their weight in forward
        module.net.train()
        weight = module.net[0].weight.detach()
        assert weight.isfinite().all()
        assert torch.equal(weight != 0, mask)
        assert imp.fit_masks.keys() == {name, "net.2.weight"}
    kept = M.kept(imp.fit_masks)
    assert kept["net.2.weight"] == 1
    assert kept[name] == (12 if "weight_norm" in kind else 1)  # one in each of 12 rows, or in the whole


def test_more_is_kept_than_asked_only_where_a_row_would_die_and_a_warning_says_so(tmp_path):
    module = Task(two(parametrizations.weight_norm))
    with torch.no_grad():
        module.net[0].parametrizations.weight.original1.mul_(1e-3)  # ranked below all others
    name, rule = WRAPS["new weight_norm"][1], Pruning(scope="global")
    gradual = GradualPruning(0.75, pruning=rule)
    fit(tmp_path, module, gradual)
    assert M.kept(gradual.masks) == {name: 12, "net.2.weight": 24}  # 36 of 144 as asked: rows first
    assert gradual.masks[name].any(1).all()
    with pytest.warns(
        UserWarning, match=rf"^5 weights more are kept than asked, one in each slice .* of {name}: prune"
    ):
        fit(tmp_path, module, GradualPruning(0.95, pruning=rule))
    assert module.net(torch.randn(2, 8)).isfinite().all()


def test_a_ticket_that_empties_a_row_of_weight_norm_is_refused(tmp_path):
    name = WRAPS["new weight_norm"][1]
    mask = torch.ones(12, 8, dtype=torch.bool)
    mask[3] = False
    message = refusal_of(tmp_path, Task(two(parametrizations.weight_norm)), "ApplyTicket", {name: mask})
    assert message.startswith(
        f"the mask of {name} empties a slice that weight_norm or spectral_norm divides by its norm"
    )


@pytest.mark.parametrize("kind", WRAPS)
def test_edge_popup_refuses_what_is_computed_from_other_parameters(tmp_path, kind):
    wrap, _ = WRAPS[kind]
    message = refusal_of(tmp_path, Task(two(wrap)), "EdgePopup")
    assert message.startswith("net.0")
    assert "make " in message
    if kind == "old weight_norm":
        assert (
            message == "net.0.weight_g is under weight_norm of torch.nn.utils: make it permanent (remove_weight_norm)"
        )


@pytest.mark.parametrize("name", ["IterativeMagnitudePruning", "GradualPruning", "NMPruning"])
def test_where_all_is_orthogonal_nothing_is_left_and_the_reason_says_so(tmp_path, name):
    message = refusal_of(tmp_path, Task(nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 4)))), name)
    assert message.startswith("nothing to prune: no trainable weight matrix is left")
    assert "net.0.parametrizations.weight.original (orthogonal: zeros in it are not zeros in the weight)" in message


# ---- refused before the first step


@pytest.mark.parametrize("name", ALL)
def test_a_network_that_torch_prunes_already_is_refused(tmp_path, name):
    module = Task(two())
    prune.l1_unstructured(module.net[0], "weight", 0.5)
    message = refusal_of(tmp_path, module, name, {"net.0.weight_orig": torch.ones(12, 8, dtype=torch.bool)})
    assert message.startswith("net.0.weight_orig ")
    assert "prune.remove" in message


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.LazyLinear(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize("name", ALL)
def test_lazy_modules_are_refused_until_they_have_run(tmp_path, name):
    module, masks = Task(Lazy()), {"net.last.weight": torch.ones(4, 8, dtype=torch.bool)}
    message = refusal_of(tmp_path, module, name, masks)
    module.net(torch.zeros(1, 8))  # what has no shape cannot be counted by tests of memory
    assert message == (
        "net.first.weight, net.first.bias have no shape yet: run the module on one batch before the fit"
    )  # fmt: skip


@pytest.mark.parametrize("name", PRUNERS)
def test_where_nothing_can_be_pruned_the_first_parameters_are_named(tmp_path, name):
    module = Task(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4).requires_grad_(False)))
    message = refusal_of(tmp_path, module, name)
    assert message.startswith("nothing to ")
    assert "there are net.0.weight (norm layer), net.0.bias (norm layer), net.1.weight (frozen), net.1.bias" in message


def test_a_mask_of_a_gain_is_refused(tmp_path):
    masks = {"net.0.weight_g": torch.ones(12, 1, dtype=torch.bool)}
    message = refusal_of(tmp_path, Task(two(nn.utils.weight_norm)), "ApplyTicket", masks)
    assert message == "no mask can hold net.0.weight_g (gain of weight_norm): take it out of the masks"


# ---- the plan


class Own(nn.Module):
    """A stranger's layer: its matrix is called W, its scale is a vector of three dimensions."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(12, 8) * 0.3)
        self.scale = nn.Parameter(torch.ones(12, 1, 1))

    def forward(self, x):
        return x @ self.W.T * self.scale.flatten()


LEFT = "left dense: net.0.scale (no weight matrix), net.2.bias (bias)"
PLANS = {
    "IterativeMagnitudePruning": f"pruned (magnitude, layerwise): net.0.W (96), net.2.weight (48)\n{LEFT}",
    "GradualPruning": f"pruned (magnitude, layerwise): net.0.W (96), net.2.weight (48)\n{LEFT}",
    "NMPruning": f"pruned (2:4, magnitude, layerwise): net.2.weight (48)\n{LEFT}, "
    "net.0.W (input dimension unknown: declare it in input_dims)",
    "EdgePopup": f"pruned (edge-popup, layerwise): net.0.W (96), net.2.weight (48)\n{LEFT}",
    "ApplyTicket": "masked: net.0.W (24 of 96, 25.0%)\nleft dense: net.0.scale (no weight matrix), "
    "net.2.weight (no mask), net.2.bias (bias)",
}


@pytest.mark.parametrize("name", ALL)
def test_every_callback_that_prunes_prints_its_plan_once_a_fit(tmp_path, name, caplog):
    module, mask = Task(nn.Sequential(Own(), nn.ReLU(), nn.Linear(12, 4))), torch.zeros(12, 8, dtype=torch.bool)
    mask[:, :2] = True
    start = {key: value.clone() for key, value in module.state_dict().items()}
    made = callbacks(tmp_path, {})[name] if name != "ApplyTicket" else None
    callback = made() if made else ApplyTicket(Ticket({"net.0.W": mask}, RewindPoint(0, start), {"level": 1}))
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(tmp_path, module, callback)
    plans = [record.getMessage() for record in caplog.records if "\nleft dense: " in record.getMessage()]
    assert plans == [PLANS[name]]
    if name in ("GradualPruning", "EdgePopup"):
        assert int((module.net[0].W == 0).sum()) == 48


def test_a_level_that_trains_a_ticket_prints_its_densities(tmp_path, caplog):
    module, imp = Task(two()), IterativeMagnitudePruning(0.5, run_dir=tmp_path)
    for level in imp.levels(1):
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning.pytorch"):
            fit(level.run_dir, module, imp)
    plan = (
        "masked: net.0.weight (48 of 96, 50.0%), net.2.weight (24 of 48, 50.0%)\nleft dense: net.0.bias (bias), net.2."
    )
    assert plan in caplog.text


# ---- tensors that are not plain real ones


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.last = nn.Embedding(11, 6, sparse=True), nn.Linear(6, 4)

    def forward(self, tokens):
        return self.last(self.words(tokens).mean(1))


@pytest.mark.parametrize("score", ["magnitude", "movement", "snip"])
@pytest.mark.parametrize("include", [(), ("*words.weight",)])
def test_an_embedding_with_sparse_gradients_trains_dense_or_is_held_at_zero(tmp_path, include, score):
    class Watch(GradualPruning):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = trainer.optimizers[0].state[pl_module.net.words.weight].get("momentum_buffer")
            if include and self.done and state is not None:
                assert not state.to_dense()[~self.masks["net.words.weight"]].any()
                assert not pl_module.net.words.weight.detach()[~self.masks["net.words.weight"]].any()

    module = seeded(2, lambda: Task(Words()))
    before = module.net.words.weight.detach().clone()
    fit(tmp_path, module, Watch(0.5, begin="2it", pruning=Pruning(score, include=include)), tokens=True, max_steps=8)
    after = module.net.words.weight.detach()
    assert int((after == 0).sum()) == (33 if include else 0)
    assert not torch.equal(before, after)


def test_edge_popup_scores_a_lookup_with_sparse_gradients_as_one_with_dense_ones(tmp_path):
    class Lookup(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.table, self.last, self.sparse = nn.Parameter(torch.randn(11, 6)), nn.Linear(6, 4), sparse

        def forward(self, tokens):
            return self.last(F.embedding(tokens, self.table, sparse=self.sparse).mean(1))

    searches = {sparse: EdgePopup(0.5) for sparse in (False, True)}
    for sparse, popup in searches.items():
        fit(tmp_path, seeded(2, lambda sparse=sparse: Task(Lookup(sparse), momentum=0)), popup, tokens=True)
    assert "net.table" in searches[True].masks
    torch.testing.assert_close(searches[True].scores, searches[False].scores)
    assert M.digest(searches[True].masks) == M.digest(searches[False].masks)


@pytest.mark.parametrize("score", ["magnitude", "gradient"])
def test_complex_matrices_are_pruned_by_their_size_and_held_at_zero(tmp_path, score):
    dtype = torch.complex64  # a ticket file holds no complex128, which is refused by name

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.F = nn.Parameter(torch.randn(8, 8, dtype=dtype).T)  # of another layout in memory
            self.last = nn.Linear(8, 4)

        def forward(self, x):
            return self.last((x.to(dtype) @ self.F).abs().float())

    module = seeded(2, lambda: Task(Spectral()))
    start = module.net.F.detach().clone()
    gradual = GradualPruning(0.5, pruning=Pruning(score, exclude=["*.last.*"]))
    fit(tmp_path, module, gradual)
    mask, after = gradual.masks["net.F"], module.net.F.detach()
    assert int(mask.sum()) == 32
    assert raw(after[~mask]) == bytes(32 * dtype.itemsize)  # +0.0 in both parts
    assert (after[mask] != start[mask]).all()
    if score == "magnitude":
        assert start.abs()[mask].min() >= start.abs()[~mask].max()


def test_a_wrapper_of_tensors_is_left_dense_and_named():
    class Sharded(torch.Tensor):
        def __tensor_flatten__(self):
            raise NotImplementedError

    module = two()
    module[0].weight = nn.Parameter(torch.ones(12, 8).as_subclass(Sharded))
    assert Pruning().excluded(module)["0.weight"] == "Sharded, a wrapper of tensors"
