"""A score of one's own: what it forgets to declare and what it returns amiss is said in one line, before the fit if it
can be known there."""

import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from stranger import Blobs, Net, bits, quiet, seeded

from lottery_callbacks import GradualPruning, IterativeMagnitudePruning, NMPruning, Pruning
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional import scores as S
from lottery_callbacks.functional.scores import Evidence, needs, snip


class Steps(Callback):
    done = 0

    def on_train_batch_end(self, trainer, *_):
        self.done = trainer.global_step


def sensitivity(evidence):
    return {name: gradient.abs() for name, gradient in evidence.gradient().items()}


def helper(evidence):
    return evidence.hessian_vector(evidence.weights)


def by_helper(evidence, scale):
    return {name: scale * product for name, product in helper(evidence).items()}


def by_losses(evidence):
    weights = list(evidence.weights.values())
    return dict(zip(evidence.weights, torch.autograd.grad(sum(evidence.losses()), weights), strict=True))


class Scorer:
    """Methods and the object itself are scores."""

    def _gradient(self, evidence):
        return evidence.gradient()

    def method(self, evidence):
        return self._gradient(evidence)

    def __call__(self, evidence):
        return self._gradient(evidence)

    @classmethod
    def of_class(cls, evidence):
        return sensitivity(evidence)

    @staticmethod
    def static(evidence):
        return evidence.flow()


UNMARKED = {
    "function": sensitivity,
    "lambda": lambda evidence: snip(evidence),
    "module": lambda evidence: S.snip(evidence),
    "partial": functools.partial(by_helper, scale=2),
    "losses": by_losses,
    "by name": lambda evidence: getattr(evidence, "gradient")(),  # noqa: B009
    "object": Scorer(),
    "method": Scorer().method,
    "class method": Scorer.of_class,
    "static method": Scorer.static,
}
MOVED = {
    "index": lambda evidence: {name: evidence.movement[name] for name in evidence.weights},
    "items": lambda evidence: {name: -moved for name, moved in evidence.movement.items()},
    "known": lambda evidence: S.movement(evidence),
    "copy": lambda evidence: dict(evidence.movement),
}
PRUNERS = {
    "lottery": lambda folder, rule: IterativeMagnitudePruning(run_dir=folder, pruning=rule),
    "gradual": lambda folder, rule: GradualPruning(0.5, "6it", pruning=rule),
    "n:m": lambda folder, rule: NMPruning(2, 3, "6it", pruning=rule),
}


def fit(folder, callback, steps=8):
    counter, module = Steps(), seeded(0, Net)
    if isinstance(callback, IterativeMagnitudePruning):
        callback.select(0)
    trainer = quiet(folder, [callback, counter], max_steps=steps, limit_val_batches=0)
    return counter, module, lambda: trainer.fit(module, Blobs())


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_score_of_gradients_without_a_marker_is_refused_before_the_first_step(tmp_path, pruner):
    steps, module, run = fit(tmp_path, PRUNERS[pruner](tmp_path, Pruning(score=sensitivity)))
    before = bits(module)
    with pytest.raises(ValueError, match=r'^score sensitivity uses training batches .*@needs\("batches"\)'):
        run()
    assert (steps.done, bits(module)) == (0, before)


@pytest.mark.parametrize("form", UNMARKED)
def test_every_form_of_a_score_is_seen_through(tmp_path, form):
    steps, _, run = fit(tmp_path, GradualPruning(0.5, "6it", pruning=Pruning(score=UNMARKED[form])))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r'needs\("batches"\)') as refusal:
        run()
    assert steps.done == 0
    assert "\n" not in str(refusal.value)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", MOVED)
def test_a_score_of_the_movement_without_a_marker_is_refused_before_the_first_step(tmp_path, form):
    steps, _, run = fit(tmp_path, GradualPruning(0.5, "6it", pruning=Pruning(score=MOVED[form])))
    with pytest.raises(ValueError, match=r'^score <lambda> uses the movement of the weights, .*@needs\("movement"\)'):
        run()
    assert steps.done == 0


