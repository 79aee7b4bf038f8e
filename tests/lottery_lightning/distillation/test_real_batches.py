import pytest
import torch

from lottery_lightning.distillation import RealBatches

SIZES = (5, 7, 3)
LABELS = torch.tensor([2, 1, 0, 1, 1, 0, 2, 0, 1, 1, 0, 1, 2, 0, 1])
IMAGES = torch.arange(15.0).view(15, 1, 1, 1) + 100 * LABELS.view(15, 1, 1, 1)


def real(count=3, **options):
    return RealBatches(IMAGES, LABELS, count, **options)


@pytest.mark.usefixtures("global_rng_untouched")
def test_a_batch_has_different_images_of_each_class_decided_by_seed_and_step():
    assert torch.equal(torch.bincount(LABELS), torch.tensor(SIZES))
    seen = set()
    for step in range(40):
        batch = real().batch(step)
        assert batch.shape == (3, 3, 1, 1, 1)
        assert torch.equal(batch.flatten(1) // 100, torch.arange(3.0).view(3, 1).expand(3, 3))
        assert all(len(of_class.unique()) == 3 for of_class in batch)
        assert torch.equal(batch, real().batch(step))
        seen.update(batch.flatten().tolist())
    assert seen == set(IMAGES.flatten().tolist())
    assert not torch.equal(real().batch(0), real().batch(1))
    assert not torch.equal(real().batch(0), real(seed=1).batch(0))


def test_a_class_that_is_too_small_is_drawn_whole_before_an_image_comes_again():
    for of_class, size in zip(real(8).batch(0), SIZES, strict=True):
        counts = of_class.flatten().unique(return_counts=True)[1]
        assert len(counts) == size
        assert int(counts.max() - counts.min()) <= 1


def test_an_epoch_goes_on_at_the_fits_step():
    module = real(steps=4)
    loader = module.train_dataloader()
    assert len(loader) == 4
    for done, left in ((0, [0, 1, 2, 3]), (3, [3]), (4, [4, 5, 6, 7]), (6, [6, 7])):
        loader.done = lambda done=done: done
        found = list(loader)
        assert len(found) == len(left)
        assert all(torch.equal(batch, module.batch(step)) for batch, step in zip(found, left, strict=True))


def test_a_class_without_images_and_soft_labels_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^class 1 of 3 has no image: give one of each at least$"):
        RealBatches(IMAGES[:2], torch.tensor([0, 2]), 1)
    with pytest.raises(ValueError, match=r"^labels are \(2, 3\) torch.float32: matching takes one class an image$"):
        RealBatches(IMAGES[:2], torch.ones(2, 3), 1)
