import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_lightning.data import EpochOrder, ShuffledTensorLoader
from lottery_lightning.data.augment import crop_and_flip

FILL = torch.tensor([-7.0, -8.0])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def placed(image, down, right, mirrored):
    """What one image becomes, pixel by pixel: shifted within a black border, then mirrored."""
    _, height, width = image.shape
    new = FILL.view(-1, 1, 1).repeat(1, height, width)
    for row in range(height):
        for column in range(width):
            y, x = row + down - 4, column + right - 4
            if 0 <= y < height and 0 <= x < width:
                new[:, row, column] = image[:, y, x]
    return new.flip(2) if mirrored else new


@given(st.integers(0, 200), st.integers(1, 4))
def test_each_image_is_cropped_by_its_own_shift_and_mirror(seed, batch):
    images = torch.arange(batch * 2 * 6 * 5).view(batch, 2, 6, 5).float()
    source = generator(seed)
    down, right = (torch.randint(9, (batch, 1), generator=source) for _ in range(2))
    mirrored = torch.rand(batch, 1, generator=source) < 0.5
    made = crop_and_flip(images, generator(seed), FILL)
    for image, *how, found in zip(images, down, right, mirrored, made, strict=True):
        assert torch.equal(found, placed(image, *(int(part) for part in how)))


@pytest.mark.usefixtures("global_rng_untouched")
def test_all_shifts_and_both_mirrors_come_equally_often():
    images = torch.zeros(20_000, 2, 9, 9)
    images[:, :, 4, 4], images[:, :, 4, 5] = 1, 2  # a centre with its right neighbour
    made = crop_and_flip(images, generator(1), FILL)[:, 0]
    rows, columns = (made == 1).nonzero()[:, 1:].T
    for place in (rows, columns):
        counts = torch.bincount(place, minlength=9)
        assert len(counts) == 9
        assert (counts - 20_000 / 9).abs().max() < 250  # 5 standard deviations
    inner = (columns > 0) & (columns < 8)
    left = made[torch.arange(20_000), rows, (columns - 1).clamp(min=0)][inner] == 2
    assert abs(float(left.float().mean()) - 0.5) < 0.02


def test_without_padding_images_are_only_mirrored():
    images = torch.randn(64, 2, 5, 5)
    made = crop_and_flip(images, generator(), FILL, padding=0)
    same = (made == images).flatten(1).all(1)
    assert 10 < int(same.sum()) < 54
    assert torch.equal(made[~same], images[~same].flip(3))


def epochs(loader, count=2):
    return [(x.tolist(), y.tolist()) for _ in range(count) for x, y in loader]


def augmented(order):
    images = torch.arange(11 * 2 * 9 * 9).view(11, 2, 9, 9).float()
    return ShuffledTensorLoader(
        images, torch.arange(11), 4, order, augment=lambda batch, source: crop_and_flip(batch, source, FILL)
    )


@pytest.mark.usefixtures("global_rng_untouched")
def test_augmentation_is_decided_by_seed_level_epoch_and_batch_and_resumes_within_an_epoch():
    whole = epochs(augmented(EpochOrder(3)))
    assert epochs(augmented(EpochOrder(3))) == whole
    assert epochs(augmented(EpochOrder(3, level=1))) != whole
    assert len({str(batch) for batch in whole}) == 6
    for batch in range(1, 6):
        resumed = augmented(EpochOrder(3))
        resumed.load_state_dict({"epoch": batch // 3, "batch": batch % 3})
        assert epochs(resumed)[: 6 - batch] == whole[batch:]
