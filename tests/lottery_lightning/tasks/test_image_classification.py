import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger

from lottery_lightning.data import Digits
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier


def classifier(**arguments):
    torch.manual_seed(0)
    return ImageClassifier(Dense([64, 20, 10]), **arguments)


def evaluated(model, split):
    """Loss and accuracy over a whole split at once."""
    data = Digits()
    data.setup("fit")
    images, labels = data.splits[split]
    with torch.no_grad():
        logits = model(images)
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


@pytest.fixture
def fit(make_trainer):
    def run(model, max_steps=20, data=Digits, **options):
        trainer = make_trainer(max_steps=max_steps, val_check_interval=10, **options)
        trainer.fit(model, data(batch_size=60, eval_batch_size=90))
        return trainer

    return run


def test_validation_and_test_are_means_over_all_examples_whatever_the_batches(fit):
    model = classifier()
    trainer = fit(model)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert sorted(logged) == ["val/acc", "val/loss"]
    loss, accuracy = evaluated(model, "val")  # 200 examples in batches of 90, 90 and 20
    assert logged["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["val/acc"] == pytest.approx(accuracy, abs=1e-6)
    tested = trainer.test(model, Digits(eval_batch_size=90), verbose=False)
    loss, accuracy = evaluated(model, "test")
    assert tested == [{"test/loss": pytest.approx(loss, rel=1e-5), "test/acc": pytest.approx(accuracy, abs=1e-6)}]
    assert evaluated(classifier(), "test")[0] > loss


def test_a_loss_that_is_no_number_is_not_left_out_of_the_mean(fit):
    """Of three validation batches the first has a NaN."""

    class Torn(Digits):
        def setup(self, stage):
            super().setup(stage)
            self.splits["val"][0][0] = torch.nan

    module = classifier()
    logged = fit(module, data=Torn).callback_metrics
    assert torch.isnan(logged["val/loss"])


def test_predictions_are_the_highest_logits_of_the_test_set(make_trainer):
    model = classifier()
    predicted = torch.cat(make_trainer().predict(model, Digits(eval_batch_size=150)))
    data = Digits()
    data.setup("predict")
    assert torch.equal(predicted, model(data.splits["test"][0]).argmax(1))


def test_the_training_loss_is_logged_for_loggers_alone(fit, tmp_path):
    assert "train/loss" not in fit(classifier(), 4).callback_metrics
    logger = CSVLogger(tmp_path, name="logs")
    assert "train/loss" in fit(classifier(), 4, logger=logger, log_every_n_steps=1).callback_metrics


def test_logging_does_not_change_the_training(fit, tmp_path):
    plain, logged = classifier(), classifier()
    fit(plain, 5)
    fit(logged, 5, logger=CSVLogger(tmp_path, name="logs"), log_every_n_steps=1)
    for a, b in zip(plain.parameters(), logged.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_is_a_step_of_the_given_optimizer_on_the_cross_entropy(fit):
    model, own = classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5)), classifier()
    fit(model, 1)
    data = Digits(batch_size=60)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    F.cross_entropy(own.network(images), labels).backward()
    for trained, start in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(trained, start - 0.5 * start.grad)


@pytest.mark.parametrize(("interval", "expected"), [("step", 1 / 2**25), ("epoch", 1 / 2)])
def test_the_schedule_steps_at_its_interval(fit, interval, expected):
    model = classifier(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        scheduler_interval=interval,
    )
    trainer = fit(model, 25)  # an epoch has 20 steps
    assert trainer.optimizers[0].param_groups[0]["lr"] == expected


def test_without_a_schedule_the_rate_is_constant(fit):
    trainer = fit(classifier(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01)), 3)
    assert trainer.lr_scheduler_configs == []
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01


def test_the_state_of_the_model_is_that_of_its_network():
    model = classifier()
    assert list(model.state_dict()) == [f"network.{name}" for name in model.network.state_dict()]


def test_other_numbers_of_classes_are_counted_right(make_trainer):
    class Three(Digits):
        def load(self):
            return {name: (x[y < 3], y[y < 3]) for name, (x, y) in super().load().items()}

    model = ImageClassifier(Dense([64, 3]), num_classes=3)
    accuracy = make_trainer().test(model, Three(), verbose=False)[0]["test/acc"]
    data = Three()
    data.setup("test")
    images, labels = data.splits["test"]
    assert accuracy == pytest.approx(float((model(images).argmax(1) == labels).double().mean()), abs=1e-6)
