"""Training under a mask: exact zeros where pruned, and everywhere else what a loop written by hand gives."""

import copy
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from stranger import Blobs, Interrupted, Net, StopAt, bits, half_masks, masked, quiet, raw, seeded, ticket_of
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning
from lottery_callbacks.masked_training import MaskedTraining, require_agreement
from lottery_lightning.data import EpochOrder


def muon(parameters):
    """Orthogonalises whole matrices: without the mask after the step it would revive pruned weights."""
    return torch.optim.Muon([parameter for parameter in parameters if parameter.ndim == 2], lr=0.05)


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.02, weight_decay=0.01),
    "adam_fused": partial(torch.optim.Adam, lr=0.02, fused=True),
    "amsgrad": partial(torch.optim.Adam, lr=0.02, amsgrad=True, foreach=True),
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True, weight_decay=0.01),
    "muon": muon,
}
OPTIONS = {
    "plain": {},
    "clip_norm": {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "norm"},
    "clip_value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
}


class Trained(Net):
    """`Net` with any optimizer, and a loss that also pulls every weight, pruned or not, to 0.5 or -0.5 in turns."""

    def __init__(self, optimizer=OPTIMIZERS["sgd"]):
        super().__init__()
        self.make_optimizer = optimizer

    def training_step(self, batch, batch_idx):
        flat = torch.cat([parameter.flatten() for parameter in self.parameters()])
        pull = (flat[::2] - 0.5).square().sum() + (flat[1::2] + 0.5).square().sum()
        return super().training_step(batch, batch_idx) + 0.1 * pull

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class ZeroWatch(L.Callback):
    """Looks at the pruned weights, gradients and optimizer state after every step."""

    def __init__(self, masks, every_visit=False):
        self.masks, self.every_visit = masks, every_visit
        self.steps, self.live, self.wrong = 0, set(), []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps and not self.every_visit:
            return  # gradients were accumulated only
        self.steps = trainer.global_step
        for name, mask in self.masks.items():
            parameter = pl_module.get_parameter(name)
            seen = {"weight": parameter, "gradient": parameter.grad}
            for optimizer in trainer.optimizers:
                seen |= {k: v for k, v in optimizer.state.get(parameter, {}).items() if v is not None and v.ndim}
            for what, tensor in seen.items():
                if (tensor.detach()[~mask] != 0).any() or (what == "weight" and any(raw(tensor[~mask]))):
                    self.wrong.append((self.steps, name, what))
                if (tensor[mask] != 0).any():
                    self.live.add((name, what))


def batches(count):
    """What `Blobs` serves in its first `count` batches at level 1."""
    data = Blobs()
    data.setup("fit")
    images, labels = data.splits["train"]
    served, epoch = [], 0
    while len(served) < count:
        order = EpochOrder(0, 1)
        order.set_epoch(epoch)
        served += [(images[rows], labels[rows]) for rows in order.permutation(len(labels)).split(7)]
        epoch += 1
    return served[:count]


def by_hand(module, masks, seed, visits, clip=None, accumulate=1, precision="32"):
    """The masked loop in plain PyTorch."""
    parameters = dict(module.named_parameters())
    optimizer = module.make_optimizer(module.parameters())
    torch.manual_seed(seed)
    module.train()
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].copy_(masked(parameters[name], mask))
    for index, batch in enumerate(batches(visits)):
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
            loss = module.training_step(batch, index)
        if index % accumulate == 0:
            optimizer.zero_grad()
        (loss / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        for name, mask in masks.items():
            parameters[name].grad = masked(parameters[name].grad, mask)
        if clip:
            clip([parameter for group in optimizer.param_groups for parameter in group["params"]])
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].copy_(masked(parameters[name], mask))
    return module, optimizer


def clipping(options):
    if "gradient_clip_val" not in options:
        return None
    function = clip_grad_norm_ if options["gradient_clip_algorithm"] == "norm" else clip_grad_value_
    return lambda parameters: function(parameters, options["gradient_clip_val"])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_under_a_mask_is_the_loop_by_hand_and_keeps_exact_zeros(tmp_path, optimizer, options):
    options = OPTIONS[options]
    module = seeded(1, partial(Trained, OPTIMIZERS[optimizer]))
    masks = half_masks(module)
    steps = 12 // options.get("accumulate_grad_batches", 1)
    reference, by_hand_optimizer = by_hand(
        copy.deepcopy(module), masks, 5, 12, clipping(options), options.get("accumulate_grad_batches", 1),
        options.get("precision", "32"),
    )  # fmt: skip

    watch = ZeroWatch(masks)
    trainer = quiet(tmp_path, [ApplyTicket(ticket_of(module)), watch], max_steps=steps, limit_val_batches=0, **options)
    L.seed_everything(5, verbose=False)
    trainer.fit(module, Blobs())

    assert bits(module) == bits(reference)
    for mine, other in zip(module.parameters(), reference.parameters(), strict=True):
        ours, theirs = trainer.optimizers[0].state[mine], by_hand_optimizer.state[other]
        assert {k: raw(v) for k, v in ours.items()} == {k: raw(v) for k, v in theirs.items()}
    assert (watch.steps, watch.wrong) == (steps, [])
    entries = {key for state in by_hand_optimizer.state.values() for key, value in state.items() if value.ndim}
    assert watch.live == {(name, what) for name in masks for what in {"weight", "gradient", *entries}}
    assert all((module.get_parameter(name)[mask] < 0).any() for name, mask in masks.items())


