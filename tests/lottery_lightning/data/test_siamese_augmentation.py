import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_lightning.data import EpochOrder, ShuffledTensorLoader
from lottery_lightning.data.augment import SiameseAugmentation

ALL = "color_crop_cutout_flip_scale_rotate"


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def after_choice(seed):
    """The generator after it has drawn which of one operation to apply."""
    generator = source(seed)
    torch.randint(1, (), generator=generator)
    return generator


def bilinear(image, down, right):
    """The value of `image` between its pixels, 0 beyond them."""
    _, height, width = image.shape
    value = torch.zeros(len(image), dtype=image.dtype)
    for row in (math.floor(down), math.floor(down) + 1):
        for column in (math.floor(right), math.floor(right) + 1):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(down - row)) * (1 - abs(right - column)) * image[:, row, column]
    return value


def mapped(image, across, down):
    """Each pixel is the value at (across(x, y), down(x, y)), where x and y go from -1 to 1 between the edges."""
    _, height, width = image.shape
    new = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            x, y = (2 * column + 1) / width - 1, (2 * row + 1) / height - 1
            new[:, row, column] = bilinear(
                image, ((down(x, y) + 1) * height - 1) / 2, ((across(x, y) + 1) * width - 1) / 2
            )
    return new


def colored(image, shift, saturation, contrast):
    image = image + shift - 0.5
    grey = sum(image) / len(image)
    image = torch.stack([grey + 2 * saturation * (channel - grey) for channel in image])
    return image.mean() + (contrast + 0.5) * (image - image.mean())


def cropped(image, down, right):
    _, height, width = image.shape
    new = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            y, x = row + down - round(height / 8 + 1e-9), column + right - round(width / 8 + 1e-9)
            if 0 <= y < height and 0 <= x < width:
                new[:, row, column] = image[:, y, x]
    return new


def cut(image, row, column):
    new = image.clone()
    height, width = (int(size / 2 + 0.5) for size in image.shape[1:])
    for y in range(row - height // 2, row - height // 2 + height):
        for x in range(column - width // 2, column - width // 2 + width):
            if 0 <= y < image.shape[1] and 0 <= x < image.shape[2]:
                new[:, y, x] = 0
    return new


def scaled(image, across, down):
    low, span = 1 / 1.2, 1.2 - 1 / 1.2
    return mapped(image, lambda x, y: x * (low + span * across), lambda x, y: y * (low + span * down))


def rotated(image, draw):
    angle = math.radians(30 * draw - 15)
    cos, sin = math.cos(angle), math.sin(angle)
    return mapped(image, lambda x, y: cos * x - sin * y, lambda x, y: sin * x + cos * y)


def draws(name, count, generator, height, width):
    """What each of `count` images is changed by, in the order in which it is drawn."""
    if name in ("crop", "cutout"):
        sizes = (height, width)
        ends = [2 * int(s / 8 + 0.5) + 1 if name == "crop" else s + 1 - int(s / 2 + 0.5) % 2 for s in sizes]
        columns = [torch.randint(end, (count, 1), generator=generator) for end in ends]
    else:
        many = {"color": 3, "flip": 1, "scale": 2, "rotate": 1}[name]
        columns = [torch.rand(count, 1, generator=generator) for _ in range(many)]
    return torch.cat(columns, 1).tolist()


NAIVE = {
    "color": colored,
    "crop": cropped,
    "cutout": cut,
    "flip": lambda image, draw: image.flip(2) if draw < 0.5 else image,
    "scale": scaled,
    "rotate": rotated,
}


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("name", NAIVE)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    height=st.sampled_from([4, 5, 8, 13]),
    width=st.integers(4, 9),
)
def test_each_operation_is_the_one_computed_pixel_by_pixel(name, same, seed, batch, channels, height, width):
    images = torch.randn(batch, channels, height, width, generator=source(1), dtype=torch.float64)
    found = SiameseAugmentation(name)(images, source(seed), same)
    drawn = draws(name, 1 if same else batch, after_choice(seed), height, width)
    expected = [NAIVE[name](image, *drawn[0 if same else place]) for place, image in enumerate(images)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)  # maps are drawn in float32


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("seed", range(12))
def test_two_batches_of_any_sizes_get_the_same_from_equal_generators(seed):
    augment = SiameseAugmentation(ALL)
    real, synthetic = torch.randn(9, 3, 8, 8, generator=source(1)).split([7, 2])
    alone, beside = (augment(batch, source(seed), same=True) for batch in (synthetic, torch.cat([synthetic, real])))
    torch.testing.assert_close(beside[:2], alone)
    assert augment(real, source(seed), same=True).shape == real.shape


def test_without_same_each_image_has_parameters_of_its_own():
    images = torch.randn(1, 3, 8, 8).expand(32, 3, 8, 8)
    for name in NAIVE:
        augment = SiameseAugmentation(name)
        assert len(augment(images, source(), same=True).unique(dim=0)) == 1, name
        assert len(augment(images, source()).unique(dim=0)) > 1, name


def test_one_operation_of_the_strategy_is_drawn_each_as_often():
    augment = SiameseAugmentation("rotate_cutout_crop")
    images, counts = torch.arange(1.0, 65).view(1, 1, 8, 8), [0, 0, 0]
    for seed in range(900):
        made = augment(images, source(seed))
        alone = [SiameseAugmentation(name)(images, source(seed)) for name in augment.operations]  # the same parameters
        for place, expected in enumerate(alone):
            counts[place] += int(torch.equal(made, expected))
    assert sum(counts) == 900
    assert all(abs(count - 300) < 75 for count in counts)  # 5 standard deviations


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("name", NAIVE)
def test_gradients_reach_the_images_as_finite_differences_say(name, same):
    augment = SiameseAugmentation(name)
    images = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: augment(x, source(4), same), images)


def test_no_strategy_leaves_images_as_they_are_and_draws_nothing():
    images, generator = torch.randn(2, 1, 4, 4), source()
    assert SiameseAugmentation("")(images, generator) is images
    assert torch.equal(generator.get_state(), source().get_state())


@pytest.mark.parametrize(("strategy", "named"), [("color_zoom", "zoom"), ("none", "none"), ("crop_", "")])
def test_an_unknown_operation_is_refused_in_one_line(strategy, named):
    with pytest.raises(ValueError, match=f"^augmentation '{strategy}' names '{named}': join some of color, crop, cut"):
        SiameseAugmentation(strategy)


def test_a_loader_augments_by_it():
    images = torch.randn(6, 1, 8, 8)
    loader = ShuffledTensorLoader(images, torch.arange(6), 6, EpochOrder(0), augment=SiameseAugmentation("color"))
    found, labels = next(iter(loader))
    order = EpochOrder(0)
    order.batch = 1
    assert torch.equal(found, SiameseAugmentation("color")(images[labels], order.generator(0)))
