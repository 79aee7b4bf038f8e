"""What is estimated from products with a matrix, against the matrix: known spectra, standard errors, counts."""

import builtins
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import spectrum as S

DOUBLE = torch.float64


def seed(number=0):
    return torch.Generator().manual_seed(number)


def symmetric(eigenvalues, number=0, dtype=DOUBLE):
    """A dense matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(eigenvalues, dtype=DOUBLE)
    random = torch.randn(len(values), len(values), generator=seed(number), dtype=DOUBLE)
    basis = torch.linalg.qr(random).Q
    return ((basis * values) @ basis.T).to(dtype)


class Counted:
    """A matrix that counts the vectors it is multiplied with, and how many came at once."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype, self.device = matrix, matrix.shape, matrix.dtype, matrix.device
        self.products, self.widest = 0, 0

    def __matmul__(self, vectors):
        columns = vectors.reshape(len(vectors), -1).shape[1]
        self.products, self.widest = self.products + columns, max(self.widest, columns)
        return self.matrix @ vectors


EIGENVALUES = torch.cat([torch.linspace(-2, 2, 60), torch.tensor([5.0, 9.0, 30.0])]).double()
MATRIX = symmetric(EIGENVALUES)
PARTS = [20, 0, 43]


# ---- diagonal and trace


@given(st.integers(1, 12), st.integers(0, 5), st.integers(1, 20))
def test_enough_draws_or_an_exact_diagonal_are_the_diagonal(size, extra, chunk):
    matrix = Counted(symmetric(torch.randn(size, generator=seed(size))))
    found = S.exact_diagonal(matrix, chunk=chunk)
    assert (matrix.products, matrix.widest) == (size, min(size, chunk))
    assert (found.products, found.trace().error, found.errors.any().item()) == (size, 0, False)
    torch.testing.assert_close(found.values, matrix.matrix.diagonal())
    assert found.trace().value == pytest.approx(float(matrix.matrix.trace()), abs=1e-12)
    generator = seed()
    again = S.diagonal(matrix, generator, size + extra, chunk=chunk)
    assert torch.equal(again.values, found.values)
    assert generator.get_state().equal(seed().get_state())  # nothing is drawn


def test_an_exact_diagonal_has_a_limit_that_names_the_mend():
    with pytest.raises(
        ValueError, match=r"an exact diagonal of 63 takes as many products: use diagonal\(\), or limit=63"
    ):
        S.exact_diagonal(MATRIX, limit=62)
    assert S.exact_diagonal(MATRIX, limit=63, parts=PARTS).sums.shape == (1, 3)


def test_two_draws_are_the_formula():
    generator = seed(4)
    signs = [torch.randint(2, (63,), generator=generator, dtype=torch.int8).double() * 2 - 1 for _ in range(2)]
    samples = torch.stack([v * (MATRIX @ v) for v in signs])
    found = S.diagonal(MATRIX, seed(4), 2, PARTS)
    torch.testing.assert_close(found.values, samples.mean(0))
    torch.testing.assert_close(found.errors, samples.std(0) / math.sqrt(2))
    for part, sums in ((None, samples.sum(1)), (0, samples[:, :20].sum(1)), (2, samples[:, 20:].sum(1))):
        assert found.trace(part) == pytest.approx((float(sums.mean()), float(sums.std()) / math.sqrt(2)))
    assert found.trace(1) == (0, 0)


def test_standard_errors_are_what_the_estimates_err_by():
    variance = (MATRIX**2).sum(1) - MATRIX.diagonal() ** 2
    found = [S.diagonal(MATRIX, seed(number), 40, PARTS) for number in range(50)]
    scores = torch.stack([(one.values - MATRIX.diagonal()) / one.errors for one in found])
    assert float(scores.mean()) == pytest.approx(0, abs=0.05)
    assert float(scores.std()) == pytest.approx(1, abs=0.05)
    squares = torch.stack([one.errors**2 for one in found]).mean(0)
    torch.testing.assert_close(squares, variance / 40, rtol=0.2, atol=0)
    traces = [one.trace() for one in found]
    variance = 2 * float(variance.sum())  # of v'Av, of signs
    assert sum(one.error**2 for one in traces) / 50 == pytest.approx(variance / 40, rel=0.2)
    assert sum(one.value for one in traces) / 50 == pytest.approx(
        float(MATRIX.trace()), abs=3 * math.sqrt(variance / 2000)
    )