class Duel(Net):
    """Two optimizers stepped by hand, as a GAN's; `wrapped=False` steps torch's own objects past Lightning's."""

    automatic_optimization = False

    def __init__(self, wrapped=True):
        super().__init__()
        self.wrapped = wrapped

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers(use_pl_optimizer=self.wrapped):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def make_optimizers(self):
        first = torch.optim.SGD(self.net[1].parameters(), lr=0.1, momentum=0.9)
        return first, torch.optim.Adam([*self.net[2].parameters(), *self.net[5].parameters()], lr=0.01)

    def configure_optimizers(self):
        return self.make_optimizers()


def duel_by_hand(module, masks, seed, visits):
    parameters = dict(module.named_parameters())
    optimizers = module.make_optimizers()
    torch.manual_seed(seed)
    module.train()
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].copy_(masked(parameters[name], mask))
    for index, batch in enumerate(batches(visits)):
        for optimizer in optimizers:
            optimizer.zero_grad()
            Net.training_step(module, batch, index).backward()
            for name, mask in masks.items():
                parameters[name].grad = masked(parameters[name].grad, mask)
            optimizer.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    parameters[name].copy_(masked(parameters[name], mask))
    return module


def test_two_optimizers_in_manual_optimization_train_as_by_hand(tmp_path):
    module = seeded(2, Duel)
    masks = half_masks(module)
    reference = duel_by_hand(copy.deepcopy(module), masks, 6, 10)
    watch = ZeroWatch(masks)
    L.seed_everything(6, verbose=False)
    trainer = quiet(tmp_path, [ApplyTicket(ticket_of(module)), watch], max_steps=20, limit_val_batches=0)
    trainer.fit(module, Blobs())
    assert bits(module) == bits(reference)
    assert (watch.steps, watch.wrong) == (20, [])
    assert {what for _, what in watch.live} == {"weight", "gradient", "momentum_buffer", "exp_avg", "exp_avg_sq"}


def test_manual_optimization_past_lightnings_wrapper_keeps_exact_zeros_too(tmp_path):
    module = seeded(2, partial(Duel, wrapped=False))
    watch = ZeroWatch(half_masks(module), every_visit=True)  # Lightning counts no step here
    trainer = quiet(tmp_path, [ApplyTicket(ticket_of(module)), watch], max_epochs=1, limit_val_batches=0)
    trainer.fit(module, Blobs())
    assert ("net.1.weight", "momentum_buffer") in watch.live
    assert watch.wrong == []


