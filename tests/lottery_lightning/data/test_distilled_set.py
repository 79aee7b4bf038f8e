import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks import RewindPoint, Ticket
from lottery_lightning.data import DistilledSet, Preprocessing, Whitening, decode, zca

WORDS = {
    "augmentation": "flip_scale",
    "network": "ConvNet(depth=3, width=128)",
    "method": "distribution matching",
    "factor": 2,
    "provenance": {"seed": 3, "data": "Digits", "steps": [1, 2], "seconds": 1.5, "none": None},
}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(n=6, channels=2, size=4, soft=False, whitening=False, **changed):
    labels = drawn(n, 3, seed=1).softmax(1) if soft else torch.arange(n) % 3
    images = drawn(n, channels, size, size)
    matrix = zca(images) if whitening else None
    preprocessing = Preprocessing((0.1,) * channels, (0.3,) * channels, matrix)
    return DistilledSet(**{"images": images, "labels": labels, "preprocessing": preprocessing} | WORDS | changed)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("whitening", [False, True])
def test_a_saved_set_comes_back_bit_for_bit(tmp_path, soft, whitening):
    one = made(soft=soft, whitening=whitening)
    back = DistilledSet.load(one.save(tmp_path / "folder" / "set.safetensors"))
    assert torch.equal(back.images, one.images)
    assert torch.equal(back.labels, one.labels)
    assert (back.images.dtype, back.labels.dtype) == (torch.float32, one.labels.dtype)
    assert {name: getattr(back, name) for name in WORDS} == WORDS
    assert (back.preprocessing.mean, back.preprocessing.deviation) == ((0.1, 0.1), (0.3, 0.3))
    if whitening:
        assert torch.equal(back.preprocessing.whitening.mean, one.preprocessing.whitening.mean)
        assert torch.equal(back.preprocessing.whitening.matrix, one.preprocessing.whitening.matrix)
    else:
        assert back.preprocessing.whitening is None


def test_equal_sets_give_equal_bytes_and_one_file(tmp_path):
    one, other = made(whitening=True), made(whitening=True)
    other = dataclasses.replace(
        other,
        images=other.images.transpose(2, 3).contiguous().transpose(2, 3),  # another layout in memory
        provenance=dict(reversed(other.provenance.items())),
    )
    paths = [made_.save(tmp_path / name) for made_, name in ((one, "one"), (other, "other"))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_images_that_are_being_trained_are_saved_without_their_graph(tmp_path):
    one = made(images=drawn(6, 2, 4, 4).requires_grad_())
    assert not DistilledSet.load(one.save(tmp_path / "set")).images.requires_grad


def test_files_that_are_no_sets_are_refused_in_one_line(tmp_path):
    torn, other, old = tmp_path / "torn", tmp_path / "other", tmp_path / "old"
    whole = made().save(tmp_path / "whole").read_bytes()
    torn.write_bytes(whole[:-20])
    Ticket({"w": torch.ones(2) > 0}, RewindPoint(0, {"w": torch.ones(2)})).save(other)
    old.write_bytes(whole.replace(b"distilled-set/1", b"distilled-set/9"))
    for path, message in (
        (tmp_path / "none", "is missing or torn"),
        (torn, "is missing or torn"),
        (other, r"is no distilled set of format distilled-set/1 \(no header\): give a file that `train.py distill` or"),
        (old, r"is no distilled set of format distilled-set/1 \(format distilled-set/9\)"),
    ):
        with pytest.raises(ValueError, match=f"^{path} {message}") as error:
            DistilledSet.load(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": drawn(6, 8)}, r"images are torch.float32 \(6, 8\): give float32"),
        ({"images": drawn(6, 2, 4, 4).double()}, r"images are torch.float64 \(6, 2, 4, 4\)"),
        ({"images": drawn(0, 2, 4, 4), "labels": torch.zeros(0).long()}, r"images are torch.float32 \(0, 2, 4, 4\)"),
        ({"images": drawn(6, 2, 4, 4) / 0}, "an image is not finite: its making diverged, lower its learning rate"),
        ({"labels": torch.zeros(5).long()}, r"labels are torch.int64 \(5,\) for 6 images: give int64"),
        ({"labels": torch.zeros(6)}, r"labels are torch.float32 \(6,\) for 6 images"),
        ({"labels": torch.zeros(6, 3).long()}, r"labels are torch.int64 \(6, 3\) for 6 images"),
        ({"labels": torch.full((6, 3), 0.5)}, "soft ones are probabilities that sum to 1"),
        ({"labels": torch.tensor([1.5, -0.5]).repeat(6, 1)}, "must not be negative"),
        ({"labels": torch.arange(6) - 1}, "must not be negative"),
        ({"factor": 3}, "factor=3 does not cut images of 2 x 4 x 4 into equal tiles: choose 1 or a divisor"),
        ({"factor": 0}, "factor=0 does not cut"),
        ({"preprocessing": Preprocessing((0.5,), (0.5,))}, "is not one of images of 2 x 4 x 4: give that of the real"),
        ({"preprocessing": Preprocessing((0.5, 0.5), (0.5,))}, "is not one of images of 2 x 4 x 4"),
        (
            {"preprocessing": Preprocessing((0.1, 0.1), (0.3, 0.3), Whitening(torch.zeros(9), torch.eye(9)))},
            "is not one of images of 2 x 4 x 4",
        ),
    ],
)
def test_parts_that_do_not_fit_one_another_are_refused_in_one_line(changed, message):
    with pytest.raises(ValueError, match=message) as error:
        made(**changed)
    assert "\n" not in str(error.value)


