import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from lottery_lightning.data import CIFAR10, DistilledSet, Preprocessing, Whitening
from lottery_lightning.data.cifar10 import DEVIATION, MEAN

ROWS = {"train": 12, "test": 5}


def pixels(size, seed):
    return np.random.default_rng(seed).integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)


def write(folder, **changed):
    arrays = {f"x_{name}": pixels(size, size) for name, size in ROWS.items()}
    arrays |= {f"y_{name}": np.arange(size, dtype=np.uint8) % 10 for name, size in ROWS.items()}
    np.savez(folder / "cifar10.npz", **arrays | changed)
    return folder


def made(folder, **arguments):
    data = CIFAR10(folder, download=False, **{"val_size": 2} | arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def raw(images):
    """Normalised images as they were: (n, 32, 32, 3) bytes."""
    return ((images.permute(0, 2, 3, 1) * DEVIATION + MEAN) * 255).round().to(torch.uint8)


def test_the_file_is_read_scaled_and_normalised_and_labels_stay_with_their_images(tmp_path):
    splits = made(write(tmp_path)).splits
    assert {name: tuple(x.shape) for name, (x, _) in splits.items()} == {
        "train": (10, 3, 32, 32), "val": (2, 3, 32, 32), "test": (5, 3, 32, 32),
    }  # fmt: skip
    assert all((x.dtype, y.dtype) == (torch.float32, torch.int64) for x, y in splits.values())
    assert np.array_equal(raw(splits["test"][0]).numpy(), pixels(5, 5))
    images, labels = (torch.cat([splits[name][part] for name in ("train", "val")]) for part in (0, 1))
    original = torch.from_numpy(pixels(12, 12))
    where = [int((original == image).flatten(1).all(1).nonzero()) for image in raw(images)]
    assert sorted(where) == list(range(12))
    assert labels.tolist() == [index % 10 for index in where]


def test_torchvisions_files_give_the_same_splits(tmp_path, monkeypatch):
    write(tmp_path)
    folder = tmp_path / "other" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = {"data_batch_1": ("train", 12), "test_batch": ("test", 5)}
    for name, (_, size) in batches.items():
        flat = pixels(size, size).transpose(0, 3, 1, 2).reshape(size, -1)
        (folder / name).write_bytes(pickle.dumps({"data": flat, "labels": [i % 10 for i in range(size)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    ours, theirs = made(tmp_path).splits, made(tmp_path / "other").splits
    for name in ours:
        assert all(torch.equal(mine, other) for mine, other in zip(ours[name], theirs[name], strict=True))


def test_training_batches_are_augmented_only_if_asked_and_evaluation_never_is(tmp_path):
    plain, augmented = made(write(tmp_path)), made(tmp_path, augment=True)
    for name in ("val", "test"):
        loaders = (getattr(data, f"{name}_dataloader")() for data in (plain, augmented))
        for (x, _), (other, _) in zip(*loaders, strict=True):
            assert torch.equal(x, other)
    (images, labels), (changed, same) = (next(iter(data.train_dataloader())) for data in (plain, augmented))
    assert torch.equal(labels, same)
    assert not torch.equal(images, changed)
    assert torch.equal(images, plain.splits["train"][0][plain.train_dataloader().sampler.permutation(10)])
    black = raw(changed) == 0
    assert black.all(3).any(0).any()  # the border is black pixels, not mean ones


@pytest.mark.parametrize(
    "changed",
    [
        {"x_train": np.zeros((12, 32, 32, 3), np.float32)},
        {"x_train": np.zeros((12, 3, 32, 32), np.uint8)},
        {"y_train": np.zeros(11, np.int64)},
        {"y_train": np.zeros((12, 1), np.int64)},
        {"y_test": np.array([None], dtype=object)},
    ],
)
def test_a_file_of_another_form_is_refused_with_the_mend(tmp_path, changed):
    write(tmp_path, **changed)
    with pytest.raises(RuntimeError, match=r"^CIFAR-10 cannot be read in .*: put cifar10\.npz or ") as error:
        made(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_and_a_torn_file_are_refused_with_the_mend(tmp_path):
    for content in (None, b"PK\x03\x04 torn"):
        if content:
            (tmp_path / "cifar10.npz").write_bytes(content)
        with pytest.raises(RuntimeError, match=r"^CIFAR-10 cannot be read in .*or go online to download them$"):
            made(tmp_path)


def test_the_real_set_has_the_papers_split(data_dir):
    if not (data_dir / "cifar10.npz").exists():
        pytest.skip(f"no cifar10.npz in {data_dir}")
    splits = made(data_dir, val_size=5000).splits
    assert {name: len(labels) for name, (_, labels) in splits.items()} == {
        "train": 45_000,
        "val": 5_000,
        "test": 10_000,
    }
    images = splits["train"][0]
    assert (images.mean((0, 2, 3)).abs() < 0.01).all()
    assert ((images.std((0, 2, 3)) - 1).abs() < 0.01).all()
    assert torch.bincount(splits["test"][1]).tolist() == [1000] * 10


@pytest.fixture
def whitened_set(tmp_path):
    """A file with a set of two images, normalised by numbers of its own and whitened by more than a factor."""
    matrix = torch.eye(3072) * 2
    matrix[0, 1] = matrix[1, 0] = 0.5
    preprocessing = Preprocessing((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), Whitening(torch.linspace(-1, 1, 3072), matrix))
    return DistilledSet(torch.zeros(2, 3, 32, 32), torch.arange(2), preprocessing).save(tmp_path / "set.safetensors")


def test_images_take_the_preprocessing_of_a_whitened_set(tmp_path, whitened_set):
    plain, whitened = made(write(tmp_path)), made(tmp_path, whitening=whitened_set)
    stated = DistilledSet.load(whitened_set).preprocessing
    for name, (images, labels) in plain.splits.items():
        scaled = raw(images).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(whitened.splits[name][1], labels)
        torch.testing.assert_close(whitened.splits[name][0], stated(scaled), atol=1e-5, rtol=0)
    first = raw(plain.splits["val"][0])[0].double() / 255
    centered = (first[0, :2, 0] - 0.1) / 0.5 - torch.linspace(-1, 1, 3072)[:2]
    assert whitened.splits["val"][0][0, 0, 0, 0].item() == pytest.approx(
        (2 * centered[0] + 0.5 * centered[1]).item(), abs=1e-5
    )
    assert whitened.preprocessing.difference(stated) is None
    assert plain.preprocessing.difference(stated) is not None


def test_the_border_of_whitened_images_is_zero(tmp_path, whitened_set):
    data = made(write(tmp_path), augment=True, whitening=whitened_set)
    images, _ = next(iter(data.train_dataloader()))
    assert (images == 0).all(3).all(1).any()  # a whole row of some image


def test_what_made_the_images_is_stated(tmp_path):
    data = made(write(tmp_path))
    shown = data.preprocessing.pixels(data.splits["test"][0])
    torch.testing.assert_close(shown, torch.from_numpy(pixels(5, 5)).permute(0, 3, 1, 2).float() / 255)


def test_a_file_without_a_whitening_of_cifar10_is_refused(tmp_path):
    write(tmp_path)
    plain = DistilledSet(torch.zeros(2, 3, 32, 32), torch.arange(2), Preprocessing((0.5,) * 3, (0.5,) * 3))
    small = Preprocessing((0.5,) * 3, (0.5,) * 3, Whitening(torch.zeros(12), torch.eye(12)))
    for part in (plain, DistilledSet(torch.zeros(2, 3, 2, 2), torch.arange(2), small)):
        with pytest.raises(ValueError, match="holds no whitening of CIFAR-10: leave whitening out, or give a whitened"):
            CIFAR10(tmp_path, whitening=part.save(tmp_path / "set"))
    with pytest.raises(ValueError, match="is missing or torn"):
        CIFAR10(tmp_path, whitening=tmp_path / "none")
