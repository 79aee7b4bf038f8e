import pytest
import torch
from sklearn.datasets import load_digits

from lottery_lightning.data import Digits


def splits(**arguments):
    data = Digits(**arguments)
    data.setup("fit")
    return data.splits


def keys(images):
    """Each image as bytes."""
    return [image.numpy().tobytes() for image in images]


def test_sizes_shapes_types_and_ranges():
    for name, size in (("train", 1197), ("val", 200), ("test", 400)):
        images, labels = splits()[name]
        assert (images.shape, images.dtype) == ((size, 1, 8, 8), torch.float32)
        assert (labels.shape, labels.dtype) == ((size,), torch.int64)
        assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
        assert sorted(labels.unique().tolist()) == list(range(10))


def test_the_three_sets_are_disjoint_and_together_the_whole_of_it():
    made = splits()
    together = [key for name in ("train", "val", "test") for key in keys(made[name][0])]
    digits = load_digits()
    original = keys(torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1)
    assert len(set(original)) == 1797  # no two digits are equal, so equal bytes are the same digit
    assert sorted(together) == sorted(original)
    label_of = dict(zip(original, digits.target.tolist(), strict=True))
    for images, labels in made.values():
        assert [label_of[key] for key in keys(images)] == labels.tolist()


def test_the_split_seed_changes_validation_and_never_the_test_set():
    first, second = splits(split_seed=0), splits(split_seed=1)
    assert torch.equal(first["test"][0], second["test"][0])
    assert set(keys(first["val"][0])) != set(keys(second["val"][0]))
    assert set(keys(first["train"][0]) + keys(first["val"][0])) == set(
        keys(second["train"][0]) + keys(second["val"][0])
    )


@pytest.mark.usefixtures("global_rng_untouched")
def test_the_same_arguments_give_the_same_sets():
    first, second = splits(split_seed=3), splits(split_seed=3)
    for name in ("train", "val", "test"):
        assert torch.equal(first[name][0], second[name][0])
        assert torch.equal(first[name][1], second[name][1])


def test_arguments_reach_the_base():
    data = Digits(batch_size=60, eval_batch_size=150)
    data.setup("fit")
    assert [len(y) for _, y in data.train_dataloader()] == [60] * 19 + [57]
    assert [len(y) for _, y in data.test_dataloader()] == [150, 150, 100]
