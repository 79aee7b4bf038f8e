import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lottery_lightning.data.augment import SiameseAugmentation
from lottery_lightning.data.draws import generator
from lottery_lightning.distillation import GradientMatching, RealBatches
from lottery_lightning.distillation.draws import draw_network

METHOD = GradientMatching(real_batch=5)


def parts(real_images, counts=(2, 1, 3)):
    images, labels = real_images
    real = [images[labels == label][:5] for label in range(3)]
    source = torch.Generator().manual_seed(5)
    return real, [torch.randn(count, 1, 4, 4, generator=source, dtype=torch.float64) for count in counts]


def naive(network, real, synthetic):
    """Class by class, layer by layer, output unit by output unit; weights of convolutions and linear layers alone."""
    weights = [part.weight for part in network.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    total = torch.zeros((), dtype=torch.float64)
    for label, sides in enumerate(zip(real, synthetic, strict=True)):
        losses = [cross_entropy(network(images), torch.full((len(images),), label)) for images in sides]
        wanted, found = (torch.autograd.grad(loss, weights, create_graph=True) for loss in losses)
        for one, other in zip(wanted, found, strict=True):
            for unit in range(len(one)):
                a, b = one[unit].detach().flatten(), other[unit].flatten()
                total = total + 1 - a @ b / ((a @ a).sqrt() * (b @ b).sqrt() + 1e-6)
    return total


@pytest.mark.parametrize("norm", [nn.Identity, lambda width: nn.GroupNorm(width, width)])
def test_the_loss_is_the_angle_between_gradients_layer_by_layer_and_unit_by_unit(smooth, real_images, norm):
    network = smooth(norm)
    frozen = copy.deepcopy(network).requires_grad_(False)
    real, synthetic = parts(real_images)
    expected = naive(network, real, synthetic)
    torch.testing.assert_close(METHOD.loss(frozen, real, synthetic), expected, rtol=1e-10, atol=0)
    assert 0 < float(expected.detach()) < 3 * 2 * (3 + 5 + 3)
    assert METHOD.loss(frozen, real, real).item() < 0.01  # equal gradients; 1e-6 beside small norms


def test_its_gradient_is_that_of_finite_differences(smooth, real_images):
    network = smooth().requires_grad_(False)
    real, synthetic = parts(real_images)
    images = torch.cat(synthetic).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: METHOD.loss(network, real, x.split([2, 1, 3])), images)
    assert not any(weight.requires_grad or weight.grad is not None for weight in network.parameters())


def test_batch_norm_is_fixed_to_the_statistics_of_16_real_images_a_class(smooth, real_images):
    network = smooth(nn.BatchNorm2d)
    images, labels = real_images
    real = [torch.cat([images[labels == label], 9 + images[:4]]) for label in range(3)]  # 16, and 4 that do not count
    _, synthetic = parts(real_images)
    before = network[0](torch.cat([part[:16] for part in real]))
    reference = copy.deepcopy(network).eval()
    reference[1].running_mean = before.mean((0, 2, 3)).detach()
    reference[1].running_var = before.var((0, 2, 3)).detach()
    expected = naive(reference, real, synthetic)
    torch.testing.assert_close(METHOD.loss(network.train(), real, synthetic), expected, rtol=1e-10, atol=0)


def test_dropout_is_off_and_the_global_random_state_is_left(smooth, real_images, global_rng):
    network, before = smooth(lambda _: nn.Dropout2d(0.5)).train(), global_rng()
    real, synthetic = parts(real_images)
    torch.testing.assert_close(METHOD.loss(network, real, synthetic), naive(network.eval(), real, synthetic))
    assert global_rng() == before


