"""The callbacks in projects that know nothing of them: any module, any loader, either name of Lightning."""

import gc
import importlib

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stranger import Blobs, Lottery, Net, bits, fit_with, make_plain, masked, quiet, raw, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, Pruning, Ticket
from lottery_callbacks.apply_ticket import reinitialise

PRUNED = {"encoder.weight": (10, 6), "decoder.weight": (10, 10), "head.weight": (3, 1, 5)}


def loader(shuffle=True):
    points = torch.randn(40, 6, generator=torch.Generator().manual_seed(4))
    return DataLoader(TensorDataset(points), batch_size=8, shuffle=shuffle)


def level_fits(folder, levels, module, *, base=L, imp=None, **options):
    """One fit a level with fresh trainers; yields after each."""
    imp = imp or IterativeMagnitudePruning(rate=0.2, run_dir=folder)
    for number in range(levels):
        base.seed_everything(10 + number, verbose=False)
        trainer = quiet(folder, [imp], base.Trainer, **({"max_steps": 7} | options))
        trainer.fit(module, loader())
        yield imp, trainer


def test_five_fits_compound_exact_counts_and_leave_the_rest_alone(tmp_path):
    module = seeded(0, make_plain)
    order = [name for name, _ in module.named_parameters()]
    frozen = bits(module.fixed)
    expected = {"encoder.weight": 60, "decoder.weight": 100, "head.weight": 15}
    for imp, _ in level_fits(tmp_path, 5, module):
        expected = {name: count - round(0.2 * count) for name, count in expected.items()}
        ticket = Ticket.load(imp.ticket_path(imp.level))
        assert {name: tuple(mask.shape) for name, mask in ticket.masks.items()} == PRUNED
        assert {name: int(mask.sum()) for name, mask in ticket.masks.items()} == expected
        assert ticket.density == sum(expected.values()) / 175
        assert [name for name, _ in module.named_parameters()] == order
        assert module.tied.weight is module.decoder.weight
        assert module.again is module.encoder
        assert bits(module.fixed) == frozen
    assert expected == {"encoder.weight": 19, "decoder.weight": 33, "head.weight": 5}
    assert imp.level == 5
    assert module.steps == 35
    assert len(list((tmp_path / "tickets").iterdir())) == 6


