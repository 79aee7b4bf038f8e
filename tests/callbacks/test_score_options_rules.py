"""Options of scores and counts: part of the rule, refused before the first step, and without a trace in the run."""

from functools import partial

import lightning.pytorch as L
import pytest
import torch
from convs import Convs, loader
from stranger import bits, quiet, seeded
from torch.nn import functional as F

from lottery_callbacks import GradualPruning, IterativeMagnitudePruning, NMPruning, Pruning, Ticket
from lottery_callbacks.functional.scores import Evidence


def test_options_are_part_of_the_rule_and_what_equals_a_default_is_not():
    rule = Pruning("grasp", "global", score_options={"temperature": 200, "mode": "evaluation"}, counts="truncated")
    assert str(rule) == "grasp(mode=evaluation, temperature=200.0), global, truncated"
    assert str(Pruning("grasp", score_options={"temperature": 1, "mode": "training"}, counts="rounded")) == str(
        Pruning("grasp")
    )
    assert str(Pruning("synflow", score_options={"statistics": "running"})) == "synflow(statistics=running), layerwise"
    assert [str(Pruning()), str(Pruning("snip", "erk"))] == ["magnitude, layerwise", "snip, erk"]


@pytest.mark.parametrize(
    "other", [{}, {"score_options": {"mode": "evaluation"}, "counts": "truncated"}, {"score_options": {}}]
)
def test_tickets_of_another_option_are_of_another_rule(tmp_path, other):
    imp = IterativeMagnitudePruning(
        0.3, run_dir=tmp_path, pruning=Pruning("snip", score_options={"mode": "evaluation"})
    )
    level = next(imp.levels(1))
    quiet(level.run_dir, [imp], max_steps=2).fit(Convs(), loader())
    assert Ticket.load(imp.ticket_path(1)).provenance["pruning"] == "snip(mode=evaluation), layerwise"
    found = IterativeMagnitudePruning(0.3, run_dir=tmp_path, pruning=Pruning("snip", **other))
    with pytest.raises(ValueError, match=r"another rule: pruning is 'snip\(mode=evaluation\), layerwise' there and"):
        next(found.levels(1))


@pytest.mark.parametrize(
    "other", [{"score_options": {"mode": "evaluation"}}, {"counts": "truncated"}], ids=["mode", "counts"]
)
def test_a_checkpoint_of_another_option_is_of_another_rule(tmp_path, other):
    def fit(steps, path=None, **pruning):
        gradual = GradualPruning(0.5, "2it", pruning=Pruning("snip", **pruning))
        trainer = quiet(tmp_path, [gradual], max_steps=steps)
        trainer.fit(Convs(), loader(), ckpt_path=path)
        return trainer

    for first, then in (({}, other), (other, {})):
        fit(4, **first).save_checkpoint(tmp_path / "torn.ckpt")
        with pytest.raises(ValueError, match="was pruned by another rule: pruning is"):
            fit(6, tmp_path / "torn.ckpt", **then)


@pytest.mark.parametrize(
    ("score", "options", "said"),
    [
        ("snip", {"norms": "evaluation"}, "score snip has no option 'norms': choose mode ('training' or 'evaluation')"),
        ("magnitude", {"mode": "evaluation"}, "score magnitude has no option 'mode': it has none"),
        ("movement", {"temperature": 2.0}, "score movement has no option 'temperature': it has none"),
        ("snip", {"mode": "eval"}, "mode='eval' is not known: choose 'training' or 'evaluation'"),
        ("synflow", {"statistics": True}, "statistics=True is not known: choose 'neutral' or 'running'"),
        ("grasp", {"temperature": 0}, "temperature=0.0 is not known: choose a finite number above 0"),
        ("grasp", {"temperature": "hot"}, "temperature='hot' is not known: choose a finite number above 0"),
        ("grasp", {"temperature": float("nan")}, "temperature=nan is not known: choose a finite number above 0"),
    ],
)
def test_an_option_that_a_score_has_not_is_refused_with_those_that_it_has(score, options, said):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Pruning(score, score_options=options)
    assert str(error.value) == said


