import numpy as np
import pytest
import torch

from lottery_lightning.data import Arrays


def arrays(**changes):
    made = {
        "x_train": np.arange(60, dtype=np.float32).reshape(20, 3),
        "y_train": np.arange(20) % 4,
        "x_test": -np.arange(15, dtype=np.float64).reshape(5, 3),
        "y_test": np.arange(5, dtype=np.uint8),
    }
    return {name: array for name, array in (made | changes).items() if array is not None}


@pytest.fixture
def save(tmp_path):
    def write(**changes):
        np.savez(tmp_path / "set.npz", **arrays(**changes))
        return tmp_path / "set.npz"

    return write


def loaded(path, **arguments):
    data = Arrays(path, **arguments)
    data.setup("fit")
    return data.splits


def refused(path, kind):
    with pytest.raises(kind) as error:
        loaded(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_float_arrays_are_used_as_they_are_and_a_tenth_is_held_out(save):
    splits = loaded(save())
    assert {name: (tuple(x.shape), x.dtype, y.dtype) for name, (x, y) in splits.items()} == {
        "train": ((18, 3), torch.float32, torch.int64),
        "val": ((2, 3), torch.float32, torch.int64),
        "test": ((5, 3), torch.float32, torch.int64),
    }
    images = torch.cat([splits["train"][0], splits["val"][0]])
    labels = torch.cat([splits["train"][1], splits["val"][1]])
    order = images[:, 0].argsort()
    assert torch.equal(images[order], torch.arange(60.0).view(20, 3))
    assert torch.equal(labels[order], torch.arange(20) % 4)
    assert splits["test"][0][4].tolist() == [-12.0, -13.0, -14.0]


def test_the_part_held_out_follows_fraction_and_split_seed(save):
    path = save()
    assert len(loaded(path, val_fraction=0.5)["val"][1]) == 10
    first, second, again = (loaded(path, val_fraction=0.5, split_seed=seed)["val"][0] for seed in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="cannot hold out 0 of 20 examples"):
        loaded(path, val_fraction=0.0)


def test_a_validation_set_in_the_file_is_taken_and_nothing_held_out(save):
    splits = loaded(save(x_val=np.full((3, 3), 7.0), y_val=np.array([1, 2, 3])))
    assert splits["val"][1].tolist() == [1, 2, 3]
    assert len(splits["train"][1]) == 20
    assert splits["train"][0][:, 0].tolist() == list(range(0, 60, 3))


def test_bytes_are_divided_by_255(save):
    x = np.array([[[0, 51], [102, 255]]], dtype=np.uint8).repeat(20, axis=0)
    images, _ = loaded(save(x_train=x))["train"]
    torch.testing.assert_close(images[0], torch.tensor([[0, 0.2], [0.4, 1.0]]), rtol=0, atol=1e-7)


def test_a_missing_file_and_one_that_is_no_npz_are_refused(tmp_path):
    assert "is missing or torn" in refused(tmp_path / "absent.npz", RuntimeError)
    (tmp_path / "garbage.npz").write_bytes(b"garbage\n" * 100)
    assert "is missing or torn" in refused(tmp_path / "garbage.npz", RuntimeError)
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert "is missing or torn" in refused(tmp_path / "one.npy", RuntimeError)


@pytest.mark.parametrize("left", [0, 10, 0.5, -1], ids=str)
def test_a_torn_file_is_refused(save, left):
    path = save()
    whole = path.read_bytes()
    path.write_bytes(whole[: round(left * len(whole)) if isinstance(left, float) else left])
    assert "is missing or torn" in refused(path, RuntimeError)


def test_objects_are_never_unpickled(save):
    path = save(y_test=np.array([{"a": 1}] * 5, dtype=object))
    assert "allow_pickle" in refused(path, RuntimeError)


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"y_test": None}, "has no y_test: save them with numpy.savez"),
        ({"x_train": None, "x_test": None}, "has no x_test, x_train: save them"),
        ({"x_val": np.zeros((2, 3))}, "has no y_val: save them"),
        ({"y_val": np.zeros(2, dtype=int)}, "has no x_val: save them"),
    ],
    ids=["one", "two", "labels of validation", "images of validation"],
)
def test_lacking_arrays_are_named(save, changes, lacking):
    assert lacking in refused(save(**changes), ValueError)


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_images_and_labels_of_unequal_number_are_refused(save, name):
    changes = {f"x_{name}": np.zeros((6, 3)), f"y_{name}": np.zeros(4, dtype=int)}
    assert f"x_{name} has 6 examples and y_{name} 4: they must be equal" in refused(save(**changes), ValueError)