def test_every_fit_starts_from_the_first_weights_under_its_mask(tmp_path):
    module = seeded(0, make_plain)
    first = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    starts = []

    class Start(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                starts.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    imp = IterativeMagnitudePruning(rate=0.2, run_dir=tmp_path)
    for _ in range(3):
        quiet(tmp_path, [imp, Start()], max_steps=4).fit(module, loader())
    assert bits(starts[0]) == bits(first)
    for level in (1, 2):
        masks = Ticket.load(imp.ticket_path(level)).masks
        masks |= {"again.weight": masks["encoder.weight"], "tied.weight": masks["decoder.weight"]}
        assert bits(starts[level]) == bits({n: masked(t, masks[n]) if n in masks else t for n, t in first.items()})


@pytest.mark.parametrize("rewind", ["0it", "3it"])
def test_memory_is_flat_over_the_fits(tmp_path, rewind):
    def live():
        gc.collect()
        tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
        return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    imp, seen = IterativeMagnitudePruning(rate=0.2, rewind=rewind, run_dir=tmp_path), []
    module = seeded(0, make_plain)
    for _, trainer in level_fits(tmp_path, 5, module, imp=imp):
        module.trainer = None
        del trainer
        if imp.level in (2, 5):
            seen.append(live())
    assert imp.level == 5
    assert all(later <= earlier for earlier, later in zip(*seen, strict=True))  # what other tests left may go


def test_both_names_of_lightning_give_the_same_numbers(tmp_path):
    pytest.importorskip("pytorch_lightning")
    results = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        base = importlib.import_module(name)
        base.seed_everything(0, verbose=False)
        module = make_plain(base.LightningModule)
        imp = IterativeMagnitudePruning(rate=0.2, rewind="3it", run_dir=tmp_path / name)
        weights = [bits(module) for _ in level_fits(tmp_path / name, 3, module, base=base, imp=imp)]
        base.seed_everything(9, verbose=False)
        trainer = quiet(tmp_path, [ApplyTicket(imp.ticket_path(2))], base.Trainer, max_steps=7)
        again = make_plain(base.LightningModule)
        base.seed_everything(12, verbose=False)
        trainer.fit(again, loader())
        assert bits(again) == weights[2]
        results.append((weights, [imp.ticket_path(level).read_bytes() for level in range(4)]))
    assert results[0] == results[1]


def test_a_loop_is_taken_up_again_by_a_new_object(tmp_path):
    whole = Lottery(tmp_path / "whole", Net, rewind="5it").run(2)
    begun = Lottery(tmp_path / "parts", Net, rewind="5it").run(0)
    rest = Lottery(tmp_path / "parts", Net, rewind="5it")
    rest.module = seeded(77, Net)  # a new process: its own initialisation must not matter
    rest.run(2)
    assert [len(probe.steps) for probe in rest.probes] == [19, 19]
    assert [bits(final) for final in begun.finals + rest.finals] == [bits(final) for final in whole.finals]
    assert begun.curves + rest.curves == whole.curves
    for level in range(4):
        assert rest.imp.ticket_path(level).read_bytes() == whole.imp.ticket_path(level).read_bytes()
    assert list(Lottery(tmp_path / "parts", Net, rewind="5it").imp.levels(2)) == []


LIMITS = {
    "fast_dev_run": ({"fast_dev_run": True}, "0it", [1, 1]),
    "fast_dev_run with a late rewind": ({"fast_dev_run": 2}, "500it", [2, 1]),
    "limit_train_batches": ({"max_epochs": 2, "limit_train_batches": 3}, "0it", [6, 6]),
    "limit_train_batches with an epoch": ({"max_epochs": 2, "limit_train_batches": 3}, "1ep", [6, 3]),
    "a fraction of the batches": ({"max_epochs": 2, "limit_train_batches": 0.5}, "1ep", [4, 2]),
    "overfit_batches": ({"max_epochs": 4, "overfit_batches": 2}, "2it", [8, 6]),
    "max_epochs": ({"max_epochs": 2}, "0it", [10, 10]),
    "max_epochs with an epoch": ({"max_epochs": 3}, "1ep", [15, 10]),
    "max_steps": ({"max_steps": 8}, "6it", [8, 2]),
    "max_time": ({"max_steps": 4, "max_time": "00:01:00:00"}, "0it", [4, 4]),
}


@pytest.mark.parametrize("case", LIMITS)
def test_the_trainers_limits_mean_what_they_mean(tmp_path, case):
    options, rewind, expected = LIMITS[case]
    module, steps = seeded(0, make_plain), []
    imp = IterativeMagnitudePruning(rate=0.2, rewind=rewind, run_dir=tmp_path)
    for level in imp.levels(1):
        before = module.steps
        quiet(level.run_dir, [imp], **options).fit(module, loader())
        steps.append(module.steps - before)
    assert steps == expected
    assert int(imp.ticket.masks["decoder.weight"].sum()) == 64
    assert imp.ticket_path(2).exists() is ("fast_dev_run" not in options)  # a smoke test leaves nothing behind


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_epochs": 2, "overfit_batches": 2}])
def test_our_own_loader_obeys_the_limits_too(tmp_path, options):
    lottery = Lottery(tmp_path, Net, trainer=options).run(1)
    counts = [len(probe.steps) for probe in lottery.probes]
    assert counts == ([1, 1] if "fast_dev_run" in options else [4, 4])


def test_two_steps_a_visit_still_rewind_to_the_epoch_that_was_asked_for(tmp_path):
    class TwoSteps(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1, momentum=0.9) for i in (1, 5)]

    lottery = Lottery(tmp_path, TwoSteps, rewind="1ep", trainer={"max_epochs": 2}).run(1)
    assert [(step, epoch, batch) for step, epoch, batch, _ in lottery.probes[0].steps][9] == (18, 1, 0)
    assert lottery.probes[1].steps == lottery.probes[0].steps[9:]


@pytest.mark.parametrize("between", ["validate", "test"])
@pytest.mark.parametrize("kind", ["lottery", "ticket"])
def test_looking_at_a_checkpoint_between_fits_leaves_the_next_fit_alone(tmp_path, kind, between):
    """As in `trainer.test(ckpt_path="best")`, for which Lightning loads the callbacks' state as well."""
    first = Lottery(tmp_path / "first", Net).run(1)
    results = []
    for looks in (False, True):
        folder, module = tmp_path / str(looks), seeded(0, Net)
        if kind == "lottery":
            callback = IterativeMagnitudePruning(rate=0.3, run_dir=folder)
        else:
            callback = ApplyTicket(first.imp.ticket_path(1))
        for level in range(2):
            L.seed_everything(100 + level, verbose=False)
            best = ModelCheckpoint(folder, f"{level}", every_n_train_steps=5)
            trainer = quiet(folder, [callback, best], enable_checkpointing=True)
            trainer.fit(module, Blobs())
            results.append(bits(module))
            if looks:
                getattr(trainer, between)(module, Blobs(), ckpt_path=best.best_model_path, verbose=False)
    assert results[:2] == results[2:]


def test_a_ticket_drives_fit_after_fit(tmp_path):
    lottery = Lottery(tmp_path, Net, rewind="5it").run(1)
    ticket, module = ApplyTicket(lottery.imp.ticket_path(1)), seeded(3, Net)
    for _ in range(3):
        fit_with(tmp_path, module, Blobs(), ticket, seed=101)
        assert bits(module) == bits(lottery.finals[1])


def test_what_the_callback_holds_is_no_part_of_the_module(tmp_path):
    module = seeded(0, make_plain)
    keys, kinds = list(module.state_dict()), [type(part) for part in module.modules()]
    for _ in level_fits(tmp_path, 2, module):
        assert list(module.state_dict()) == keys
        assert [type(part) for part in module.modules()] == kinds
        assert raw(module.encoder.weight) == raw(module.again.weight)


# ---- networks of others, each in a module of its own