@pytest.mark.parametrize(("augmentation", "norm"), [("", nn.Identity), ("color_crop_flip_rotate", nn.BatchNorm2d)])
def test_a_fit_is_the_published_loop_written_out(smooth, real_images, distil, augmentation, norm):
    method = GradientMatching(0.3, 0.5, 5, steps_per_network=3, training_epochs=4, network_lr=0.2, network_momentum=0.6)
    module = distil(method, smooth(norm), 7, augmentation=augmentation, seed=7)

    images = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    places, augment, network = ((1, 4), (2, 3), (0, 5)), SiameseAugmentation(augmentation), smooth(norm)
    optimizer, labels = torch.optim.SGD([images], lr=0.3, momentum=0.5), torch.tensor([2, 0, 1, 1, 0, 2])
    for step in range(7):
        if step % 3 == 0:
            draw_network(network, 7, "network", step // 3)
            network.requires_grad_(True)
            training = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.6)
        else:
            source = generator(7, "training", step)
            for _ in range(4):
                order = torch.randperm(6, generator=source)
                training.zero_grad()
                batch = augment(images.detach()[order], source)
                cross_entropy(network.train()(batch), labels[order]).backward()
                training.step()
        sides = []
        for label, (real, place) in enumerate(zip(RealBatches(*real_images, 5, 3).batch(step), places, strict=True)):
            draws = [generator(7, "augmentation", step, label) for _ in range(2)]
            both = zip((real, images[list(place)]), draws, strict=True)
            sides.append([augment(part, draw, same=True) for part, draw in both])
        real, synthetic = zip(*sides, strict=True)
        fixed = copy.deepcopy(network)
        if isinstance(network[1], nn.BatchNorm2d):
            before = network[0](torch.cat(real)).detach()
            fixed[1].running_mean, fixed[1].running_var = before.mean((0, 2, 3)), before.var((0, 2, 3))
        loss = naive(fixed.eval(), real, synthetic)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(module.images.detach(), images.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.network[0].weight, network[0].weight.detach(), rtol=1e-9, atol=1e-9)
    assert float(module.trainer.callback_metrics["train/matching_loss"]) == pytest.approx(loss.item(), rel=1e-6)


def test_weights_that_the_forward_pass_does_not_use_stay_and_add_one_a_unit(smooth, real_images):
    network = smooth()
    real, synthetic = parts(real_images)
    expected = naive(network, real, synthetic)
    network[0].idle = nn.Linear(3, 2).double()
    network.requires_grad_(False)
    before = network[0].idle.weight.clone()
    torch.testing.assert_close(METHOD.loss(network, real, synthetic), expected + 3 * 2, rtol=1e-10, atol=0)
    memory = METHOD.memory(network)
    for velocity in memory.parameters():
        velocity.zero_()
    METHOD._train(network, memory, torch.cat(synthetic), torch.tensor([0, 0, 1, 2, 2, 2]))
    assert torch.equal(network[0].idle.weight, before)


def test_norms_without_running_statistics_take_each_class_own(smooth, real_images):
    network = smooth(lambda width: nn.BatchNorm2d(width, track_running_stats=False))
    real, synthetic = parts(real_images)
    torch.testing.assert_close(METHOD.loss(network, real, synthetic), naive(network, real, synthetic))


def test_training_takes_batches_of_256(smooth, monkeypatch):
    method, network, sizes = GradientMatching(steps_per_network=2, training_epochs=2), smooth(), []
    monkeypatch.setattr(method, "_train", lambda network, memory, images, labels: sizes.append(len(images)))
    images, labels = torch.randn(300, 1, 4, 4, dtype=torch.float64), torch.arange(300) % 3
    method.prepare(network, method.memory(network), images, labels, SiameseAugmentation(""), 0, step=1)
    assert sizes == [256, 44] * 2


def test_its_defaults_are_the_papers():
    method = GradientMatching()
    assert (method.lr, method.momentum, method.real_batch) == (0.1, 0.5, 256)
    assert (method.network_lr, method.network_momentum) == (0.01, 0.5)
    assert [method.schedule(images) for images in (1, 10, 50)] == [(1, 1), (10, 50), (50, 10)]
    assert [method.schedule(images) for images in (4, 13, 1000)] == [(1, 1), (10, 50), (50, 10)]
    assert GradientMatching(steps_per_network=4).schedule(10) == (4, 50)
    assert GradientMatching(training_epochs=0).schedule(10) == (10, 0)


def test_the_networks_training_counts_among_the_passes_of_a_step():
    assert GradientMatching(real_batch=2).passes(10, 100) == pytest.approx(60 + (5 + 3 * 50 * 9 / 10) * 100)
    assert GradientMatching(real_batch=2).passes(10, 10) == 60 + 5 * 10  # a network a step is never trained


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"training_epochs": -1}, "^training_epochs=-1: give 0 or more"),
        ({"network_lr": 0.0}, "^network_lr=0.0, network_momentum=0.5: give a rate above 0"),
        ({"network_momentum": 1.0}, "^network_lr=0.01, network_momentum=1.0: give a rate above 0"),
    ],
)
def test_impossible_hyperparameters_of_the_network_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GradientMatching(**wrong)


def test_a_network_for_no_step_is_refused():
    with pytest.raises(ValueError, match=r"^steps_per_network=0: a network serves one step at least$"):
        GradientMatching(steps_per_network=0)
