import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from lottery_callbacks.functional import subset_sum as module
from lottery_callbacks.functional.subset_sum import cost, frontier, subset_sum

try:
    import numba
except ModuleNotFoundError:
    numba = None

needs_numba = pytest.mark.skipif(numba is None, reason="numba is not installed")
KERNELS = [False, pytest.param(True, marks=needs_numba)]
INF = torch.inf


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_force(target, samples, valid):
    """The least error of each size 0..n over all subsets, inf where there is none."""
    n = len(samples)
    subsets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64).view(-1, n)
    errors = (subsets @ samples.masked_fill(~valid, 0.0) - target).abs()
    errors[(subsets[:, ~valid] > 0).any(1)] = INF
    return torch.stack([errors[subsets.sum(1) == size].min() for size in range(n + 1)])


def holds(answer, targets, samples, valid):
    """What is said of the chosen samples is so, whichever they are; sums add from the first to the last."""
    sums = torch.zeros_like(targets)
    for i in range(samples.shape[-1]):
        sums += torch.where(answer.chosen[..., i], samples[..., i], 0.0)
    assert not (answer.chosen & ~valid).any()
    assert torch.equal(answer.sums, sums)
    assert torch.equal(answer.errors[answer.errors.isfinite()], (targets - sums).abs()[answer.errors.isfinite()])
    assert torch.equal(answer.sizes, answer.chosen.sum(-1))


@st.composite
def batches(draw, most=8):
    """Numbers on a binary grid, so that sums are exact and zeros, duplicates and ties are common."""
    n, sets, each = draw(st.integers(1, most)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    seed, coarse = draw(st.integers(0, 2**31)), draw(st.sampled_from([1, 4, 64, 2**24]))
    g = torch.Generator().manual_seed(seed)
    samples = torch.randint(-coarse, coarse + 1, (sets, n), generator=g).double() / coarse
    targets = torch.randint(-3 * coarse, 3 * coarse + 1, (sets, each), generator=g).double() / (2 * coarse)
    valid = torch.rand(sets, n, generator=g) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    layout = draw(st.sampled_from(["shared", "own", "sets"]))
    if layout == "shared":
        return targets.flatten(), samples[0], valid[0]
    return (targets[:, 0] if layout == "own" else targets), samples, valid


def forced(targets, samples, valid):
    """`by_force` of each target: (sizes, *targets)."""
    if samples.ndim == 1:
        each = [by_force(t, samples, valid) for t in targets]
    else:
        each = [by_force(t, x, v) for row, x, v in zip(targets, samples, valid, strict=True) for t in row.view(-1)]
    return torch.stack(each, dim=-1).view(-1, *targets.shape)


def like_targets(samples, targets):
    """A set a target, for comparing by element."""
    return samples.expand(*targets.shape, -1) if samples.ndim == 1 or targets.ndim == 1 else samples.unsqueeze(1)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=60)
@given(batch=batches(), data=st.data())
def test_every_question_is_answered_as_by_trying_all_subsets(kernel, batch, data):
    targets, samples, valid = batch
    truth, n = forced(*batch), samples.shape[-1]
    numbers, allowed = like_targets(samples, targets), like_targets(valid, targets)

    for size in (None, *range(n + 1)):
        answer = subset_sum(targets, samples, size=size, valid=valid, kernel=kernel)
        holds(answer, targets, numbers, allowed)
        assert torch.equal(answer.errors, truth.amin(0) if size is None else truth[size])
        assert torch.equal(answer.feasible, answer.errors.isfinite())
        if size is not None:
            assert (answer.sizes == torch.where(answer.feasible, size, 0)).all()

    least = data.draw(st.integers(0, 2))
    answer = subset_sum(targets, samples, min_size=least, valid=valid, kernel=kernel)
    holds(answer, targets, numbers, allowed)
    admissible = truth[least:] if least <= n else torch.full_like(truth, INF)
    assert torch.equal(answer.errors, admissible.amin(0))
    assert (answer.sizes >= least)[answer.feasible].all()
    assert torch.equal(answer.feasible, answer.errors.isfinite())

    tolerance = data.draw(st.sampled_from([0.0, 0.01, 0.3]))
    answer = subset_sum(targets, samples, tolerance=tolerance, min_size=least, valid=valid, kernel=kernel)
    holds(answer, targets, numbers, allowed)
    within = admissible <= tolerance
    assert torch.equal(answer.feasible, within.any(0))
    first = within.to(torch.uint8).argmax(0)
    expected = torch.where(within.any(0), admissible.gather(0, first.unsqueeze(0))[0], admissible.amin(0))
    assert torch.equal(answer.errors, expected)
    assert torch.equal(answer.sizes[answer.feasible], (first + least)[answer.feasible])
    assert torch.equal(answer.empty, answer.feasible & (answer.sizes == 0))