def test_the_chunk_changes_no_draw_and_counts_are_right():
    matrices = [Counted(MATRIX) for _ in range(3)]
    found = [S.diagonal(matrix, seed(1), 11, chunk=chunk) for matrix, chunk in zip(matrices, (1, 4, 50), strict=True)]
    assert [(matrix.products, matrix.widest) for matrix in matrices] == [(11, 1), (11, 4), (11, 11)]
    assert {one.products for one in found} == {11}
    for other in found[1:]:
        torch.testing.assert_close(other.values, found[0].values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.errors, found[0].errors, rtol=1e-10, atol=1e-12)


def test_one_draw_has_no_error_and_none_is_refused():
    found = S.diagonal(MATRIX, seed(), 1)
    assert found.errors.isnan().all()
    assert math.isnan(found.trace().error)
    assert math.isfinite(found.trace().value)
    with pytest.raises(ValueError, match="draws=0 tell nothing: choose 1 or more, 2 for a standard error"):
        S.diagonal(MATRIX, seed(), 0)


def test_a_diagonal_of_float32_is_summed_in_double():
    found = S.diagonal(1e8 * torch.eye(50) + torch.diag(torch.arange(50.0)), seed(), 30)  # float32: steps of 8
    assert found.values.dtype == DOUBLE
    assert found.errors.max() == 0  # each draw is the same; sums of squares in float32 would differ
    assert found.trace().value == float((1e8 * torch.eye(50) + torch.diag(torch.arange(50.0))).double().trace())


# ---- extreme eigenvalues

SPECTRA = {
    "indefinite": torch.cat([torch.linspace(-2, 2, 120), torch.tensor([5.0, 9.0, 30.0])]).double(),
    "a null space": torch.cat([torch.tensor([-5.0]), torch.zeros(300), torch.linspace(1, 50, 20)]).double(),
    "semidefinite": torch.cat([torch.zeros(300), torch.linspace(1, 50, 20)]).double(),
    "negative": -torch.linspace(1, 10, 100).double(),
    "the identity": torch.ones(80).double(),
    "far from 0": torch.linspace(1000, 1001, 150).double(),
    "small": torch.linspace(-1e-9, 3e-9, 90).double(),
    "few": torch.tensor([-1.0, 2.0, 7.0]).double(),
}


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_extremes_of_a_known_spectrum(name, dtype):
    values = SPECTRA[name].sort().values
    matrix = Counted(symmetric(values, 1, dtype))
    tolerance = 1e-10 if dtype == DOUBLE else 1e-5
    count = 1 if name == "semidefinite" else 2  # the 0 of many is found once
    found = S.extremes(matrix, seed(), count, tolerance, 2000)
    allowed = {"rtol": 0, "atol": 20 * tolerance * float(values.abs().max())}
    torch.testing.assert_close(found.smallest, values[:count], **allowed)
    torch.testing.assert_close(found.largest, values.flip(0)[:count], **allowed)
    assert found.products == matrix.products <= 400
    assert found.smallest.dtype == found.largest.dtype == DOUBLE


def test_extremes_come_of_the_generator_alone(global_rng_untouched):
    first, again, other = (S.extremes(symmetric(SPECTRA["indefinite"]), seed(n), tolerance=1e-3) for n in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(first.smallest) == len(first.largest) == 1


def test_a_search_that_is_too_long_ends_with_the_mend():
    matrix = Counted(symmetric(SPECTRA["far from 0"]))
    with pytest.raises(RuntimeError, match="not converged in 30 products: give more, or a tolerance above 1e-12"):
        S.extremes(matrix, seed(), tolerance=1e-12, most=30)
    assert matrix.products == 30


@pytest.mark.parametrize("size", [3, 99])
def test_a_matrix_of_nan_has_extremes_of_nan_and_one_of_zeros_zeros(size):
    for value in (math.nan, 0.0):
        found = S.extremes(torch.full((size, size), value), seed(), 2)
        assert found.smallest.tolist() == pytest.approx([value] * 2, nan_ok=True)
        assert found.largest.tolist() == pytest.approx([value] * 2, nan_ok=True)
    with pytest.raises(ValueError, match=f"there are {size} eigenvalues: choose a count from 1 to {size}"):
        S.extremes(torch.eye(size), seed(), size + 1)
    assert len(S.extremes(torch.eye(size), seed(), size).largest) == size


def test_without_scipy_one_line_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "scipy":
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ModuleNotFoundError, match=r'need scipy: pip install "lottery-lightning\[curvature\]"'):
        S.extremes(symmetric(torch.arange(70)), seed())
    assert float(S.extremes(MATRIX, seed()).largest) == pytest.approx(30)  # small: dense