def test_counts_are_of_three_kinds_and_have_no_meaning_for_patterns():
    with pytest.raises(ValueError, match=r"^counts='floor' is not known: choose one of rounded, truncated, ceiling$"):
        Pruning(counts="floor")
    with pytest.raises(ValueError, match=r"^counts='truncated' has no meaning for 2:4"):
        NMPruning(pruning=Pruning(counts="truncated"))


def test_a_function_has_its_own_keyword_parameters_as_options():
    def power(evidence, exponent=1.0):
        return {name: weight.detach().abs() ** exponent for name, weight in evidence.weights.items()}

    rule = Pruning(power, score_options={"exponent": -1.0})
    assert str(rule) == "power(exponent=-1.0), layerwise"
    weights = {"a": torch.tensor([[1.0, 2.0, 4.0]])}
    assert rule.next_masks(Evidence(weights), {"a": torch.ones(1, 3, dtype=torch.bool)}, 0.3)["a"].tolist() == [
        [True, True, False]
    ]


def twice(logits, labels):
    return F.cross_entropy(logits.log_softmax(1), labels)


def squared(logits, labels):
    return F.mse_loss(logits, F.one_hot(labels, 3).double())


class Detector(Convs):
    """Without a loss in eval mode."""

    def training_step(self, batch, batch_idx):
        found = super().training_step(batch, batch_idx)
        detections = [found]
        return detections[0] if self.training else sum(detections.values())


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (
            partial(Convs, squared),
            {"temperature": 200},
            "training_step calls none of cross_entropy, binary_cross_entro",
        ),
        (partial(Convs, twice), {"temperature": 200}, "training_step calls cross_entropy and log_softmax: leave"),
        (Detector, {"mode": "evaluation"}, "Detector.training_step fails there ('list' object has no"),
    ],
    ids=["no logits", "two of them", "no loss in eval mode"],
)
@pytest.mark.parametrize(
    "make", [IterativeMagnitudePruning, partial(GradualPruning, 0.5, "8it")], ids=["imp", "gradual"]
)
def test_a_loss_that_an_option_cannot_change_is_refused_before_the_first_step(tmp_path, make, module, options, said):
    callback = make(pruning=Pruning("grasp", score_options=options))
    if isinstance(callback, IterativeMagnitudePruning):
        callback.run_dir = tmp_path
    trainer, net = quiet(tmp_path, [callback], max_steps=12), module()
    before = bits(net)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        trainer.fit(net, loader())
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert trainer.global_step == 0
    assert bits(net) == before
    assert all(part.training for part in net.modules())


def test_a_first_batch_without_a_loss_is_passed_over(tmp_path):
    class Late(Convs):
        def training_step(self, batch, batch_idx):
            first = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready == 1
            return None if first else super().training_step(batch, batch_idx)

    def fit(make):
        gradual = GradualPruning(0.5, "8it", pruning=Pruning("grasp", score_options={"temperature": 2}))
        trainer = quiet(tmp_path, [gradual], max_steps=9)
        trainer.fit(make(), loader())
        return gradual.masks

    with pytest.raises(ValueError, match="none of cross_entropy"):
        fit(partial(Late, squared))
    assert sum(int(mask.sum()) for mask in fit(Late).values()) == 13 + 54 + 6


@pytest.mark.parametrize("score", ["snip", "grasp"])
def test_scoring_in_eval_mode_leaves_the_run_and_the_modes_as_they_are(tmp_path, score):
    class Frozen(Convs):
        def on_train_epoch_start(self):
            self.norm1.eval()

    def fit(**pruning):
        imp = IterativeMagnitudePruning(0.5, run_dir=tmp_path / f"{len(pruning)}", pruning=Pruning(**pruning))
        module = seeded(1, Frozen)
        L.seed_everything(5, verbose=False)
        quiet(tmp_path, [imp], max_steps=9).fit(module, loader())
        return module

    plain, scored = fit(), fit(score=score, score_options={"mode": "evaluation"}, batches=2)
    assert bits(scored) == bits(plain)
    assert [part.training for part in scored.modules()] == [part.training for part in plain.modules()]
    assert not scored.norm1.training
    assert plain.modes == {(True, False)}
    assert scored.modes == {(True, False), (False, False)}