@needs_numba
@settings(deadline=None, max_examples=60)
@given(batch=batches(most=14), size=st.sampled_from([None, 1, 2, 3, 7]))
def test_the_kernel_and_torch_choose_the_same_subsets(batch, size):
    targets, samples, valid = batch
    compiled, plain = (subset_sum(targets, samples, size=size, valid=valid, kernel=k) for k in (True, False))
    assert torch.equal(compiled.chosen, plain.chosen)
    assert torch.equal(compiled.errors, plain.errors)


@needs_numba
@pytest.mark.parametrize("size", [None, 1, 5, 9, 18])
@pytest.mark.parametrize("tiny", [1.0, 1e-3, 1e-9, 0.0])
def test_they_agree_on_clustered_sums_and_targets_far_out(size, tiny):
    """What the kernel expects of sums fails here: it must notice, with wider cells or by ordering them."""
    g = torch.Generator().manual_seed(7)
    samples = torch.randn(12, 18, generator=g, dtype=torch.float64)
    samples[:, ::2] *= tiny
    targets = torch.randn(12, 3, generator=g, dtype=torch.float64) * torch.tensor([1e-9, 3.0, 30.0])
    for of, sets in ((targets, samples), (targets[:, 1], samples), (targets[:, 2], samples[0])):
        compiled, plain = (subset_sum(of, sets, size=size, kernel=kernel) for kernel in (True, False))
        assert torch.equal(compiled.chosen, plain.chosen)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [None, 3])
