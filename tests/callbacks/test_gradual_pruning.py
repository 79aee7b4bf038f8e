"""Pruning inside one fit: exact counts at each update, the bits of a loop by hand, and of an unbroken run."""

import copy
import csv
import warnings
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from stranger import Blobs, Net, Probe, bits, masked, quiet, raw, seeded, ticket_of
from torch.nn import functional as F

from lottery_callbacks import ApplyTicket, Pruning, RewindPoint, Ticket
from lottery_callbacks.functional import masks as M
from lottery_callbacks.gradual_pruning import GradualPruning
from lottery_callbacks.rewinding import snapshot
from lottery_lightning.data import EpochOrder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is about to collapse"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
]
FIRST, LAST = "net.1.weight", "net.5.weight"  # 72 and 60 weights
SIZES = {FIRST: 72, LAST: 60}
EVERY_SIX = {"begin": "2it", "end": "20it", "every": "6it"}  # updates at 2, 8, 14, 20
CUBIC = {2: 0.0, 8: 0.8 * (1 - 8 / 27), 14: 0.8 * (1 - 1 / 27), 20: 0.8}


class Called(Net):
    """`Net` with a forward, which synaptic flow needs."""

    def forward(self, images):
        return self.net(images)


def fit(folder, callback, *others, module=None, seed=5, data=Blobs, ckpt_path=None, **options):
    module = module or seeded(1, Net)
    trainer = quiet(folder, [callback, *others], limit_val_batches=0, **{"max_steps": 24} | options)
    L.seed_everything(seed, verbose=False)
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return module


class Watch(L.Callback):
    """After each step: the masks, and where a pruned weight, gradient or momentum is not zero."""

    def __init__(self, callback):
        self.callback, self.masks, self.wrong = callback, {}, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.masks.setdefault(trainer.global_step, dict(self.callback.masks))
        for name, mask in self.callback.masks.items():
            weight = pl_module.get_parameter(name)
            momentum = trainer.optimizers[0].state[weight].get("momentum_buffer", weight)
            if any(raw(weight[~mask])) or weight.grad[~mask].any() or momentum[~mask].any():
                self.wrong.append((trainer.global_step, name))


@pytest.mark.parametrize("scope", ["layerwise", "global", "erk"])
def test_after_each_update_exactly_the_scheduled_number_of_weights_is_left(tmp_path, scope):
    callback = GradualPruning(0.8, **EVERY_SIX, pruning=Pruning(scope=scope))
    watch = Watch(callback)
    fit(tmp_path, callback, watch)
    for step in range(1, 25):
        sparsity = CUBIC[max((at for at in CUBIC if at < step), default=2)]
        kept = M.kept(watch.masks[step])
        if scope == "layerwise":
            assert kept == {name: size - round(sparsity * size) for name, size in SIZES.items()}, step
        assert sum(kept.values()) == pytest.approx(132 - round(sparsity * 132), abs=scope == "layerwise"), step
    assert sum(M.kept(callback.masks).values()) == 26  # 132 - round(105.6), and 72 - 58 + 60 - 48
    assert callback.updates == list(CUBIC)
    assert watch.wrong == []
    steps = sorted(watch.masks)
    assert all(not (watch.masks[b][n] & ~watch.masks[a][n]).any() for a, b in zip(steps, steps[1:]) for n in SIZES)  # noqa: B905, RUF007


