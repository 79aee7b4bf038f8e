import struct

import pytest
import torch

from lottery_lightning.data import MNIST, RotatedMNIST

MEND = "): put the four official *-ubyte files there whole, delete torn ones, or go online to download them"
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture
def small(tmp_path):
    """A folder with files of the official format: 12 training and 5 test images; image i is full of 20 i."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, size in (("train", 12), ("t10k", 5)):
        images = b"".join(bytes([20 * i]) * 784 for i in range(size))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, size, 28, 28) + images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 2049, size) + bytes(i % 10 for i in range(size))
        )
    return tmp_path


def offline(folder, **arguments):
    return MNIST(folder, **{"download": False} | arguments)


def refused(folder):
    """The message of both ways into the files."""
    messages = set()
    for action in (offline(folder).prepare_data, lambda: offline(folder).setup("fit")):
        with pytest.raises(RuntimeError) as error:
            action()
        messages.add(str(error.value))
    for message in messages:
        assert message.startswith(f"MNIST cannot be read in {folder / 'MNIST' / 'raw'} (")
        assert message.endswith(MEND)
        assert "\n" not in message
    return messages


def test_pixels_are_scaled_and_normalised_and_labels_stay_with_their_images(small):
    data = offline(small, val_size=2)
    data.prepare_data()
    data.setup("fit")
    assert {name: (tuple(x.shape), x.dtype, y.dtype) for name, (x, y) in data.splits.items()} == {
        "train": ((10, 1, 28, 28), torch.float32, torch.int64),
        "val": ((2, 1, 28, 28), torch.float32, torch.int64),
        "test": ((5, 1, 28, 28), torch.float32, torch.int64),
    }
    seen = []
    for images, labels in data.splits.values():
        number = ((images * 0.3081 + 0.1307) * 255 / 20).round().int()
        assert (number == number[:, :, :1, :1]).all()
        assert torch.equal(number[:, 0, 0, 0] % 10, labels.int())
        seen += number[:, 0, 0, 0].tolist()
    assert sorted(seen) == sorted([*range(12), *range(5)])


def test_pixels_may_stay_as_they_are(small):
    data, normalised = offline(small, normalise=False, val_size=2), offline(small, val_size=2)
    for one in (data, normalised):
        one.prepare_data()
        one.setup("fit")
    images = data.splits["train"][0]
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal((images - 0.1307) / 0.3081, normalised.splits["train"][0])


@pytest.mark.parametrize("kind", [MNIST, RotatedMNIST])
@pytest.mark.parametrize("normalise", [True, False])
def test_what_made_the_images_is_stated(small, kind, normalise):
    data, pixels = (kind(small, download=False, val_size=2, normalise=asked) for asked in (normalise, False))
    for one in (data, pixels):
        one.setup("fit")
    shown = data.preprocessing.pixels(data.splits["test"][0])
    torch.testing.assert_close(shown, pixels.splits["test"][0])
    assert torch.equal(data.preprocessing(pixels.splits["test"][0]), data.splits["test"][0])


def test_a_set_that_is_read_already_is_not_read_again(small):
    data = offline(small, val_size=2)
    data.setup("fit")
    (small / "MNIST" / "raw" / NAMES[0]).unlink()
    data.prepare_data()
    data.setup("test")
    assert len(data.splits["train"][1]) == 10


def test_nothing_there_is_one_line_that_names_folder_and_mend(tmp_path):
    refused(tmp_path)
    refused(tmp_path / "absent")


@pytest.mark.parametrize("name", NAMES)
def test_one_missing_file_is_the_same(small, name):
    (small / "MNIST" / "raw" / name).unlink()
    refused(small)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("left", [0, 3, 8, -1])
def test_a_torn_file_is_the_same(small, name, left):
    path = small / "MNIST" / "raw" / name
    path.write_bytes(path.read_bytes()[:left])
    refused(small)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_kind_is_the_same(small, name):
    (small / "MNIST" / "raw" / name).write_bytes(b"<html>\n<body>not found</body>\n</html>" * 40)
    refused(small)


def test_labels_of_another_number_than_images_are_refused(small):
    path = small / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(struct.pack(">2i", 2049, 11) + bytes(11))
    with pytest.raises(RuntimeError, match="MNIST cannot be read"):
        offline(small, val_size=2).setup("fit")


def test_more_held_out_than_there_are_is_refused(small):
    with pytest.raises(ValueError, match="cannot hold out 12 of 12 examples for validation"):
        offline(small, val_size=12).setup("fit")


@pytest.fixture(scope="module")
def real(data_dir):
    data = MNIST(data_dir, download=False)
    data.prepare_data()
    data.setup("fit")
    return data.splits


def test_the_real_sets_have_the_papers_sizes(real):
    assert {name: tuple(x.shape) for name, (x, _) in real.items()} == {
        "train": (55_000, 1, 28, 28),
        "val": (5_000, 1, 28, 28),
        "test": (10_000, 1, 28, 28),
    }


def test_the_real_labels_are_counted(real):
    train = real["train"][1].bincount() + real["val"][1].bincount()
    assert train.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert real["test"][1].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert real["test"][1][:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]


def test_the_real_images_are_normalised_by_the_training_set(real):
    images = torch.cat([real["train"][0], real["val"][0]])
    assert abs(float(images.double().mean())) < 1e-3
    assert abs(float(images.double().std()) - 1) < 1e-3
    assert float(images.min()) == pytest.approx(-0.1307 / 0.3081)
    assert float(images.max()) == pytest.approx((1 - 0.1307) / 0.3081)