def test_many_random_targets_as_by_trying_all_subsets(kernel, size):
    g = torch.Generator().manual_seed(0)
    samples = torch.rand(40, 13, generator=g, dtype=torch.float64) - 0.5
    targets = torch.randn(40, 30, generator=g, dtype=torch.float64)  # some far beyond all sums
    subsets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=13)), dtype=torch.float64)
    sums = subsets[subsets.sum(1) == size] @ samples.T if size else subsets @ samples.T
    for sets, of, truth in (
        (samples, targets, (sums.T.unsqueeze(1) - targets.unsqueeze(2)).abs().amin(2)),
        (samples, targets[:, 0], (sums.T - targets[:, :1]).abs().amin(1)),
        (samples[0], targets[0], (sums[:, 0] - targets[0].unsqueeze(1)).abs().amin(1)),
    ):
        answer = subset_sum(of, sets, size=size, kernel=kernel)
        assert torch.allclose(answer.errors, truth, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n", "size", "scale"), [(12, None, 1.0), (16, None, 1e3), (14, 3, 1.0), (16, 5, 1e-3)])
def test_integer_programming_finds_nothing_nearer(kernel, n, size, scale):
    rng = np.random.default_rng(n)
    samples, targets = scale * rng.uniform(-1, 1, n), scale * rng.uniform(-1, 1, 2)
    answer = subset_sum(torch.tensor(targets), torch.tensor(samples), size=size, kernel=kernel)
    for target, error in zip(targets, answer.errors.tolist(), strict=True):
        assert error <= by_milp(samples / scale, target / scale, size) * scale + 1e-9 * scale


def by_milp(samples, target, size):
    """min z with |target - samples x| <= z and x binary: the error of the x that HiGHS finds."""
    n = len(samples)
    rows = [np.append(samples, 1.0), np.append(samples, -1.0)]
    constraints = [LinearConstraint(np.array(rows), [target, -np.inf], [np.inf, target])]
    if size is not None:
        constraints.append(LinearConstraint(np.append(np.ones(n), 0.0), size, size))
    found = milp(
        np.append(np.zeros(n), 1.0),
        integrality=np.append(np.ones(n), 0),
        bounds=Bounds(np.zeros(n + 1), np.append(np.ones(n), np.inf)),
        constraints=constraints,
    )
    return abs(target - samples @ np.round(found.x[:n]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_frontier_is_the_fixed_sizes_one_by_one(kernel):
    g = torch.Generator().manual_seed(1)
    samples, targets = torch.randn(6, 9, generator=g), torch.randn(6, 2, generator=g)
    valid = torch.rand(6, 9, generator=g) < 0.8
    found = frontier(targets, samples, valid=valid, kernel=kernel)
    assert found.chosen.shape == (10, 6, 2, 9)
    for size in range(10):
        alone = subset_sum(targets, samples, size=size, valid=valid, kernel=kernel)
        for name in ("chosen", "sums", "errors", "feasible"):
            assert torch.equal(getattr(found, name)[size], getattr(alone, name))
    assert torch.equal(found.errors.amin(0), subset_sum(targets, samples, valid=valid, kernel=kernel).errors)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("question", [{}, {"size": 3}, {"tolerance": 0.01}, {"min_size": 1}])
@pytest.mark.parametrize("layout", ["shared", "own", "sets"])
def test_chunks_change_nothing(kernel, question, layout):
    g = torch.Generator().manual_seed(2)
    samples, targets = torch.randn(7, 10, generator=g), torch.randn(7, 5, generator=g)
    samples, targets = {
        "shared": (samples[0], targets.flatten()),
        "own": (samples, targets[:, 0]),
        "sets": (samples, targets),
    }[layout]
    whole = subset_sum(targets, samples, kernel=kernel, **question)
    for memory in (1, 20_000):
        torch.set_num_threads(2)
        parts = subset_sum(targets, samples, kernel=kernel, memory=memory, **question)
        assert torch.equal(parts.chosen, whole.chosen)
        assert torch.equal(parts.errors, whole.errors)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_has_no_answer_is_reported(kernel):
    samples = torch.tensor([[0.5, 0.25, torch.nan], [9.0, 9.0, 9.0]])
    valid = torch.tensor([[True, True, False], [False, False, False]])
    targets = torch.tensor([0.7, 0.0])
    three = subset_sum(targets, samples, size=3, valid=valid, kernel=kernel)
    assert three.feasible.tolist() == [False, False]
    assert three.errors.tolist() == [INF, INF]
    assert not three.chosen.any()
    assert three.sums.tolist() == [0, 0]
    near = subset_sum(targets, samples, tolerance=0.01, valid=valid, kernel=kernel)
    assert near.feasible.tolist() == [False, True]  # a miss keeps the nearest subset of any size
    assert near.sums.tolist() == [0.75, 0]
    assert near.empty.tolist() == [False, True]
    some = subset_sum(targets, samples, min_size=1, valid=valid, kernel=kernel)
    assert some.feasible.tolist() == [True, False]
    assert subset_sum(targets, samples, min_size=4, valid=valid, kernel=kernel).errors.tolist() == [INF, INF]
    assert subset_sum(targets, samples, size=4, valid=valid, kernel=kernel).errors.tolist() == [INF, INF]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_target_of_zero_is_k_samples_in_the_fixed_question_and_none_in_the_free_one(kernel):
    samples, zero = torch.tensor([0.5, -0.25, 0.125, 1.0]), torch.zeros(1)
    free, fixed = subset_sum(zero, samples, kernel=kernel), subset_sum(zero, samples, size=3, kernel=kernel)
    assert free.empty.tolist() == [True]
    assert fixed.chosen.tolist() == [[True, True, True, False]]
    some = subset_sum(zero, samples, min_size=1, kernel=kernel)
    assert (some.sizes.tolist(), some.errors.tolist()) == ([1], [0.125])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1e-300, 1e300])
def test_sets_of_equals_and_extreme_scales_are_no_trap(kernel, value):
    samples = torch.full((26,), value, dtype=torch.float64)
    targets = torch.tensor([0.0, 1.0, -1.0, 3.0], dtype=torch.float64) * abs(value)
    answer = subset_sum(targets, samples, kernel=kernel)
    reach = samples[0].sign() * targets >= 0
    assert (answer.errors[reach] == 0).all()
    assert torch.equal(answer.errors[~reach], targets[~reach].abs())
    assert (subset_sum(targets, samples, size=5, kernel=kernel).sizes == 5).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_forty_samples_are_searched(kernel):
    g = torch.Generator().manual_seed(3)
    samples = torch.randint(-(2**24), 2**24, (40,), generator=g).double() / 2**24
    hidden = torch.rand(40, generator=g) < 0.5
    answer = subset_sum(samples[hidden].sum().view(1), samples, kernel=kernel)
    assert answer.errors.tolist() == [0.0]


def test_sums_are_exact_for_products_of_weights_on_a_grid():
    g = torch.Generator().manual_seed(4)
    u, v = (torch.randint(-(2**24), 2**24, (50, 21), generator=g).double() / 2**24 for _ in range(2))
    hidden = torch.rand(50, 21, generator=g) < 0.5
    assert (subset_sum((u * v * hidden).sum(1), u * v).errors == 0).all()


def test_progress_rises_to_the_total():
    g = torch.Generator().manual_seed(5)
    samples, targets = torch.randn(30, 8, generator=g), torch.randn(30, generator=g)
    for question, total in (({}, 30), ({"tolerance": 0.05}, 270), ({"min_size": 1}, 270), ({"min_size": 3}, 210)):
        seen = []
        subset_sum(targets, samples, memory=1, progress=lambda *s, seen=seen: seen.append(s), **question)
        assert {t for _, t in seen} == {total}
        assert [d for d, _ in seen] == sorted(d for d, _ in seen)
        assert seen[-1] == (total, total)
    seen = []
    frontier(targets, samples, progress=lambda *s: seen.append(s))
    assert seen[-1] == (270, 270)


def test_progress_keeps_back_what_a_least_size_may_still_ask():
    samples = torch.randn(30, 8, generator=torch.Generator().manual_seed(6))
    seen: list[tuple[int, int]] = []
    subset_sum(torch.zeros(30), samples, min_size=1, memory=1, progress=lambda *s: seen.append(s))  # all ask again
    assert seen[29][0] <= 30
    assert len(seen) > 100
    assert [d for d, _ in seen[:-2]] == sorted(d for d, _ in seen[:-2])
    assert all(d < t for d, t in seen[:100])


def test_indices_are_the_chosen_places():
    answer = subset_sum(torch.tensor([[0.75, 0.0], [4.0, 1.0]]), torch.tensor([[0.5, 0.25], [3.0, 1.0]]))
    assert answer.indices.tolist() == [[[0, 1], [-1, -1]], [[0, 1], [1, -1]]]
    assert subset_sum(torch.zeros(0), torch.ones(3)).indices.shape == (0, 0)
    assert subset_sum(torch.zeros(2), torch.ones(3)).indices.shape == (2, 0)


def test_two_threads_share_the_targets_of_one_set(monkeypatch):
    g = torch.Generator().manual_seed(7)
    samples, targets = torch.randn(12, generator=g), torch.randn(500, generator=g)
    alone = subset_sum(targets, samples)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    shared = subset_sum(targets, samples)
    assert shared.errors.equal(alone.errors)
    assert shared.chosen.equal(alone.chosen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"valid": torch.ones(3)}, "valid boolean"),
        (
            {
                "targets": torch.tensor([-1.7e308], dtype=torch.float64),
                "samples": torch.full((1,), 1e308, dtype=torch.float64),
            },
            "finite",
        ),
    ],
)
def test_what_would_go_wrong_later_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        subset_sum(**{"targets": torch.zeros(1), "samples": torch.ones(3)} | arguments)