class Task(L.LightningModule):
    """A stranger's classifier around any network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class Attention(nn.Module):
    """An encoder layer, whose projection `in_proj_weight` belongs to MultiheadAttention itself."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, dropout=0.1, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """A language model whose output layer is its embedding; `first` says which of the two is registered first."""

    def __init__(self, first="words"):
        super().__init__()
        layers = {"words": nn.Embedding(11, 8), "output": nn.Linear(8, 11, bias=False)}
        for name in sorted(layers, key=lambda name: name != first):
            self.add_module(name, layers[name])
        self.mix = nn.Linear(8, 8)
        self.output.weight = self.words.weight

    def forward(self, tokens):
        return self.output(self.mix(self.words(tokens)).relu().mean(1))


def resnet():
    """torchvision's ResNet-18, its blocks an eighth as wide."""
    resnet = pytest.importorskip("torchvision").models.resnet

    class Narrow(resnet.ResNet):
        def _make_layer(self, block, planes, *args, **kwargs):
            return super()._make_layer(block, planes // 8, *args, **kwargs)

    network = Narrow(resnet.BasicBlock, [2, 2, 2, 2])
    network.fc = nn.Linear(64, 3)
    return network


ATTENTION = ["block.self_attn.in_proj_weight", "block.self_attn.out_proj.weight", "block.linear1.weight",
             "block.linear2.weight", "head.weight"]  # fmt: skip
LSTM = [f"lstm.weight_{of}_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse") for of in ("ih", "hh")]
STRANGERS = {  # network, shape of an input or None for tokens, names of what is pruned, `include`
    "resnet18": (resnet, (3, 16, 16), 22, ()),  # 21, and a projection that the narrowing adds
    "attention": (Attention, (5, 8), ATTENTION, ()),
    "lstm": (Recurrent, (5, 8), [*LSTM, "head.weight"], ()),
    "tied": (Tied, None, ["mix.weight"], ()),
    "tied, output first": (lambda: Tied("output"), None, ["mix.weight"], ()),
    "tied and included": (Tied, None, ["words.weight", "mix.weight"], ["*words.weight"]),
}


def batches_of(shape):
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(12) % 3
    inputs = torch.randint(0, 11, (12, 4), generator=generator)
    if shape:
        inputs = torch.randn(12, *shape, generator=generator) + labels.view(-1, *[1] * len(shape))
    return DataLoader(TensorDataset(inputs, labels), batch_size=4)


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_network_is_pruned_and_rewound_and_each_level_is_a_fit_of_its_ticket(tmp_path, name):
    make, shape, pruned, include = STRANGERS[name]
    imp = IterativeMagnitudePruning(0.5, "1it", tmp_path, Pruning(include=include))
    loaders, options = (batches_of(shape), batches_of(shape)), {"max_epochs": 1}
    module = seeded(0, lambda: Task(make()))
    for level in imp.levels(2):
        L.seed_everything(20 + level.number, verbose=False)
        quiet(level.run_dir, [imp], **options).fit(module, *loaders)
    ticket = Ticket.load(imp.ticket_path(2))
    names = [name.removeprefix("network.") for name in ticket.masks]
    assert len(names) == pruned if isinstance(pruned, int) else sorted(names) == sorted(pruned)
    for key, mask in ticket.masks.items():
        weight = module.get_parameter(key)
        assert not any(raw(weight[~mask]))
        assert weight[mask].all()
        assert 0.24 <= mask.float().mean() <= 0.26
    alone = seeded(5, lambda: Task(make()))
    L.seed_everything(22, verbose=False)
    quiet(tmp_path, [ApplyTicket(ticket)], **options).fit(alone, *loaders)
    assert bits(alone) == bits(module)
    inputs = loaders[0].dataset.tensors[0]
    bare = seeded(6, make)  # eval and no_grad: attention takes its fast path, an LSTM its flat weights
    bare.load_state_dict({key.removeprefix("network."): tensor for key, tensor in module.state_dict().items()})
    with torch.no_grad():
        assert raw(bare.eval()(inputs)) == raw(module.network.eval()(inputs))


def test_a_matrix_that_is_tied_to_an_embedding_is_one_whichever_comes_first():
    for first in ("words", "output"):
        network = Tied(first)
        assert Pruning().excluded(network)[f"{first}.weight"] == "embedding"
        assert list(Pruning(include=[f"{first}.weight"]).prunable(network)) == [f"{first}.weight", "mix.weight"]


def test_attention_is_redrawn_as_its_constructor_draws_it():
    """Its `_reset_parameters` has an underscore."""
    module, drawn = seeded(0, Attention), []
    for _ in range(2):
        reinitialise(module, 3)
        drawn.append(bits(module))
    assert drawn[0] == drawn[1]
    weight = module.block.self_attn.in_proj_weight
    assert raw(weight) != raw(seeded(0, Attention).block.self_attn.in_proj_weight)
    limit = (6 / (8 + 24)) ** 0.5  # Xavier's
    assert 0.9 * limit < weight.abs().max() <= limit
    assert not module.block.self_attn.in_proj_bias.any()