def by_hand(module, visits, seed, sparsities):
    """Magnitude pruning in a plain PyTorch loop; `sparsities` by the number of steps done."""
    data, parameters = Blobs(), dict(module.named_parameters())
    data.setup("fit")
    images, labels = data.splits["train"]
    optimizer = module.configure_optimizers()
    masks = {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in SIZES}
    torch.manual_seed(seed)
    module.train()
    for step in range(visits):
        if step in sparsities:
            for name, size in SIZES.items():
                score = torch.where(masks[name], parameters[name].detach().abs(), -1.0)
                lowest = score.flatten().argsort(stable=True)[: round(sparsities[step] * size)]
                masks[name].view(-1)[lowest] = False
                parameters[name].data = masked(parameters[name].data, masks[name])
                if parameters[name] in optimizer.state:
                    momentum = optimizer.state[parameters[name]]["momentum_buffer"]
                    momentum.copy_(masked(momentum, masks[name]))
        order = EpochOrder(0, 0)
        order.set_epoch(step // 9)
        rows = order.permutation(len(labels)).split(7)[step % 9]
        optimizer.zero_grad()
        module.training_step((images[rows], labels[rows]), 0).backward()
        for name, mask in masks.items():
            parameters[name].grad = masked(parameters[name].grad, mask)
        optimizer.step()
        for name, mask in masks.items():
            parameters[name].data = masked(parameters[name].data, mask)
    return module


def test_it_trains_to_the_bits_of_a_loop_by_hand(tmp_path):
    start = seeded(1, Net)
    reference = by_hand(copy.deepcopy(start), 24, 5, CUBIC)
    assert bits(fit(tmp_path, GradualPruning(0.8, **EVERY_SIX), module=start)) == bits(reference)


def test_until_it_begins_the_run_is_the_one_without_it(tmp_path):
    probes = [Probe(at=8), Probe(at=8)]
    fit(tmp_path, GradualPruning(0.8, "8it", pruning=Pruning(score="snip")), probes[0])
    fit(tmp_path, L.Callback(), probes[1])
    with_it, without = (bits(probe.state["module"]) for probe in probes)
    assert {name for name in without if with_it[name] != without[name]} == set(SIZES)  # the update of step 8 alone
    pruned = probes[0].state["module"]
    for name, size in SIZES.items():
        assert int((pruned[name] == 0).sum()) == round(0.8 * size)
        assert torch.equal(pruned[name], masked(probes[1].state["module"][name], pruned[name] != 0))


@pytest.mark.parametrize("score", ["magnitude", "random", "gradient", "snip", "grasp", "synflow"])
def test_pruning_at_initialisation_is_training_its_mask_from_the_initial_weights(tmp_path, score):
    start = seeded(1, Called)
    initial = RewindPoint(0, snapshot(start))
    callback = GradualPruning(0.9, pruning=Pruning(score=score, scope="global"))
    probe = Probe(at=0)
    trained = fit(tmp_path, callback, probe, module=start)
    assert sum(M.kept(callback.masks).values()) == 13  # 132 - round(118.8)
    for name, mask in callback.masks.items():
        assert raw(probe.state["module"][name]) == raw(masked(initial.tensors[name], mask))
    ticket = ApplyTicket(Ticket(callback.masks, initial))
    assert bits(fit(tmp_path, ticket, module=seeded(9, Called))) == bits(trained)


def test_snip_at_step_zero_ranks_by_the_gradient_of_the_first_batch(tmp_path):
    class Steady(Net):
        def __init__(self):
            super().__init__()
            self.net[4] = torch.nn.Identity()

    module, probe = seeded(1, Steady), Probe(at=0)
    twin, seen = copy.deepcopy(module), []
    probe.on_train_batch_start = lambda trainer, module, batch, index: seen.append(batch)
    callback = GradualPruning(0.5, pruning=Pruning(score="snip", scope="global"))
    fit(tmp_path, callback, probe, module=module)
    F.cross_entropy(twin.train().net(seen[0][0]), seen[0][1]).backward()
    scores = torch.cat([(twin.get_parameter(n) * twin.get_parameter(n).grad).abs().flatten() for n in SIZES])
    kept = torch.cat([callback.masks[name].flatten() for name in SIZES])
    assert int(kept.sum()) == 66
    assert set(kept.nonzero().flatten().tolist()) == set(scores.topk(66).indices.tolist())


def test_rounds_score_anew_on_what_the_round_before_left(tmp_path):
    left = []

    def count(evidence):
        left.append(sum(int((weight != 0).sum()) for weight in evidence.weights.values()))
        return {name: weight.detach().abs() for name, weight in evidence.weights.items()}

    callback = GradualPruning(0.9, pruning=Pruning(score=count, scope="global"), rounds=4)
    fit(tmp_path, callback, max_steps=2)
    assert [*left, sum(M.kept(callback.masks).values())] == [132 - round((1 - 0.1 ** (i / 4)) * 132) for i in range(5)]


def test_an_update_that_removes_nothing_scores_nothing(tmp_path):
    calls = []

    def count(evidence):
        calls.append(1)
        return {name: weight.detach().abs() for name, weight in evidence.weights.items()}

    fit(tmp_path, GradualPruning(0.5, "0it", "4it", "4it", Pruning(score=count)), max_steps=6)
    assert calls == [1]  # at step 4; at step 0 the sparsity is 0


def test_a_hundred_rounds_of_synflow_prune_other_weights_than_one(tmp_path):
    masks = []
    for rounds in (1, 100):
        callback = GradualPruning(0.95, pruning=Pruning(score="synflow", scope="global"), rounds=rounds)
        fit(tmp_path, callback, module=seeded(1, Called), max_steps=1)
        masks.append(callback.masks)
    assert [sum(M.kept(mask).values()) for mask in masks] == [7, 7]
    assert M.digest(masks[0]) != M.digest(masks[1])
    assert all(M.kept(masks[1]).values())  # no layer collapses (Tanaka et al., theorem 3)


PLANS = {
    "magnitude": partial(GradualPruning, 0.8, **EVERY_SIX, initial=0.2),
    "snip": partial(GradualPruning, 0.8, **EVERY_SIX, pruning=Pruning(score="snip", scope="global", batches=3)),
    "movement": partial(GradualPruning, 0.8, **EVERY_SIX, pruning=Pruning(score="movement", scope="erk"), rounds=2),
    "random": partial(GradualPruning, 0.8, **EVERY_SIX, pruning=Pruning(score="random"), seed=4),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_killed_fit_goes_on_to_the_bits_and_masks_of_an_unbroken_one(tmp_path, plan):
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken = PLANS[plan]()
    whole = fit(tmp_path, unbroken, every_step, enable_checkpointing=True)
    for step in (1, 2, 8, 11, 20, 23):  # before, at and between updates
        path = tmp_path / f"step={step}.ckpt"
        saved = torch.load(path, weights_only=True)
        (state,) = (state for state in saved["callbacks"].values() if "masks" in state)
        assert all(not saved["state_dict"][name][~mask].any() for name, mask in state["masks"].items())
        resumed = PLANS[plan]()
        module = fit(tmp_path, resumed, module=seeded(31, Net), seed=977, ckpt_path=path)
        assert bits(module) == bits(whole), step
        assert M.digest(resumed.masks) == M.digest(unbroken.masks)


def test_a_checkpoint_of_another_rule_or_of_none_is_refused(tmp_path):
    def saved_by(callback):
        name = ModelCheckpoint(tmp_path, type(callback).__name__, every_n_train_steps=4)
        fit(tmp_path, callback, name, max_steps=4, enable_checkpointing=True)
        return tmp_path / f"{type(callback).__name__}.ckpt"

    with pytest.raises(ValueError, match=r"pruned by another rule: sparsity is 0\.8 there and 0\.7 now"):
        fit(tmp_path, GradualPruning(0.7), ckpt_path=saved_by(GradualPruning(0.8)))
    with pytest.raises(ValueError, match="holds no mask: it was not trained by GradualPruning"):
        fit(tmp_path, GradualPruning(0.7), ckpt_path=saved_by(L.Callback()))


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, [9, 15, 18]), ({"accumulate_grad_batches": 2}, [5, 10]), ({"limit_train_batches": 4}, [4, 8])],
)
def test_epochs_are_counted_in_optimizer_steps(tmp_path, options, steps):
    callback = GradualPruning(0.5, "1ep", "2ep", "6it")
    watch = Watch(callback)
    fit(tmp_path, callback, watch, max_epochs=3, max_steps=-1, **options)
    assert callback.updates == steps
    changes = [s for s in sorted(watch.masks)[1:] if M.digest(watch.masks[s]) != M.digest(watch.masks[s - 1])]
    assert changes == [step + 1 for step in steps[1:]]  # the first one is of sparsity 0
    assert M.kept(callback.masks) == {FIRST: 36, LAST: 30}


