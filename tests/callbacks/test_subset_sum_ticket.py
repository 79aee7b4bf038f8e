import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import SubsetSumTicket, strong_network


class Stranger(L.LightningModule):
    """Somebody's classifier: its layers lie in the module itself."""

    def __init__(self, *extra: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(nn.Flatten(), *extra, nn.Linear(64, 3))

    def forward(self, images):
        return self.head(F.max_pool2d(F.relu(self.conv(images)), 2))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def data():
    images = torch.rand(40, 1, 8, 8)
    return DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) * 6).long() % 3), batch_size=8)


def fit(tmp_path, module, data, *callbacks, **options):
    trainer = L.Trainer(
        max_epochs=2, logger=CSVLogger(tmp_path), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", callbacks=list(callbacks), default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(module, data, data)
    return trainer


def test_a_strangers_fit_ends_with_the_strong_ticket_of_its_weights(tmp_path, data):
    callback, module = SubsetSumTicket(n=24, size=3, seed=5), Stranger()
    trainer = fit(tmp_path, module, data, callback)
    again = strong_network(module, seed=5, n=24, size=3)
    images, labels = data.dataset.tensors
    assert callback.ticket is not None
    callback.ticket.verify()
    assert callback.ticket(images).equal(again(images))
    with torch.no_grad():
        outputs = module(images), again(images)
    expected = {
        "strong/density": again.density,
        "strong/kept_ratio": sum(again.counts) / sum(p.numel() for p in module.parameters()),
        "strong/weight_error": max(float(e.max()) for one in again.tickets for e in (one.errors, one.bias_errors)),
        "strong/output_difference": float((outputs[0] - outputs[1]).abs().max()),
        "strong/target_accuracy": float((outputs[0].argmax(1) == labels).float().mean()),
        "strong/accuracy": float((outputs[1].argmax(1) == labels).float().mean()),
    }
    assert callback.found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    trainer.logger.save()
    header, *lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    last = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    assert {key: float(last[key]) for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_fit_is_bit_for_bit_the_one_without_it(tmp_path, data):
    shuffled, modules, states = DataLoader(data.dataset, batch_size=8, shuffle=True), [], []
    for callbacks in ([], [SubsetSumTicket(n=8, size=2)]):
        modules.append(Stranger(nn.Dropout()))
        torch.manual_seed(1)
        fit(tmp_path, modules[-1], shuffled, *callbacks)
        states.append(torch.get_rng_state())
    for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert one.equal(other)
    assert modules[1].training == modules[0].training
    assert states[0].equal(states[1])


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_other_precisions_are_compared_too(tmp_path, data, precision):
    callback = SubsetSumTicket(n=16, size=3)
    fit(tmp_path, Stranger(), data, callback, precision=precision, limit_val_batches=2)
    assert 0 < callback.found["strong/output_difference"] < 0.2


def test_another_name_of_the_network_finds_it_too(tmp_path, data):
    class Aliased(Stranger):
        def __init__(self):
            super().__init__()
            self.alias = self.head

    callback = SubsetSumTicket(n=8, size=2, network="alias")
    fit(tmp_path, Aliased(), data, callback)
    assert callback.found["strong/output_difference"] > 0


def test_layers_may_be_built_when_the_fit_is_set_up(tmp_path, data):
    class Late(Stranger):
        def __init__(self):
            super().__init__()
            del self.head

        def configure_model(self):
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    callback = SubsetSumTicket(n=8, size=2)
    fit(tmp_path, Late(), data, callback)
    assert "strong/accuracy" in callback.found


def test_a_submodule_may_be_named_and_sums_of_any_size_asked_for(tmp_path, data):
    module, callback = Stranger(), SubsetSumTicket(n=16, size=None, network="head")
    head = module.head
    fit(tmp_path, module, data, callback)
    assert callback.ticket is not None
    assert module.head is head
    features = torch.rand(3, 4, 4, 4)
    torch.testing.assert_close(callback.ticket(features), module.head(features), atol=0.05, rtol=0)
    images = data.dataset.tensors[0]
    with torch.no_grad():
        values = F.max_pool2d(F.relu(module.conv(images)), 2)
        difference = float((head(values) - callback.ticket(values)).abs().max())
    assert callback.found["strong/output_difference"] == pytest.approx(difference, rel=1e-3)  # float32, of two sums
    assert 0 < difference < 0.05


def test_a_layer_that_cannot_be_treated_is_named_before_the_fit(tmp_path, data):
    module = Stranger(nn.LayerNorm(64))
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(ValueError, match=r"head\.1 \(LayerNorm\) cannot be treated"):
        fit(tmp_path, module, data, SubsetSumTicket())
    assert all(old.equal(new) for old, new in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "choose 1 or more"),
        ({"size": 41}, "a size up to 40"),
        ({"inputs": "nonneg"}, "choose 'any' or 'nonnegative'"),
        ({"split": "other"}, "split 'sign' or 'assigned'"),
        ({"seed": -4}, "choose 0 or more"),
        ({"size": None, "tolerance": -1.0}, "0 or more"),
    ],
)
def test_what_is_no_question_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        SubsetSumTicket(**arguments)
