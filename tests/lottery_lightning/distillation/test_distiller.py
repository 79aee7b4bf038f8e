import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lottery_callbacks import ResumeCheckpoint, ValidateEvery, newest_checkpoint
from lottery_callbacks.apply_ticket import reinitialise
from lottery_lightning.data import Digits
from lottery_lightning.data.augment import SiameseAugmentation
from lottery_lightning.data.preprocessing import Preprocessing
from lottery_lightning.distillation import Distiller, DistributionMatching, GradientMatching, RealBatches
from lottery_lightning.distillation.draws import draw_network
from lottery_lightning.networks import ConvNet

ALL = "color_crop_cutout_flip_scale_rotate"
METHODS = [DistributionMatching(0.5, real_batch=4), GradientMatching(0.2, 0.5, 4, 5, 2, network_lr=0.1)]


class Tear(L.Callback):
    """Ends a fit by an exception in the midst of a step."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            raise RuntimeError("torn")


class Noisy(nn.Module):
    """A network with all that a resumed fit could get wrong: batch norm's statistics and dropout."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images)


def fit(method, real_images, make_trainer, folder, tear=None, every=2):
    torch.manual_seed(100 if tear is None else tear)  # must not matter
    images, labels = real_images[0].float(), real_images[1]
    module = Distiller(method, Noisy(), torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(3)),
                       torch.arange(6) % 3, factor=2, augmentation=ALL, seed=11)  # fmt: skip
    callbacks = [ValidateEvery(f"{every}it"), ResumeCheckpoint(folder, seconds=0)]
    if tear is not None:
        callbacks.append(Tear(tear))
    trainer = make_trainer(max_steps=17, max_epochs=-1, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, RealBatches(images, labels, 4, steps=6), ckpt_path=newest_checkpoint(folder))
    return module


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_torn_fit_goes_on_to_the_same_bits(method, real_images, make_trainer, tmp_path):
    whole = fit(method, real_images, make_trainer, tmp_path / "whole").state_dict()
    for every, tears in ((2, (3, 9, 14)), (3, (6, 7, 13)), (1, (1, 12))):
        folder = tmp_path / f"torn {every}"
        for tear in tears:
            with pytest.raises(RuntimeError, match="torn"):
                fit(method, real_images, make_trainer, folder, tear, every)
            assert torch.load(newest_checkpoint(folder))["global_step"] == tear // every * every
        module = fit(method, real_images, make_trainer, folder, every=every)
        assert module.global_step == 17
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, whole[name]), name
    assert not torch.equal(whole["images"], torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_images_alone_are_trained_and_the_given_network_and_images_stay(method, real_images, make_trainer):
    network, images = Noisy(), torch.randn(3, 1, 4, 4)
    before = [tensor.clone() for tensor in (*network.state_dict().values(), images)]
    module = Distiller(method, network, images, torch.arange(3))
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["images"]
    make_trainer(max_steps=2).fit(module, RealBatches(real_images[0].float(), real_images[1], 4))
    after = (*network.state_dict().values(), images)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert [name for name, p in module.named_parameters() if p.grad is not None] == []
    assert not torch.equal(module.images.detach(), images)


def test_real_and_synthetic_images_of_a_class_share_an_augmentation_and_classes_and_steps_do_not(make_trainer):
    seen = []

    class Recorder(DistributionMatching):
        def loss(self, network, real, synthetic):
            seen.append(
                [(one.detach().clone(), other.detach().clone()) for one, other in zip(real, synthetic, strict=True)]
            )
            return sum(part.sum() for part in synthetic) * 0

    picture = torch.randn(1, 1, 8, 8).expand(60, 1, 8, 8)
    module = Distiller(Recorder(real_batch=3), ConvNet(1, 2, 8, channels=1), picture[:20], torch.arange(20) % 10,
                       augmentation="crop_color")  # fmt: skip
    make_trainer(max_steps=3).fit(module, RealBatches(picture, torch.arange(60) % 10, 3))
    for step in seen:
        assert all(torch.equal(one[0], other[0]) and len(one.unique(dim=0)) == 1 for one, other in step)
        assert len(torch.cat([one[:1] for one, _ in step]).unique(dim=0)) > 5
    assert not torch.equal(seen[0][0][0], seen[1][0][0])


@pytest.fixture(scope="module")
def digits():
    return Digits().load()


def accuracy(images, labels, test):
    """Of a network trained on `images` by 80 steps, on real test images."""
    network = ConvNet(depth=2, width=8, size=8, channels=1)
    reinitialise(network, 77)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(80):
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()
    return float((network(test[0]).argmax(1) == test[1]).float().mean())


def fresh_loss(method, images, real):
    """The matching loss at networks and real images that the fit has not drawn."""
    network, batches = ConvNet(depth=2, width=8, size=8, channels=1), RealBatches(*real, 60, seed=1234)
    total = 0.0
    for seed in range(5):
        draw_network(network, "fresh", seed)
        total += float(method.loss(network, list(batches.batch(seed)), list(images.split(1))).detach())
    return total


@pytest.mark.parametrize(
    ("method", "steps"),
    [(DistributionMatching(1.0, real_batch=32), 80), (GradientMatching(0.1, real_batch=32), 40)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_digits_made_of_random_ones_match_better_and_teach_more_than_noise(method, steps, digits, make_trainer):
    real, labels = digits["train"], torch.arange(10)
    begin = torch.stack([real[0][real[1] == label][0] for label in range(10)])
    module = Distiller(method, ConvNet(depth=2, width=8, size=8, channels=1), begin, labels,
                       augmentation="crop_scale_rotate")  # fmt: skip
    make_trainer(max_steps=steps).fit(module, RealBatches(*real, 32))
    made = module.images.detach()
    assert fresh_loss(method, made, real) < 0.8 * fresh_loss(method, begin, real)
    noise = torch.randn(10, 1, 8, 8)
    assert accuracy(made, labels, digits["test"]) > accuracy(noise, labels, digits["test"]) + 0.25


def test_the_distilled_set_says_all_that_training_on_it_needs(real_images, make_trainer, tmp_path):
    module = Distiller(METHODS[0], Noisy(), torch.randn(4, 1, 4, 4), torch.tensor([2, 0, 1, 0]), 2, "crop_flip", seed=5)
    assert module.points_per_step == 12
    make_trainer(max_steps=3).fit(module, RealBatches(real_images[0].float(), real_images[1], 4))
    preprocessing = Preprocessing((0.5,), (0.25,))
    made = module.distilled_set(preprocessing, provenance={"data": "random"})
    assert torch.equal(made.images, module.images)
    assert made.images.data_ptr() != module.images.data_ptr()
    assert made.labels.tolist() == [2, 0, 1, 0]
    assert (made.augmentation, made.network, made.method, made.factor) == ("crop_flip", "Noisy", METHODS[0].name, 2)
    own = {"lr": 0.5, "momentum": 0.5, "real_batch": 4}
    counted = {"making_seed": 5, "steps": 3, "real_points": 36}
    assert made.provenance == {**counted, "hyperparameters": own, "data": "random"}
    assert made.preprocessing is preprocessing
    assert module.distilled_set(preprocessing, "ConvNet(depth=3)").network == "ConvNet(depth=3)"
    made.save(tmp_path / "set.safetensors")


def test_images_of_other_data_are_refused(real_images, make_trainer):
    images, labels = real_images[0].float(), real_images[1]
    for mine, wrong in (((4, 1, 4, 4), 4), ((3, 1, 8, 8), 3)):
        module = Distiller(METHODS[0], Noisy(), torch.randn(mine), torch.arange(wrong))
        with pytest.raises(
            ValueError, match=r"^real images are 3 classes of \(1, 4, 4\), synthetic ones .* same data$"
        ):
            make_trainer(max_steps=1).fit(module, RealBatches(images, labels, 4))


def test_what_cannot_be_distilled_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match=r"^class 0 of 2 has no image: give one of each at least$"):
        Distiller(METHODS[0], Noisy(), torch.randn(1, 1, 4, 4), torch.tensor([1]))
    with pytest.raises(ValueError, match="names 'zoom'"):
        Distiller(METHODS[0], Noisy(), torch.randn(1, 1, 4, 4), torch.tensor([0]), augmentation="zoom")

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match="cannot reinitialise scale: give the module that owns it reset_parameters"):
        Distiller(METHODS[0], Fixed(), torch.randn(1, 1, 4, 4), torch.tensor([0]))


def test_a_seed_decides_the_networks(real_images):
    modules = [Distiller(METHODS[1], Noisy(), torch.zeros(3, 1, 4, 4), torch.arange(3), seed=s) for s in (0, 0, 1)]
    first, same, other = (module.network.layers[0].weight for module in modules)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    augment = SiameseAugmentation("")
    METHODS[1].prepare(modules[0].network, modules[0].memory, torch.zeros(3, 1, 4, 4), torch.arange(3), augment, 0, 5)
    assert not torch.equal(modules[0].network.layers[0].weight, same)