def test_a_numba_that_does_not_import_leaves_the_work_to_torch(tmp_path):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('Numba needs NumPy 2.4 or less')")
    code = "import torch; from lottery_callbacks.functional.subset_sum import subset_sum as s; "
    code += "print(s(torch.ones(1), torch.ones(3)).sizes.item())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1", done.stderr


def test_cost_counts_the_additions_and_many_targets_on_a_set_share_them():
    samples, targets = torch.zeros(510, 21), torch.zeros(510, 784)
    own = cost(torch.zeros(1), torch.zeros(1, 21)).additions
    assert own == 2**10 + 2**11
    shared = cost(targets, samples)
    assert shared.additions / targets.numel() < own / 20
    assert shared.bytes == targets.numel() * 38 + 2**28
    three = cost(torch.zeros(1), torch.zeros(1, 21), [3]).additions
    assert three == (1 + 10 + 45 + 120) + (1 + 11 + 55 + 165)
    ragged = torch.ones(510, 21, dtype=torch.bool)
    ragged[:, 10:] = False
    assert cost(targets, samples, valid=ragged).additions < shared.additions / 10


def test_an_empty_batch_has_an_empty_answer():
    for targets, samples in ((torch.zeros(0), torch.ones(3)), (torch.zeros(0), torch.ones(0, 3))):
        for question in ({}, {"size": 2}, {"tolerance": 0.1}, {"min_size": 1}):
            assert subset_sum(targets, samples, **question).chosen.shape == (0, 3)


