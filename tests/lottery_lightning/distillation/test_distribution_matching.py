import copy

import pytest
import torch
from torch import nn

from lottery_lightning.data.augment import SiameseAugmentation
from lottery_lightning.data.distilled_set import decode
from lottery_lightning.data.draws import generator
from lottery_lightning.distillation import DistributionMatching, RealBatches
from lottery_lightning.distillation.draws import draw_network

METHOD = DistributionMatching(real_batch=5)


def parts(real_images, counts=(2, 1, 3)):
    images, labels = real_images
    real = [images[labels == label][:5] for label in range(3)]
    source = torch.Generator().manual_seed(5)
    return real, [torch.randn(count, 1, 4, 4, generator=source, dtype=torch.float64) for count in counts]


def naive(network, real, synthetic):
    """Class by class, feature by feature."""
    embed = network[:-1]
    total = torch.zeros((), dtype=torch.float64)
    for one, other in zip(real, synthetic, strict=True):
        for feature in range(5):
            wanted = sum(embed(image[None])[0, feature] for image in one) / len(one)
            found = sum(embed(image[None])[0, feature] for image in other) / len(other)
            total = total + (wanted - found) ** 2
    return total


@pytest.mark.parametrize("norm", [nn.Identity, lambda width: nn.GroupNorm(width, width)])
def test_the_loss_is_the_squared_distance_of_the_classes_mean_features(smooth, real_images, norm):
    network = smooth(norm)
    real, synthetic = parts(real_images)
    found = METHOD.loss(network, real * 9, synthetic * 9)  # more images than a chunk
    torch.testing.assert_close(found, 9 * naive(network, real, synthetic), rtol=1e-10, atol=0)


def test_its_gradient_is_that_of_finite_differences(smooth, real_images):
    network = smooth().requires_grad_(False)
    real, synthetic = parts(real_images)
    images = torch.cat(synthetic).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: METHOD.loss(network, real, x.split([2, 1, 3])), images)


@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_takes_the_statistics_of_all_classes_together(smooth, real_images, tracked):
    network = smooth(lambda width: nn.BatchNorm2d(width, track_running_stats=tracked))
    real, synthetic = (part * 9 for part in parts(real_images))  # more images than a chunk
    reference = copy.deepcopy(network)[:-1].train()
    sides = []
    for images in (real, synthetic):
        split = reference(torch.cat(images)).split([len(part) for part in images])
        sides.append(torch.stack([part.mean(0) for part in split]))
    expected = (sides[0] - sides[1]).square().sum()
    torch.testing.assert_close(METHOD.loss(network.eval(), real, synthetic), expected, rtol=1e-10, atol=0)


def test_dropout_is_off_and_the_global_random_state_is_left(smooth, real_images, global_rng):
    network, before = smooth(lambda _: nn.Dropout2d(0.5)).train(), global_rng()
    real, synthetic = parts(real_images)
    torch.testing.assert_close(METHOD.loss(network, real, synthetic), naive(network.eval(), real, synthetic))
    assert global_rng() == before


@pytest.mark.parametrize(("augmentation", "factor"), [("", 1), ("color_crop_flip_rotate", 1), ("crop", 2)])
def test_a_fit_is_the_published_loop_written_out(smooth, real_images, distil, augmentation, factor):
    method = DistributionMatching(lr=0.3, real_batch=5)
    module = distil(method, smooth(), 6, augmentation=augmentation, factor=factor, seed=7)

    images = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    places, augment, network = ((1, 4), (2, 3), (0, 5)), SiameseAugmentation(augmentation), smooth()
    optimizer = torch.optim.SGD([images], lr=0.3, momentum=0.5)
    for step in range(6):
        draw_network(network, 7, "network", step)
        loss = torch.zeros((), dtype=torch.float64)
        for label, (real, place) in enumerate(zip(RealBatches(*real_images, 5, 3).batch(step), places, strict=True)):
            both = real, decode(images[list(place)], factor)
            draws = [generator(7, "augmentation", step, label) for _ in both]
            changed = [augment(part, draw, same=True) for part, draw in zip(both, draws, strict=True)]
            loss = loss + naive(network, *([part] for part in changed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(module.images.detach(), images.detach(), rtol=1e-9, atol=1e-9)
    assert float(module.trainer.callback_metrics["train/matching_loss"]) == pytest.approx(loss.item(), rel=1e-6)
    assert torch.equal(module.network[0].weight, network[0].weight)


def test_its_defaults_are_the_papers_and_its_points_are_counted():
    method = DistributionMatching()
    assert (method.lr, method.momentum, method.real_batch) == (1.0, 0.5, 256)
    assert method.points_per_step(10) == 2560
    assert method.passes(10, 40) == 2560 + 3 * 40


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"momentum": 1.0}, {"real_batch": 0}])
def test_impossible_hyperparameters_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}.*: give lr above 0"):
        DistributionMatching(**wrong)