@pytest.mark.parametrize("form", ["function", "partial", "object", "method", "class method"])
def test_a_mark_makes_every_form_work(tmp_path, form):
    forms = {
        "function": lambda evidence: sensitivity(evidence),
        "partial": functools.partial(by_helper, scale=2),
        "object": Scorer(),
        "method": Scorer().method,
        "class method": Scorer.of_class,
    }
    rule = Pruning(score=needs("batches")(forms[form]))
    assert rule.needs == "batches"
    callback = GradualPruning(0.5, "6it", pruning=rule)
    steps, _, run = fit(tmp_path, callback)
    run()
    assert (steps.done, M.density(callback.masks)) == (8, 0.5)


def test_marks_are_seen_through_partials_and_calls():
    class Marked:
        @needs("movement")
        def __call__(self, evidence):
            return evidence.movement

    assert Pruning(score=functools.partial(functools.partial(snip))).needs == "batches"
    assert Pruning(score=Marked()).needs == "movement"
    assert Pruning(score=functools.partial(Marked())).needs == "movement"
    assert Pruning(score=lambda evidence: dict(evidence.weights)).needs is None


def test_a_score_that_needs_no_mark_is_called_at_prunings_alone(tmp_path):
    calls = []

    def score(evidence):
        calls.append(torch.get_rng_state())
        return {name: weight.abs() for name, weight in evidence.weights.items()}

    *_, run = fit(tmp_path, GradualPruning(0.5, "6it", pruning=Pruning(score=score)))
    run()
    assert len(calls) == 1


def test_a_score_that_can_do_without_movement_is_let_be(tmp_path):
    def score(evidence):
        if evidence.movement is not None:
            return dict(evidence.movement)
        return {name: weight.abs() for name, weight in evidence.weights.items()}

    callback = GradualPruning(0.5, "6it", pruning=Pruning(score=score))
    steps, _, run = fit(tmp_path, callback)
    run()
    assert (steps.done, M.density(callback.masks)) == (8, 0.5)


def test_a_score_that_hides_its_use_names_the_marker_where_it_fails(tmp_path):
    attribute = "GRADIENT".lower()
    steps, _, run = fit(
        tmp_path, GradualPruning(0.5, "6it", pruning=Pruning(score=lambda own: getattr(own, attribute)()))
    )
    with pytest.raises(ValueError, match=r'@needs\("batches"\)'):
        run()
    assert steps.done == 6


WRONG = {
    "no dict": (lambda weights: list(weights.values()), r"score wrong returned a list: return a dict, name -> tensor"),
    "missing": (lambda weights: {"a": weights["a"]}, r"score wrong gives none for b\.weight: score every name"),
    "number": (lambda weights: {name: 1.0 for name in weights}, r"score wrong gives a float for a: give a tensor"),
    "shape": (lambda weights: {n: w.flatten() for n, w in weights.items()}, r"the shape \(4,\) for a: .*\(2, 2\)"),
    "nan": (lambda weights: {n: w / 0 for n, w in weights.items()}, r"score wrong is not finite for a: did the"),
    "complex": (
        lambda weights: {n: w.to(torch.cfloat) for n, w in weights.items()},
        r"scores of a are complex, .* in wrong",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_return_names_the_score_and_the_weight(kind):
    make, message = WRONG[kind]

    def wrong(evidence):
        return make(evidence.weights)

    weights = {"a": torch.zeros(2, 2), "b.weight": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=message) as refusal:
        Pruning(score=wrong).next_masks(Evidence(weights), M.ones(weights), 0.5)
    assert "\n" not in str(refusal.value)


def test_pruned_weights_may_have_any_score_and_more_names_are_left_out():
    weights = {"a": torch.tensor([[0.0, 1.0], [2.0, 3.0]])}
    masks = {"a": weights["a"] > 0}
    rule = Pruning(score=lambda evidence: {"a": 1 / evidence.weights["a"], "else": None})
    assert rule.next_masks(Evidence(weights), masks, 0.34)["a"].tolist() == [[False, True], [True, False]]
