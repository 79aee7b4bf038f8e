import numpy as np
import pytest
import torch

from lottery_lightning.data import ECG5000


@pytest.fixture
def folder(tmp_path):
    x = np.arange(500 * 140, dtype=np.float32).reshape(500, 140)
    np.savez(tmp_path / "ecg5000_train.npz", x=x, y=np.arange(500) % 5)
    return tmp_path


def loaded(folder, **arguments):
    data = ECG5000(folder, **arguments)
    data.setup("fit")
    return data.splits


def test_every_heartbeat_is_in_one_split_with_its_own_label(folder):
    splits = loaded(folder, binary=False)
    assert {name: tuple(x.shape) for name, (x, _) in splits.items()} == {
        "train": (300, 140),
        "val": (100, 140),
        "test": (100, 140),
    }
    series, labels = (torch.cat(parts) for parts in zip(*splits.values(), strict=True))
    number = (series[:, 0] / 140).long()
    assert number.sort().values.tolist() == list(range(500))
    assert torch.equal(labels, number % 5)
    assert series.dtype == torch.float32


def test_two_classes_are_the_normal_beats_and_the_others(folder):
    for five, two in zip(loaded(folder, binary=False).values(), loaded(folder).values(), strict=True):
        assert torch.equal(five[0], two[0])
        assert torch.equal((five[1] > 0).long(), two[1])


def test_sizes_and_split_seed_decide_what_is_held_out(folder):
    first = loaded(folder, val_size=50, test_size=25)
    assert [len(labels) for _, labels in first.values()] == [425, 50, 25]
    assert not torch.equal(first["test"][0], loaded(folder, val_size=50, test_size=25, split_seed=1)["test"][0])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"ecg5000_train\.npz is missing or torn .*: give a whole \.npz file"):
        loaded(tmp_path)