# ---- spectral density


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_nodes_and_weights_integrate_polynomials_exactly(dtype):
    values = torch.cat([torch.linspace(-1, 1, 100), torch.tensor([3.0, 4.0])]).double()
    matrix, steps = symmetric(values, 2, dtype), 12
    found = S.spectrum(matrix, seed(3), draws=2, steps=steps)
    generator = seed(3)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        start = torch.randint(2, (102,), generator=generator, dtype=torch.int8).double() * 2 - 1
        power = start.clone()
        for degree in range(2 * steps):
            moment = float((weights * (nodes / 4) ** degree).sum())
            assert moment == pytest.approx(float(start @ power) / 102, rel=1e-6 if dtype == DOUBLE else 1e-3, abs=1e-6)
            power = matrix.double() @ power / 4
    assert found.products == 24


def test_an_eigenvalue_that_has_converged_comes_once():
    values = torch.cat([torch.linspace(0, 1, 200), torch.tensor([50.0, 100.0])])
    found = S.spectrum(symmetric(values, 1, torch.float32), seed(), draws=3, steps=60)
    assert [(nodes > 10).sum().item() for nodes in found.nodes] == [2, 2, 2]


def test_few_eigenvalues_take_few_products_and_have_their_own_weights():
    values = torch.cat([torch.zeros(60), torch.tensor([1.0, 2.0, 100.0])]).double()
    random = torch.linalg.qr(torch.randn(63, 63, generator=seed(), dtype=DOUBLE)).Q
    matrix = Counted((random * values) @ random.T)
    found = S.spectrum(matrix, seed(1), draws=3, steps=40)
    assert 12 <= matrix.products == found.products <= 15  # four eigenvalues, and at most one step of rounding errors
    assert found.nodes.shape == found.weights.shape == (3, 40)
    generator = seed(1)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        start = torch.randint(2, (63,), generator=generator, dtype=torch.int8).double() * 2 - 1
        parts = (random.T @ start) ** 2 / 63
        for value in (0, 1, 2, 100):
            here = float(weights[(nodes - value).abs() < 1e-6].sum())
            assert here == pytest.approx(float(parts[values == value].sum()), rel=1e-6)


def test_the_density_is_that_of_the_eigenvalues_within_its_errors():
    values = torch.cat([torch.linspace(-1, 1, 150), torch.full((50,), 3.0)]).double()
    found = S.spectrum(symmetric(values, 5), seed(), draws=20, steps=60, points=400, width=0.1)
    each = torch.exp(-(((found.grid - values.unsqueeze(1)) / 0.1) ** 2) / 2) / (0.1 * math.sqrt(2 * math.pi))
    assert float(torch.trapezoid(found.values, found.grid)) == pytest.approx(1, abs=1e-3)
    places = each.mean(0) > 0.01
    scores = ((found.values - each.mean(0)) / found.errors)[places]
    assert 0.7 < float(scores.square().mean().sqrt()) < 2
    assert float((found.values - each.mean(0)).abs().max()) < 0.1
    assert (found.width, len(found.grid)) == (0.1, 400)
    assert float(found.grid[0]) == pytest.approx(float(found.nodes.min()) - 0.4)
    assert float(found.grid[-1]) == pytest.approx(float(found.nodes.max()) + 0.4)


def test_the_width_is_papyans_and_one_draw_has_no_error():
    found = S.spectrum(MATRIX, seed(), draws=1, steps=20)
    nodes = found.nodes[0]
    assert found.width == pytest.approx(float(nodes.max() - nodes.min()) / 19 / math.sqrt(8 * math.log(3)))
    assert found.errors.isnan().all()
    for scale, width in ((0.0, 1e-3), (-5.0, 5e-3)):  # of one eigenvalue alone
        found = S.spectrum(scale * torch.eye(9), seed(), draws=2)
        assert found.width == pytest.approx(width)
        assert float(torch.trapezoid(found.values, found.grid)) == pytest.approx(1, abs=1e-3)


def test_a_density_refuses_what_gives_none():
    with pytest.raises(
        ValueError, match="draws=0, steps=80, points=1024: choose 1 draw, 2 steps and 2 points at least"
    ):
        S.spectrum(MATRIX, seed(), 0)
    with pytest.raises(ValueError, match="not finite: did the training diverge"):
        S.spectrum(torch.full((9, 9), math.inf), seed())


# ---- time


def test_the_time_of_a_plan_is_that_of_the_second_product(monkeypatch):
    ticks = itertools.accumulate([0, 5, 1, 0.25])  # the first product takes 5, the second 0.25
    monkeypatch.setattr(S.time, "perf_counter", lambda: next(ticks))
    matrix = Counted(MATRIX)
    assert S.seconds(matrix, 1000) == 250
    assert (matrix.products, matrix.widest) == (2, 1)
