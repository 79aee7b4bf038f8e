"""What a fit is refused for: finders within it, nothing trained, pruned weights that are not 0, a diverged start."""

from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from stranger import Net, bits, quiet, seeded, ticket_of
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import (
    ApplyTicket,
    EdgePopup,
    GradualPruning,
    HeavyTailedNoise,
    IterativeMagnitudePruning,
    NMPruning,
    ResumeCheckpoint,
    ValidationCurve,
)
from lottery_callbacks.functional.optimizer_hooks import pruned_weights_alive, require_zeros

EPOCHS = {"max_epochs": 2, "limit_val_batches": 0}


def loader(count=60, batch=10, **options):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 5
    images = torch.randn(count, 6, generator=generator) + labels.unsqueeze(1)
    return DataLoader(TensorDataset(images, labels), batch, **({"shuffle": True} | options))


class Data(L.LightningDataModule):
    batch_size = 10

    def train_dataloader(self):
        return loader(batch=self.batch_size)


class Rated(Net):
    lr = 0.1


KINDS = {
    "lottery": lambda folder: IterativeMagnitudePruning(run_dir=folder / "lottery"),
    "ticket": lambda folder: ApplyTicket(ticket_of(seeded(0, Net))),
    "gradual": lambda folder: GradualPruning(0.5, begin="2it"),
    "n of m": lambda folder: NMPruning(1, 2, at="2it"),
    "popup": lambda folder: EdgePopup(path=folder / "strong.safetensors"),
    "noise": lambda folder: HeavyTailedNoise(1.8, 1e-3),
}
SETTERS = [kind for kind in KINDS if kind != "noise"]


# ---- finders


class OwnFinder(LearningRateFinder):
    """A subclass, as Lightning's documentation has one."""


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder, OwnFinder])
@pytest.mark.parametrize("kind", KINDS)
def test_a_finder_within_the_fit_is_refused_by_name(tmp_path, kind, finder):
    module, callback = seeded(0, Rated), KINDS[kind](tmp_path)
    before = bits(module)
    search = "scale_batch_size" if finder is BatchSizeFinder else "lr_find"
    with pytest.raises(ValueError, match=rf"^{finder.__name__} trains within .*: leave it out, and call Tuner") as e:
        quiet(tmp_path, [finder(), callback], **EPOCHS).fit(module, datamodule=Data())
    assert search in str(e.value)
    assert "\n" not in str(e.value)
    assert bits(module) == before


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tuner_before_the_fit_leaves_no_trace_in_it(tmp_path, kind, search):
    found = {}
    for tuned in (False, True):
        module, data, callback = seeded(0, Rated), Data(), KINDS[kind](tmp_path / str(tuned))
        trainer = quiet(tmp_path, [callback], **EPOCHS)
        if tuned:
            sizes = {"max_trials": 1, "steps_per_trial": 1, "init_val": 4}
            options = {"num_training": 5} if search == "lr_find" else sizes
            getattr(Tuner(trainer), search)(module, datamodule=data, **options)
            module.lr, data.batch_size = Rated.lr, Data.batch_size
        L.seed_everything(5, verbose=False)
        trainer.fit(module, datamodule=data)
        found[tuned] = bits(module), getattr(callback, "fit_masks", {}).keys(), trainer.global_step
    assert found[True] == found[False]


@pytest.mark.parametrize("kind", ["gradual", "n of m", "popup"])
def test_a_used_callback_begins_as_a_new_one_on_another_network(tmp_path, kind):
    used, densities = KINDS[kind](tmp_path), {}
    quiet(tmp_path, [used], **EPOCHS).fit(seeded(0, Net), loader())
    for callback in (used, KINDS[kind](tmp_path)):
        module = seeded(3, Net)
        quiet(tmp_path, [callback], **EPOCHS).fit(module, loader(shuffle=False))
        densities[callback] = bits(module)
    assert len(set(map(str, densities.values()))) == 1


def test_a_checkpoint_that_was_validated_is_not_resumed_by_the_next_fit(tmp_path):
    ticket = ticket_of(seeded(0, Net))
    quiet(tmp_path, [ApplyTicket(ticket), ModelCheckpoint(tmp_path, "some")], enable_checkpointing=True, **EPOCHS).fit(
        seeded(0, Net), loader()
    )
    expected = None
    for validated in (False, True):
        module, callback = seeded(4, Net), ApplyTicket(ticket)
        trainer = quiet(tmp_path, [callback], max_epochs=1)
        if validated:
            trainer.validate(seeded(9, Net), loader(shuffle=False), ckpt_path=tmp_path / "some.ckpt", verbose=False)
        L.seed_everything(5, verbose=False)
        trainer.fit(module, loader())
        expected = expected or bits(module)
        assert bits(module) == expected


