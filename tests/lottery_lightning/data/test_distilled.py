import gc
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F

from lottery_callbacks import IterativeMagnitudePruning
from lottery_lightning.data import Digits, DistilledDataModule, DistilledSet, Preprocessing, zca
from lottery_lightning.data.augment import SiameseAugmentation
from lottery_lightning.experiments import Training
from lottery_lightning.experiments.runs import Run, Runner
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier


@pytest.fixture(scope="module")
def real():
    """Digits, read."""
    data = Digits()
    data.setup("fit")
    return data


@pytest.fixture
def write(real, tmp_path):
    """Writes the first ten real training images of each class, as a set that was distilled, changed as told."""

    def make(per_class=10, **changed):
        images, labels = real.splits["train"]
        which = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in range(10)])
        parts = {"images": images[which], "labels": labels[which], "preprocessing": Digits.preprocessing}
        return DistilledSet(**parts | changed).save(tmp_path / "set.safetensors")

    return make


def ready(path, data=None, **arguments):
    made = DistilledDataModule(path, data or Digits(), **arguments)
    made.prepare_data()
    made.setup("fit")
    return made


def keys(images):
    return {image.numpy().tobytes() for image in images}


def order(data, level=0, epoch=0):
    data.set_level(level)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


def test_it_trains_on_the_set_and_validates_and_tests_on_real_images_held_out(real, write):
    data = ready(write())
    assert torch.equal(data.splits["train"][0], data.distilled.images)
    assert torch.equal(data.splits["train"][1], data.distilled.labels)
    for name in ("val", "test"):
        assert all(torch.equal(a, b) for a, b in zip(data.splits[name], real.splits[name], strict=True))
    val = keys(torch.cat([images for images, _ in data.val_dataloader()]))
    assert len(val) == 200
    assert not val & keys(real.splits["test"][0])
    assert not val & keys(real.splits["train"][0])
    assert not val & keys(data.splits["train"][0])
    assert keys(torch.cat([images for images, _ in data.test_dataloader()])) == keys(real.splits["test"][0])
    assert data.preprocessing is Digits.preprocessing


def test_the_real_datas_split_seed_decides_what_is_held_out(write):
    first, second = ready(write(), Digits(split_seed=1)), ready(write(), Digits(split_seed=1), split_seed=9)
    assert torch.equal(first.splits["val"][0], second.splits["val"][0])
    assert keys(first.splits["val"][0]) != keys(ready(write()).splits["val"][0])
    other = Digits(split_seed=1)
    other.setup("fit")
    assert keys(first.splits["val"][0]) == keys(other.splits["val"][0])


def test_tiles_are_decoded_once_and_counted_apart(write):
    data = ready(write(factor=2), batch_size=100)
    assert (data.stored, len(data.splits["train"][1])) == (100, 400)
    assert torch.equal(data.splits["train"][0], data.distilled.decoded()[0])
    assert [len(labels) for _, labels in data.train_dataloader()] == [100] * 4


@pytest.mark.usefixtures("global_rng_untouched")
def test_the_order_is_of_seed_level_and_epoch_alone(write):
    path = write()
    data = ready(path, data_seed=3)
    first = order(data)
    assert torch.equal(first, order(ready(path, data_seed=3)))
    assert keys(first) == keys(data.splits["train"][0])
    for other in (order(data, level=1), order(data, epoch=1), order(ready(path, data_seed=4))):
        assert not torch.equal(first, other)
        assert keys(first) == keys(other)
    repeated = ready(path, data_seed=3, data_order="repeat")
    assert torch.equal(first, order(repeated, level=1))


@pytest.mark.usefixtures("global_rng_untouched")
def test_training_images_are_augmented_by_the_sets_strategy_unless_told_otherwise(write):
    path = write(augmentation="flip")
    plain, own, other = (ready(path, augmentation=strategy) for strategy in ("", None, "color"))
    assert plain.augmentation is None
    batch = order(plain)[:60]
    for data, strategy in ((own, "flip"), (other, "color")):
        loader = data.train_dataloader()
        found = next(iter(loader))[0]
        expected = SiameseAugmentation(strategy)(batch, loader.sampler.generator(0))
        assert torch.equal(found, expected)
        assert not torch.equal(expected, batch)
        assert torch.equal(order(data), order(data))
    assert torch.equal(next(iter(own.val_dataloader()))[0], next(iter(plain.val_dataloader()))[0])
    assert ready(write()).augmentation is None