@pytest.mark.parametrize(
    ("targets", "samples", "question", "message"),
    [
        (torch.zeros(2), torch.zeros(3, 4), {}, "do not fit: give"),
        (torch.zeros(2, 2), torch.zeros(4), {}, "do not fit: give"),
        (torch.zeros(2), torch.zeros(4), {"valid": torch.ones(1, 4, dtype=torch.bool)}, "do not fit: give"),
        (torch.zeros(2), torch.zeros(41), {}, "1 to 40 samples, not 41"),
        (torch.zeros(2), torch.zeros(0), {}, "1 to 40 samples, not 0"),
        (torch.tensor([torch.nan]), torch.zeros(4), {}, "must be finite"),
        (torch.zeros(1), torch.tensor([torch.inf]), {}, "must be finite"),
        (torch.zeros(1), torch.zeros(4), {"size": 2, "tolerance": 0.1}, "without `tolerance` and `min_size`"),
        (torch.zeros(1), torch.zeros(4), {"size": 2, "min_size": 1}, "without `tolerance` and `min_size`"),
        (torch.zeros(1), torch.zeros(4), {"size": -1}, "0 or more"),
        (torch.zeros(1), torch.zeros(4), {"tolerance": torch.nan}, "0 or more"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(targets, samples, question, message):
    with pytest.raises(ValueError, match=message):
        subset_sum(targets, samples, **question)


def test_without_numba_torch_answers_and_asking_for_the_kernel_names_the_mend(monkeypatch):
    monkeypatch.setattr(module, "_compiles", lambda: False)
    monkeypatch.setitem(sys.modules, "lottery_callbacks.functional.subset_sum_kernels", None)
    assert subset_sum(torch.zeros(1), torch.ones(3)).feasible.tolist() == [True]
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lottery-lightning\[subset-sum\]'"):
        subset_sum(torch.zeros(1), torch.ones(3), kernel=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("question", [{}, {"size": 3}, {"tolerance": 0.01}])
def test_a_gpu_chooses_the_same_subsets(question):
    g = torch.Generator().manual_seed(6)
    samples, targets = torch.randn(50, 15, generator=g), torch.randn(50, 4, generator=g)
    here, there = subset_sum(targets, samples, **question), subset_sum(targets.cuda(), samples.cuda(), **question)
    assert torch.equal(here.chosen, there.chosen.cpu())
    assert torch.equal(here.errors, there.errors.cpu())