class Duel(Net):
    """Two optimizers stepped by hand: Lightning counts two steps a visit."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[layer].parameters(), lr=0.1, momentum=0.9) for layer in (1, 5)]


def test_where_two_optimizers_step_in_one_visit_the_last_update_due_stands(tmp_path):
    callback = GradualPruning(0.5, "1it", "17it", "1it")
    fit(tmp_path, callback, module=seeded(1, Duel), max_steps=20)
    assert M.kept(callback.masks) == {FIRST: 36, LAST: 30}
    with pytest.raises(ValueError, match="1ep needs automatic optimization and a loader with a length"):
        fit(tmp_path, GradualPruning(0.5, "1ep"), module=seeded(1, Duel), max_steps=20)


def test_a_run_too_short_for_its_schedule_is_refused_before_it_trains(tmp_path):
    with pytest.raises(ValueError, match="last pruning is due at step 24, and the run's last step is 24: prune earli"):
        fit(tmp_path, GradualPruning(0.5, "24it"))
    fit(tmp_path, GradualPruning(0.5, "24it"), fast_dev_run=True)


def test_a_run_that_ends_before_the_last_update_says_so(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 12

    with pytest.warns(UserWarning, match=r"ended at step 12, before the last pruning at step 20: density is 0\.4318"):
        fit(tmp_path, GradualPruning(0.8, **EVERY_SIX), Stop())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1\.0 is outside \(0, 1\)"),
        ({"sparsity": 0.5, "initial": 0.6}, r"initial=0\.6 is outside \[0, 0\.5\]"),
        ({"sparsity": 0.5, "rounds": 0}, "rounds=0: an update scores once at least"),
        ({"sparsity": 0.5, "begin": "soon"}, "'soon' is no step string"),
        ({"sparsity": 0.5, "pruning": Pruning(rates={"*5*": 0.1})}, "rates per layer belong to levels"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        GradualPruning(**options)


def test_each_update_gives_its_densities_to_the_loggers(tmp_path):
    logger = CSVLogger(tmp_path, name="log")
    fit(tmp_path, GradualPruning(0.8, **EVERY_SIX), logger=logger)
    with next((tmp_path / "log").rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["prune/density"]]
    assert [int(row["step"]) for row in rows] == list(CUBIC)
    assert [float(row["prune/kept"]) for row in rows] == [132, 132 - 41 - 34, 132 - 55 - 46, 26]
    assert float(rows[-1][f"prune/density/{FIRST}"]) == pytest.approx(14 / 72)


def test_a_resumed_fit_logs_only_the_updates_that_were_to_come(tmp_path):
    at_eleven = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=11)
    fit(tmp_path, GradualPruning(0.8, **EVERY_SIX), at_eleven, max_steps=21, enable_checkpointing=True)
    logger = CSVLogger(tmp_path, name="log")
    fit(tmp_path, GradualPruning(0.8, **EVERY_SIX), ckpt_path=tmp_path / "saved.ckpt", logger=logger)
    with next((tmp_path / "log").rglob("metrics.csv")).open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["prune/density"]] == [14, 20]


def test_each_seed_draws_its_own_masks(tmp_path):
    digests = set()
    for seed in (0, 0, 1):
        callback = GradualPruning(0.5, pruning=Pruning(score="random"), seed=seed)
        fit(tmp_path, callback, max_steps=1)
        digests.add(M.digest(callback.masks))
    assert len(digests) == 2


def test_the_ticket_goes_on_from_the_trained_weights_under_the_mask(tmp_path):
    callback = GradualPruning(0.8, **EVERY_SIX, pruning=Pruning(exclude=[LAST]))
    trained = fit(tmp_path, callback)
    ticket = Ticket.load(callback.ticket(trained).save(tmp_path / "gradual.safetensors"))
    assert M.kept(ticket.masks) == {FIRST: 14}
    assert (ticket.level, ticket.provenance["sparsity"], ticket.provenance["exclude"]) == (1, 0.8, [LAST])
    probe = Probe(at=0)
    fit(tmp_path, ApplyTicket(ticket), probe, module=seeded(3, Net), max_steps=2)
    assert bits(probe.state["module"]) == bits(trained)
    assert callback.ticket(seeded(1, Net)).rewind.tensors.keys() == ticket.rewind.tensors.keys()


def test_a_second_fit_of_the_same_object_begins_dense(tmp_path):
    callback = GradualPruning(0.8, "4it")
    first = bits(fit(tmp_path, callback))
    assert bits(fit(tmp_path, callback)) == first


def test_a_ticket_before_any_fit_and_what_cannot_be_combined_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^no fit has begun: call ticket\(module\) after trainer\.fit$"):
        GradualPruning(0.5).ticket(Net())
    with pytest.raises(
        ValueError, match=r"^GradualPruning changes its masks, .* leave WeightAveraging out, or prune by"
    ):
        quiet(tmp_path, [GradualPruning(0.5), WeightAveraging()], max_steps=2).fit(Net(), Blobs())
    both = [GradualPruning(0.5), ApplyTicket(ticket_of(Net()))]
    with pytest.raises(
        ValueError, match=r"^GradualPruning and ApplyTicket both set masks: give a Trainer one of them$"
    ):
        quiet(tmp_path, both, max_steps=2).fit(Net(), Blobs())
    frozen = Net()
    frozen.net[1].weight.requires_grad_(False)
    rule = Pruning(score="snip", include=["net.1.weight"])
    with pytest.raises(
        ValueError, match=r"^score snip, layerwise needs gradients, and net\.1\.weight is frozen: exclude"
    ):
        quiet(tmp_path, [GradualPruning(0.5, pruning=rule)], max_steps=2).fit(frozen, Blobs())


def test_a_layer_is_named_at_the_update_before_the_one_that_would_empty_it(tmp_path):
    def warned(sparsity, **schedule):
        module = Net()
        with torch.no_grad():
            module.net[5].weight.mul_(1e-3)  # 60 of 132 weights
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            gradual = GradualPruning(sparsity, pruning=Pruning(scope="global"), **schedule)
            quiet(tmp_path, [gradual], max_steps=12, limit_val_batches=0).fit(module, Blobs())
        return [str(w.message).split(" 0 weights ")[1][:20] for w in seen if "about to collapse" in str(w.message)]

    assert warned(0.4) == []  # the only pruning: nothing is to come
    assert warned(0.5)[0].startswith("now")
    assert warned(0.5, begin="0it", end="2it", every="1it", initial=0.3)[0].startswith("at the next pruning")