class Spoilt(Trained):
    """Pruned gradients are replaced by `value` on their way back."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def on_train_start(self):
        for name, mask in half_masks(self).items():
            self.get_parameter(name).register_hook(partial(lambda grad, m: torch.where(m, grad, self.value), m=mask))


@pytest.mark.parametrize("options", ["plain", "clip_norm", "clip_value"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30, -0.0])
def test_what_happens_to_pruned_gradients_is_never_seen(tmp_path, value, options):
    results = []
    for make in (Trained, partial(Spoilt, value)):
        module = seeded(1, make)
        watch = ZeroWatch(half_masks(module))
        callbacks = [ApplyTicket(ticket_of(module)), watch]
        L.seed_everything(5, verbose=False)
        quiet(tmp_path, callbacks, max_steps=6, limit_val_batches=0, **OPTIONS[options]).fit(module, Blobs())
        assert (watch.steps, watch.wrong) == (6, [])
        results.append(bits(module))
    assert results[0] == results[1]


def test_the_clipping_norm_is_that_of_the_surviving_gradients(tmp_path):
    norms = []

    class Norms(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            norms.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm().item())

    module = seeded(1, partial(Spoilt, 1e6))
    callbacks = [ApplyTicket(ticket_of(module)), Norms()]
    quiet(tmp_path, callbacks, max_steps=4, limit_val_batches=0, gradient_clip_val=0.3).fit(module, Blobs())
    assert norms == pytest.approx([0.3] * 4, rel=1e-4)


LBFGS = partial(torch.optim.LBFGS, lr=0.1, max_iter=2)


@pytest.mark.parametrize(
    ("optimizer", "dense"),
    [(partial(torch.optim.Adafactor, lr=0.01), ()), (LBFGS, ()), (LBFGS, ("net.1.weight",))],
    ids=["Adafactor", "LBFGS", "LBFGS with a dense first layer"],
)
def test_an_optimizer_that_cannot_be_masked_is_refused_in_one_line(tmp_path, optimizer, dense):
    module = seeded(1, partial(Trained, optimizer))
    masks = {name: mask for name, mask in half_masks(module).items() if name not in dense}
    trainer = quiet(tmp_path, [ApplyTicket(ticket_of(module, masks))], max_steps=4, limit_val_batches=0)
    with pytest.raises(RuntimeError, match="keeps state of another shape than its weights") as refusal:
        trainer.fit(module, Blobs())
    assert "\n" not in str(refusal.value)
    assert type(trainer.optimizers[0]).__name__ in str(refusal.value)
    assert trainer.global_step <= 1


@pytest.mark.parametrize("optimizer", [partial(torch.optim.Adafactor, lr=0.01), LBFGS], ids=["Adafactor", "LBFGS"])
def test_such_an_optimizer_is_refused_in_the_dense_level_already(tmp_path, optimizer):
    trainer = quiet(tmp_path, [IterativeMagnitudePruning(run_dir=tmp_path)], max_steps=4, limit_val_batches=0)
    with pytest.raises(RuntimeError, match="keeps state of another shape than its weights"):
        trainer.fit(seeded(1, partial(Trained, optimizer)), Blobs())
    assert trainer.global_step <= 1


@pytest.mark.parametrize("ends", ["well", "in an exception", "in a refusal"])
def test_after_the_fit_the_optimizer_is_free_again(tmp_path, ends):
    make = partial(Trained, partial(torch.optim.Adafactor, lr=0.1)) if ends == "in a refusal" else Trained
    module = seeded(1, make)
    masks = half_masks(module)
    stop = [StopAt(3)] if ends == "in an exception" else []
    trainer = quiet(tmp_path, [ApplyTicket(ticket_of(module)), *stop], max_steps=6, limit_val_batches=0)
    if ends == "well":
        trainer.fit(module, Blobs())
    else:
        with pytest.raises(Interrupted if stop else RuntimeError):
            trainer.fit(module, Blobs())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizers[0].step()
    assert all((module.get_parameter(name)[~mask] != 0).all() for name, mask in masks.items())


def test_a_checkpoint_of_any_step_is_sparse_and_loads_into_the_plain_network(tmp_path):
    module = seeded(1, partial(Trained, OPTIMIZERS["adam"]))
    masks, keys = half_masks(module), set(module.state_dict())
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    callbacks = [ApplyTicket(ticket_of(module)), every_step]
    trainer = quiet(tmp_path, callbacks, max_steps=5, limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(module, Blobs())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert [path.stem for path in paths] == ["after", "last", *(f"step={step}" for step in range(1, 6))]
    for path in paths:
        saved = torch.load(path, weights_only=True)
        assert set(saved["state_dict"]) == keys
        plain = Trained()
        plain.load_state_dict(saved["state_dict"])
        order = [name for name, _ in plain.named_parameters()]
        for name, mask in masks.items():
            state = saved["optimizer_states"][0]["state"][order.index(name)]
            for tensor in (plain.get_parameter(name).detach(), state["exp_avg"], state["exp_avg_sq"]):
                assert not tensor[~mask].any()
                assert tensor[mask].all()


def test_a_checkpoint_that_is_made_after_the_fit_holds_the_mask_of_the_fit(tmp_path):
    imp, module = IterativeMagnitudePruning(run_dir=tmp_path), seeded(0, Net)
    for level in imp.levels(1):
        trainer = quiet(tmp_path, [imp], max_steps=4, limit_val_batches=0)
        trainer.fit(module, Blobs())
        trainer.save_checkpoint(tmp_path / f"{level.number}.ckpt")
    dense, sparse = (torch.load(tmp_path / f"{number}.ckpt", weights_only=True) for number in (0, 1))
    for saved, removed in ((dense, 0), (sparse, 14)):  # round(0.2 x 72) in the first layer
        (masks,) = (state["masks"] for state in saved["callbacks"].values() if "masks" in state)
        assert int((~masks["net.1.weight"]).sum()) == removed


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_a_strategy_that_shards_parameters_is_refused_at_setup(strategy):
    trainer = SimpleNamespace(strategy=object.__new__(strategy))  # neither a GPU nor deepspeed is needed to be refused
    with pytest.raises(ValueError, match=f"^{strategy.__name__} shards parameters: train tickets with ddp$"):
        MaskedTraining().setup(trainer, Net(), "fit")


@pytest.mark.parametrize(("apart", "named"), [([], None), ([2], "2"), ([1, 3], "1, 3")])
def test_the_ranks_whose_masks_differ_from_the_first_are_named(apart, named):
    masks = half_masks(seeded(0, Net))
    strategy = SimpleNamespace(
        root_device="cpu", all_gather=lambda own: torch.stack([own ^ int(rank in apart) for rank in range(4)])
    )
    trainer = SimpleNamespace(world_size=4, strategy=strategy)
    if named is None:
        require_agreement(trainer, masks)
    else:
        with pytest.raises(RuntimeError, match=f"^the masks on rank {named} differ from those on rank 0: "):
            require_agreement(trainer, masks)