# ---- nothing trained

NOTHING = {
    "no batch": ({"count": 5, "drop_last": True}, {}, "the training loader has no batch"),
    "limit": ({}, {"limit_train_batches": 0}, "limit_train_batches is 0"),
    "no epoch": ({}, {"max_epochs": 0}, "max_epochs=0"),
    "no step": ({}, {"max_steps": 0}, "max_steps=0"),
}


@pytest.mark.parametrize("why", NOTHING)
@pytest.mark.parametrize("kind", SETTERS)
def test_a_fit_without_a_step_writes_nothing_and_says_so(tmp_path, kind, why):
    data, options, message = NOTHING[why]
    with pytest.raises(ValueError, match=f"^nothing was trained, and nothing is written: .*{message}") as e:
        quiet(tmp_path, [KINDS[kind](tmp_path)], **(EPOCHS | options)).fit(seeded(0, Net), loader(**data))
    assert "\n" not in str(e.value)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_ticket_beyond_the_last_step_has_trained_nothing(tmp_path):
    imp = IterativeMagnitudePruning(rewind="4it", run_dir=tmp_path)
    quiet(tmp_path, [imp], **EPOCHS).fit(seeded(0, Net), loader())
    with pytest.raises(ValueError, match="the fit begins at step 4, with max_steps=3"):
        quiet(tmp_path, [imp], max_steps=3, limit_val_batches=0).fit(seeded(0, Net), loader())
    assert not imp.ticket_path(2).exists()


# ---- pruned weights that are not 0


class OwnOptimizer(Net):
    """An optimizer that the Trainer does not know."""

    automatic_optimization = False

    def configure_optimizers(self):
        self.mine = torch.optim.Adam(self.parameters(), lr=1e-2)

    def training_step(self, batch, batch_idx):
        self.mine.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.mine.step()


class Half(OwnOptimizer):
    """One optimizer that the Trainer knows, of the last layer, and one of the first."""

    def configure_optimizers(self):
        self.mine = torch.optim.SGD(self.net[1].parameters(), lr=1e-2)
        return torch.optim.SGD(self.net[5].parameters(), lr=1e-2)

    def training_step(self, batch, batch_idx):
        self.optimizers().step()  # its mask comes too early for the other one
        self.optimizers().zero_grad()
        super().training_step(batch, batch_idx)


class At(L.Callback):
    """Does something to the module at the start of batch 3, or at the end of the training."""

    def __init__(self, change, end=False):
        self.change, self.end = change, end

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3 and not self.end:
            self.change(pl_module)

    def on_train_end(self, trainer, pl_module):
        if self.end:
            self.change(pl_module)


def replace(module):
    module.net[1].weight = nn.Parameter(torch.randn(12, 6))


def assign(module):
    module.load_state_dict({name: tensor + 0.5 for name, tensor in module.state_dict().items()}, assign=True)


def widen(module):
    module.net[1] = nn.Linear(6, 14)


def redraw(module):
    module.net[1].reset_parameters()


def pruned(module):
    prune.random_unstructured(module.net[1], "weight", 0.5)


class Averaging(StochasticWeightAveraging):
    """Begins with weights of another mask."""

    def on_train_end(self, trainer, pl_module):
        redraw(pl_module)


WRITES = {
    "no optimizer known": (OwnOptimizer, [], "configure_optimizers returned no optimizer"),
    "not in an optimizer": (Half, [], "no optimizer of the Trainer has it"),
    "replaced": (Net, [At(replace)], "it was replaced during the fit"),
    "assigned": (Net, [At(assign)], "it was replaced during the fit"),
    "another shape": (Net, [At(widen, end=True)], "it was replaced during the fit"),
    "drawn again at the end": (Net, [At(redraw, end=True)], "outside the optimizer's step"),
    "NaN": (Net, [At(lambda module: module.net[1].weight.data.fill_(torch.nan), end=True)], "outside the optimizer's"),
    "pruned by torch": (Net, [At(pruned)], "torch.nn.utils.prune prunes the same network"),
    "average": (Net, [Averaging(0.1)], "Averaging averages it with weights of another mask"),
}


@pytest.mark.parametrize("how", WRITES)
def test_pruned_weights_that_are_not_0_fail_the_fit_with_their_name_and_the_cause(tmp_path, how):
    make, others, cause = WRITES[how]
    with pytest.raises(RuntimeError, match=rf"net\.1\.weight.*; .*{cause}") as e:
        quiet(tmp_path, [ApplyTicket(ticket_of(seeded(0, Net))), *others], **EPOCHS).fit(seeded(0, make), loader())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["lottery", "gradual", "n of m", "popup"])