def test_a_provenance_that_a_file_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^the provenance is not of JSON primitives"):
        made(provenance={"loss": torch.ones(1)}).save(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("soft", [False, True])
def test_real_data_that_go_with_the_set_pass(soft):
    one = made(soft=soft, whitening=True)
    assert one.classes == 3
    one.check(drawn(1, 2, 4, 4), 3, one.preprocessing)


@pytest.mark.parametrize(
    ("images", "classes", "preprocessing", "message"),
    [
        (drawn(9, 1, 4, 4), 3, True, "distilled images are 2 x 4 x 4 and real ones 1 x 4 x 4: give the data set that"),
        (drawn(9, 2, 4, 4), 4, True, "the distilled set has 3 classes and the real data 4: give the data set that"),
        (drawn(9, 2, 4, 4), 3, None, "the real data's module states no `preprocessing`: set it to what its load"),
        (drawn(9, 2, 4, 4), 3, Preprocessing((0.1, 0.2), (0.3, 0.3)), "not by mean (0.1, 0.2) and deviation"),
        (drawn(9, 2, 4, 4), 3, Preprocessing((0.1, 0.1), (0.3, 0.3)), "(whitened, not left as they are): give the"),
    ],
)
def test_real_data_that_do_not_are_refused_in_one_line_with_the_mend(images, classes, preprocessing, message):
    one = made(whitening=True)
    with pytest.raises(ValueError, match=r"give|set it") as error:
        one.check(images, classes, one.preprocessing if preprocessing is True else preprocessing)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_mend_of_a_missing_whitening_names_it():
    with pytest.raises(ValueError, match=r"as CIFAR10\(whitening=FILE\) does for a whitened one$"):
        made(whitening=True).check(drawn(1, 2, 4, 4), 3, Preprocessing((0.1, 0.1), (0.3, 0.3)))


def test_tiles_are_enlarged_in_rows_beside_their_image():
    images = drawn(3, 2, 6, 4)
    found = decode(images, 2)
    assert found.shape == (12, 2, 6, 4)
    for i in range(3):
        for row in range(2):
            for column in range(2):
                tile = images[i : i + 1, :, 3 * row : 3 * row + 3, 2 * column : 2 * column + 2]
                enlarged = F.interpolate(tile, (6, 4), mode="bilinear", align_corners=False)
                torch.testing.assert_close(found[4 * i + 2 * row + column], enlarged[0], atol=0, rtol=0)


@given(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4), st.integers(1, 3))
def test_a_tile_of_one_value_becomes_an_image_of_that_value(factor, n, channels):
    values = torch.arange(float(n * channels * factor**2)).view(n, factor, factor, channels).permute(0, 3, 1, 2)
    side = 12 // factor
    found = decode(values.repeat_interleave(side, 2).repeat_interleave(side, 3), factor)
    expected = values.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1)
    torch.testing.assert_close(found, expected.expand_as(found))


def test_factor_1_gives_the_images_themselves():
    images = drawn(3, 2, 5, 7)
    assert decode(images, 1) is images


def test_gradients_go_back_to_the_tile_that_an_image_was_cut_of():
    images = drawn(2, 1, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: decode(x, 2), images)
    decode(images, 2)[5].sum().backward()  # image 1, row 0, column 1
    assert images.grad[0].abs().sum() == 0
    assert (images.grad[1, 0] != 0).tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2
    assert float(images.grad.sum()) == pytest.approx(16)


@pytest.mark.parametrize("factor", [0, 3])
def test_a_factor_that_does_not_divide_is_refused(factor):
    with pytest.raises(ValueError, match=f"^factor={factor} does not cut images of 1 x 4 x 6 into equal tiles"):
        decode(drawn(2, 1, 4, 6), factor)


@pytest.mark.parametrize("soft", [False, True])
def test_decoded_labels_are_those_of_the_image_that_a_tile_was_cut_of(soft):
    one = made(soft=soft)
    images, labels = one.decoded()
    assert torch.equal(images, decode(one.images, 2))
    assert len(labels) == 24
    for index, label in enumerate(labels):
        assert torch.equal(label, one.labels[index // 4])
