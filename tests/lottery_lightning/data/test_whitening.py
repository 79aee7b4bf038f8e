import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_lightning.data import zca
from lottery_lightning.data.preprocessing import CHUNK


def images(n=200, seed=0):
    """Correlated, not centred: (n, 1, 2, 3)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=generator)
    return (torch.randn(n, 6, generator=generator) @ mixing + 3).view(n, 1, 2, 3)


def dense(x):
    """Covariance, its eigenvalues and eigenvectors, of flat images."""
    covariance = torch.cov(x.flatten(1).double().T)
    return covariance, *torch.linalg.eigh(covariance)


@given(st.integers(2, 60), st.integers(0, 1000), st.floats(1e-3, 100))
def test_the_covariance_of_whitened_images_is_that_of_the_formula(n, seed, eps):
    x = images(n, seed)
    whitening = zca(x, eps)
    made = (x.flatten(1) - whitening.mean).double() @ whitening.matrix.double()
    _, values, vectors = dense(x)
    expected = vectors @ torch.diag(values / (values + eps)) @ vectors.T
    torch.testing.assert_close(torch.cov(made.T), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.mean(0), torch.zeros(6).double(), atol=1e-4, rtol=0)


def test_the_matrix_is_the_inverse_root_of_the_covariance_plus_eps():
    x = images()
    matrix = zca(x, 0.1).matrix
    covariance, _, _ = dense(x)
    root = matrix.double() @ matrix.double()
    torch.testing.assert_close(root @ (covariance + 0.1 * torch.eye(6)), torch.eye(6).double(), atol=1e-4, rtol=0)
    assert torch.equal(matrix, matrix.T)
    assert (torch.linalg.eigvalsh(matrix) > 0).all()  # of the inverse roots, the one that turns nothing
    assert (matrix.dtype, matrix.shape) == (torch.float32, (6, 6))


def test_an_offset_far_above_the_deviation_costs_no_digits():
    x = images(n=CHUNK + 7)
    far = zca(x + 1000).matrix
    torch.testing.assert_close(far, zca(x).matrix, atol=1e-3, rtol=0)


def test_more_images_than_a_chunk_are_all_counted():
    x = images(n=2 * CHUNK + 5)
    _, values, vectors = dense(x)
    expected = vectors @ torch.diag((values + 0.1).rsqrt()) @ vectors.T
    whitening = zca(x, 0.1)
    torch.testing.assert_close(whitening.matrix, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whitening.mean, x.flatten(1).double().mean(0).float())


def test_a_direction_without_variance_is_scaled_by_eps_alone():
    x = images()
    x[:, 0, 0, 0] = 0.5
    assert zca(x, 0.25).matrix[0].tolist() == pytest.approx([2.0, 0, 0, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize(("n", "eps"), [(200, 0.0), (200, -1.0), (1, 0.1)])
def test_what_cannot_be_whitened_is_refused(n, eps):
    with pytest.raises(ValueError, match=r"give a positive eps and at least two images$"):
        zca(images(n), eps)