def test_every_callback_that_prunes_looks_before_it_keeps_a_ticket(tmp_path, kind):
    callback = KINDS[kind](tmp_path)
    if kind == "lottery":
        quiet(tmp_path, [callback], **EPOCHS).fit(seeded(0, Net), loader())
    there = list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(RuntimeError, match=r"pruned weights of net\.1\.weight are not 0; something wrote to it"):
        quiet(tmp_path, [callback, At(redraw, end=True)], **EPOCHS).fit(seeded(0, Net), loader())
    assert list(tmp_path.rglob("*.safetensors")) == there


def test_a_checkpoint_with_pruned_weights_that_are_not_0_is_not_written(tmp_path):
    callbacks = [ApplyTicket(ticket_of(seeded(0, Net))), At(redraw), ModelCheckpoint(tmp_path, every_n_train_steps=1)]
    keeps = {"enable_checkpointing": True, "accumulate_grad_batches": 2}  # no step, and no mask, after it
    with pytest.raises(RuntimeError, match=r"pruned weights of net\.1\.weight are not 0"):
        quiet(tmp_path, [*callbacks, At(replace)], **(EPOCHS | keeps)).fit(seeded(0, Net), loader())
    assert all("step=4" not in path.name for path in tmp_path.glob("*.ckpt"))


def test_parameters_that_the_module_replaces_before_the_first_step_are_masked(tmp_path):
    class Replacing(Net):
        def on_fit_start(self):
            weight = self.net[1].weight
            self.net[1].weight = nn.Parameter(weight.detach().clone())
            self.trainer.optimizers[0].param_groups[0]["params"] = list(self.parameters())

    ticket = ticket_of(seeded(0, Net))
    module = seeded(0, Replacing)
    quiet(tmp_path, [ApplyTicket(ticket)], **EPOCHS).fit(module, loader())
    require_zeros(module, ticket.masks)


def test_pruned_weights_that_are_not_0_are_named_and_counted():
    layer, mask = nn.Linear(2, 2), torch.tensor([[True, False], [False, False]])
    layer.weight.data = torch.tensor([[1.0, -0.0], [0.0, 0.0]])
    require_zeros(layer, {"weight": mask})
    require_zeros(torch.compile(layer), {"weight": mask})
    layer.weight.data = torch.tensor([[1.0, torch.nan], [2.0, 0.0]])
    assert pruned_weights_alive(layer, {"weight": mask}) == {"weight": "2 of 3 pruned weights of weight are not 0"}
    for name, expected in (("other", "absent"), ("bias", "(2,)")):
        found = pruned_weights_alive(layer, {name: mask})
        assert found == {name: f"{name} has a mask of shape (2, 2), and is {expected} in the network"}


def test_noise_on_a_parameter_that_was_replaced_fails_the_fit(tmp_path):
    with pytest.raises(RuntimeError, match=r"^net\.1\.weight was replaced during the fit, and had no noise"):
        quiet(tmp_path, [HeavyTailedNoise(1.8, 1e-3), At(replace)], **EPOCHS).fit(seeded(0, Net), loader())


# ---- diverged


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "popup"])  # its scores end the first fit
def test_a_run_that_had_diverged_is_not_resumed(tmp_path, kind, value):
    def diverge(module):
        module.net[1].bias.data[0] = value

    trained, make = [], partial(KINDS[kind], tmp_path)
    keeps = [At(diverge), ModelCheckpoint(tmp_path, "some", every_n_train_steps=4)]
    first = quiet(tmp_path, [make(), *keeps], enable_checkpointing=True, max_steps=4, limit_val_batches=0)
    if kind == "lottery":
        with pytest.raises(ValueError, match="not finite"):
            first.fit(seeded(0, Net), loader())
    else:
        first.fit(seeded(0, Net), loader())
    with pytest.raises(ValueError, match=r"some\.ckpt holds NaN or infinity in net\.1\.weight, ") as e:
        quiet(tmp_path, [make(), At(trained.append)], **EPOCHS).fit(
            seeded(0, Net), loader(), ckpt_path=tmp_path / "some.ckpt"
        )
    assert "\n" not in str(e.value)
    assert trained == []


def test_a_monitor_beside_a_finder_sees_the_fit_that_follows(tmp_path):
    curve, rows = ValidationCurve(metrics=()), {}
    keep = ResumeCheckpoint(tmp_path, 0)
    for finders in ([], [LearningRateFinder(num_training_steps=3)]):
        module = seeded(0, Rated)
        L.seed_everything(5, verbose=False)
        fit = quiet(tmp_path, [*finders, curve, keep], enable_checkpointing=True, max_epochs=2)
        fit.fit(module, Data().train_dataloader(), loader(shuffle=False))
        rows[len(finders)] = [row["iteration"] for row in curve.rows]
    assert rows[0] == rows[1] == [6, 12]
