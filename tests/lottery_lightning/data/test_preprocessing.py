import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_lightning.data import Digits, Preprocessing, Whitening, zca
from lottery_lightning.data.preprocessing import CHUNK

MEAN, DEVIATION = (0.2, 0.5, 0.7), (0.3, 0.2, 0.1)


def pixels(n=20, channels=3, seed=0):
    return torch.rand(n, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


def whitened(images, eps=0.1):
    plain = Preprocessing(MEAN, DEVIATION)
    return Preprocessing(MEAN, DEVIATION, zca(plain(images), eps))


def test_pixels_are_normalised_by_channel_and_not_changed_themselves():
    given_ = pixels()
    kept = given_.clone()
    made = Preprocessing(MEAN, DEVIATION)(given_)
    for channel in range(3):
        expected = (kept[:, channel] - MEAN[channel]) / DEVIATION[channel]
        assert torch.equal(made[:, channel], expected)
    assert torch.equal(given_, kept)


def test_whitening_comes_after_normalisation_on_flat_images_and_leaves_the_pixels_alone():
    given_ = pixels()
    kept = given_.clone()
    matrix = torch.randn(48, 48, generator=torch.Generator().manual_seed(1))
    whitening = Whitening(torch.arange(48.0), matrix)
    made = Preprocessing(MEAN, DEVIATION, whitening)(given_)
    expected = (Preprocessing(MEAN, DEVIATION)(kept).flatten(1) - torch.arange(48.0)) @ matrix
    torch.testing.assert_close(made, expected.view(20, 3, 4, 4))
    assert torch.equal(given_, kept)


def test_images_of_another_layout_in_memory_are_whitened_alike():
    given_ = pixels()
    preprocessing = whitened(given_)
    torch.testing.assert_close(preprocessing(given_.to(memory_format=torch.channels_last)), preprocessing(given_))
    torch.testing.assert_close(
        preprocessing(given_.transpose(2, 3)), preprocessing(given_.transpose(2, 3).contiguous())
    )
    shown = preprocessing.pixels(preprocessing(given_).to(memory_format=torch.channels_last))
    torch.testing.assert_close(shown, given_, atol=1e-4, rtol=0)


def test_chunks_give_each_image_what_it_gets_alone():
    given_ = torch.rand(CHUNK + 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    preprocessing = Preprocessing((0.5,), (0.5,), zca(given_[:50], 0.1))
    made = preprocessing(given_)
    assert made.shape == given_.shape
    for index in (0, CHUNK - 1, CHUNK, CHUNK + 2):
        torch.testing.assert_close(made[index], preprocessing(given_[index : index + 1])[0])


@given(st.floats(1e-3, 10), st.integers(0, 100))
def test_pixels_is_the_inverse(eps, seed):
    given_ = pixels(n=30, seed=seed)
    for preprocessing in (Preprocessing(MEAN, DEVIATION), whitened(given_, eps)):
        torch.testing.assert_close(preprocessing.pixels(preprocessing(given_)), given_, atol=1e-4, rtol=0)


def test_pixels_are_clamped_for_pictures():
    shown = Preprocessing((0.5,), (0.5,)).pixels(torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1, 1))
    assert shown.flatten().tolist() == [0.0, 0.5, 1.0]


def test_nothing_differs_between_a_preprocessing_and_one_computed_anew():
    one = whitened(pixels())
    near = Preprocessing(MEAN, DEVIATION, Whitening(one.whitening.mean + 1e-6, one.whitening.matrix * (1 + 1e-5)))
    assert one.difference(one) is None
    assert one.difference(near) is None
    assert near.difference(one) is None
    assert Preprocessing(MEAN, DEVIATION).difference(Preprocessing(MEAN, DEVIATION)) is None


def test_each_difference_is_named():
    plain, one = Preprocessing(MEAN, DEVIATION), whitened(pixels())
    assert plain.difference(Preprocessing(MEAN, (0.3, 0.2, 0.2))) == (
        "normalised by mean (0.2, 0.5, 0.7) and deviation (0.3, 0.2, 0.1), "
        "not by mean (0.2, 0.5, 0.7) and deviation (0.3, 0.2, 0.2)"
    )
    assert "not by mean (0.2, 0.5, 0.8) and" in plain.difference(Preprocessing((0.2, 0.5, 0.8), DEVIATION))
    assert one.difference(plain) == "whitened, not left as they are"
    assert plain.difference(one) == "not whitened"
    assert one.difference(whitened(pixels(), eps=0.11)) == "whitened by another matrix"
    larger = Preprocessing(MEAN, DEVIATION, Whitening(one.whitening.mean, one.whitening.matrix * 1.01))
    assert one.difference(larger) == "whitened by another matrix"
    moved = Preprocessing(MEAN, DEVIATION, Whitening(one.whitening.mean + 0.01, one.whitening.matrix))
    assert one.difference(moved) == "whitened by another matrix"
    smaller = Preprocessing(MEAN, DEVIATION, Whitening(torch.zeros(12), torch.eye(12)))
    assert one.difference(smaller) == "whitened by another matrix"


def test_digits_say_what_made_their_images():
    data = Digits()
    data.setup("fit")
    images = data.splits["val"][0]
    shown = data.preprocessing.pixels(images)
    assert torch.equal((shown * 16).round() / 16, shown)
    assert torch.equal(data.preprocessing(shown), images)


@pytest.mark.usefixtures("global_rng_untouched")
def test_the_device_and_type_of_the_images_are_kept():
    assert Preprocessing(MEAN, DEVIATION)(pixels().double()).dtype == torch.float64
    assert whitened(pixels())(pixels().double()).dtype == torch.float64
