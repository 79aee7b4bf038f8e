import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lottery_callbacks.functional.strong_certificate import (
    Approximated,
    _lipschitz,
    certificate,
    convolution_norm,
    overlaps,
    searched_error,
    spectral_norm,
)


def by_hand(positive, negative=None, constant=0.0):
    """The pointwise layer with weight 1 and bias 0, of one channel, and what stands for it."""
    numbers = (1.0, 0.0, positive, -1.0 if negative is None else negative, constant)
    weight, bias, p, n, c = (torch.tensor([number], dtype=torch.float64) for number in numbers)
    return Approximated(
        weight.view(1, 1, 1, 1),
        bias,
        p.view(1, 1, 1, 1),
        n.view(1, 1, 1, 1),
        c,
        F.conv2d,
        spectral_norm,
        nonnegative=False,
    )


def test_biases_count_at_each_place_and_widen_what_follows():
    steps = [by_hand(1.0, constant=0.1), nn.ReLU(), by_hand(1.5, negative=-1.5)]
    assert certificate(steps[:1], (1, 4, 4)).value == pytest.approx(0.4)
    assert searched_error(steps[:1], (1, 4, 4), 5, 2, 0).value == pytest.approx(0.4)
    assert certificate(steps, (1, 4, 4), behind_relu=True).value == pytest.approx(0.4 + 0.5 * (1 + 0.4))
    assert searched_error(steps, (1, 4, 4), 100, 4, 0).value == pytest.approx(0.4 + 0.5 * (1 + 0.4), rel=1e-4)


def test_only_the_next_layer_is_behind_a_relu():
    steps = [by_hand(1.0), nn.ReLU(), nn.MaxPool2d(1), by_hand(1.0, negative=-9.0)]
    assert certificate(steps, (1, 2, 2), behind_relu=True).value == 0
    assert certificate(steps, (1, 2, 2)).value == pytest.approx(8.0)
    steps.append(by_hand(1.0, negative=-1.5))
    assert certificate(steps, (1, 2, 2), behind_relu=True).value == pytest.approx(0.5)


def test_pooling_s_lipschitz_constants():
    images = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    pools = {nn.MaxPool2d(2): 1, nn.MaxPool2d(3, 1): 3, nn.AvgPool2d(2): 0.5, nn.AdaptiveAvgPool2d(1): 1 / 6}
    for pool, constant in pools.items():
        assert _lipschitz(pool, images) == pytest.approx(constant)
    for pool in (nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d(4)):
        matrix = torch.stack([pool(e.view(1, 1, 6, 6)).flatten() for e in torch.eye(36, dtype=torch.float64)])
        assert torch.linalg.matrix_norm(matrix, 2) <= _lipschitz(pool, images) * (1 + 1e-12)


@given(*[st.integers(1, 4)] * 3)
def test_overlaps_counts_windows(kernel, stride, dilation):
    ones = torch.ones(1, 1, 40, 1)
    windows = F.conv_transpose2d(ones, torch.ones(1, 1, kernel, 1), stride=(stride, 1), dilation=(dilation, 1))
    assert overlaps((kernel, 1), (stride, 1), (dilation, 1)) == windows.max()


@given(*[st.integers(1, 3)] * 2, st.tuples(*[st.integers(1, 4)] * 2), *[st.integers(1, 2)] * 2, st.integers(0, 2))
def test_a_convolution_s_norm_is_bounded(outs, ins, kernel, stride, dilation, padding):
    g = torch.Generator().manual_seed(outs * 100 + ins * 10 + kernel[0])
    weight = torch.randn(outs, ins, *kernel, dtype=torch.float64, generator=g)
    unit = torch.eye(ins * 49, dtype=torch.float64).view(-1, ins, 7, 7)
    maps = F.conv2d(unit, weight, stride=stride, dilation=dilation, padding=padding)
    exact = float(torch.linalg.matrix_norm(maps.flatten(1), 2)) if maps.numel() else 0.0
    bound = convolution_norm(weight, overlaps(kernel, (stride, stride), (dilation, dilation)))
    assert exact <= bound * (1 + 1e-12)
    if stride == dilation == 1 and kernel == (1, 1):
        assert bound == pytest.approx(exact)


def test_the_bound_is_near_on_large_images_where_the_unrolled_kernel_s_is_not():
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(200):  # power iteration
        y = F.conv2d(x, weight, padding=2)
        x = F.normalize(F.conv_transpose2d(y, weight, padding=2).flatten(), dim=0).view_as(x)
    exact = float(F.conv2d(x, weight, padding=2).norm())
    assert exact <= convolution_norm(weight, 9) <= 1.05 * exact
    assert 3 * spectral_norm(weight) > 1.3 * exact


def test_a_layer_s_own_constant_counts():
    class Doubled(nn.Identity):
        lipschitz = 2.0

    steps = [by_hand(1.1), Doubled(), by_hand(1.0)]
    assert certificate(steps[:1], (1, 1, 1), radius=3.0).value == pytest.approx(0.3)
    assert certificate(steps, (1, 1, 1), radius=3.0).value == pytest.approx(0.6)
    assert certificate(steps, (1, 1, 1), radius=3.0).normalised == pytest.approx(0.2)
    assert certificate(steps[:1], (1, 1, 1)).norms == (1.0,)
    assert math.isclose(searched_error(steps[:1], (1, 1, 1), 50, 2, 0, radius=3.0).value, 0.3, rel_tol=1e-6)


def test_the_maximum_between_frequencies_of_the_grid_is_bounded_too():
    taps = torch.tensor([1, 0.5, -0.3], dtype=torch.float64)
    unit = torch.eye(100, dtype=torch.float64).view(100, 1, 100, 1)
    maps = F.conv2d(unit, taps.view(1, 1, 3, 1), padding=(2, 0)).flatten(1)
    exact = float(torch.linalg.matrix_norm(maps, 2))
    assert exact <= convolution_norm(taps.view(1, 1, 3, 1), 3) < 1.02 * exact  # the grid alone gives less than `exact`


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf])
def test_a_ball_has_a_radius(radius):
    with pytest.raises(ValueError, match=r"radius=.*: choose a number above 0"):
        certificate([by_hand(1.1)], (1, 1, 1), radius=radius)
    with pytest.raises(ValueError, match=r"radius=.*: choose a number above 0"):
        searched_error([by_hand(1.1)], (1, 1, 1), 1, 1, 0, radius=radius)