def test_real_data_that_are_read_already_are_not_read_again_nor_changed(real, write, monkeypatch):
    before, bits = dict(real.splits), keys(real.splits["train"][0])
    monkeypatch.setattr(Digits, "load", lambda self: pytest.fail("read again"))
    data = ready(write(), real, data_seed=5, batch_size=7)
    data.set_level(3)
    order(data, level=3)
    assert data.splits["val"][0] is real.splits["val"][0]
    assert {n: [id(t) for t in s] for n, s in before.items()} == {n: [id(t) for t in s] for n, s in real.splits.items()}
    assert keys(real.splits["train"][0]) == bits
    assert (real.level, real.data_seed, real.batch_size) == (0, 0, 60)


def test_the_real_training_images_are_let_go(write):
    seen = []

    class Watched(Digits):
        def load(self):
            splits = super().load()
            seen.append(weakref.ref(splits["train"][0]))
            return splits

    data = ready(write(), Watched())
    data.setup("test")
    gc.collect()
    assert [watch() for watch in seen] == [None]
    assert data.data.splits == {}


def test_real_data_are_prepared_first(write):
    class Prepared(Digits):
        calls = 0

        def prepare_data(self):
            self.calls += 1

    data = Prepared()
    ready(write(), data)
    assert data.calls == 1


def test_a_line_says_for_what_the_set_was_made(write, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        ready(write(factor=2, network="ConvNet(depth=3)", method="gradient matching"))
        ready(write())
    assert [record.getMessage() for record in caplog.records] == [
        "set.safetensors: 400 images (100 stored) distilled for ConvNet(depth=3) by gradient matching",
        "set.safetensors: 100 images (100 stored) distilled for an unknown network by an unknown method",
    ]


def refusals(real):
    images = real.splits["train"][0]
    plain = Digits.preprocessing
    whitened = Preprocessing(plain.mean, plain.deviation, zca(images))
    return {
        "give the data set that it was made of": {"images": torch.zeros(100, 1, 4, 4)},
        "has 11 classes and the real data 10": {"labels": torch.arange(100) % 11},
        "not by mean (0.5,) and deviation (0.5,)": {"preprocessing": Preprocessing((0.4,), (0.5,))},
        "(whitened, not left as they are)": {"preprocessing": whitened},
    }


def test_a_set_that_does_not_go_with_the_real_data_is_refused_in_one_line(real, write):
    for message, changed in refusals(real).items():
        path = write(**changed)
        with pytest.raises(ValueError, match=f"^{path}: ") as error:
            ready(path)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_data_without_a_preprocessing_and_files_that_are_no_sets_are_refused(write, tmp_path):
    class Raw(Digits):
        def __init__(self):
            super().__init__()
            self.preprocessing = None

        def load(self):
            return Digits().load()

    path = write()
    with pytest.raises(ValueError, match="states no `preprocessing`: set it to what its load"):
        ready(path, Raw())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"set\.safetensors is missing or torn \(.*make the set again$"):
        ready(path)
    with pytest.raises(ValueError, match="none is missing or torn"):
        ready(tmp_path / "none")
    with pytest.raises(ValueError, match="names 'spin'"):
        ready(write(augmentation="flip_spin"))


def test_a_run_on_a_set_learns_to_tell_real_digits(write, tmp_path):
    data = DistilledDataModule(write(), Digits(), batch_size=50)
    runner = Runner(ImageClassifier(Dense([64, 40, 10])), data, Training(max_steps=150, val_every="50it"), "test")
    record = runner.do(Run(tmp_path / "run", 0, 0, "ticket"), 2, IterativeMagnitudePruning(run_dir=tmp_path))
    assert data.data_seed == 2
    assert record["curve"][-1]["val/loss"] < record["curve"][0]["val/loss"] < 2.3
    assert record["test_acc_end"] > 0.8


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_soft_labels_train_towards_their_probabilities(write, make_trainer, smoothing):
    labels = torch.arange(10).repeat_interleave(2)
    soft = (1 - smoothing) * F.one_hot(labels, 10).float() + smoothing / 10
    data = DistilledDataModule(write(per_class=2, labels=soft), Digits(), batch_size=20)
    model = ImageClassifier(Dense([64, 40, 10]))
    make_trainer(max_steps=400, max_epochs=-1, val_check_interval=None, limit_val_batches=0).fit(model, data)
    images, kept = data.splits["train"]
    assert torch.equal(kept, soft)
    torch.testing.assert_close(model(images).softmax(1), soft, atol=0.05, rtol=0)


def test_hard_labels_and_the_same_as_probabilities_train_alike(write, make_trainer):
    weights = []
    for labels in (torch.arange(100) // 10, F.one_hot(torch.arange(100) // 10, 10).float()):
        torch.manual_seed(0)
        model = ImageClassifier(Dense([64, 20, 10]))
        make_trainer(max_steps=5, limit_val_batches=0).fit(model, ready(write(labels=labels)))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights)
