"""Lines that cannot be are refused in one line, before the first step."""

from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from stranger import Blobs, Net, Probe, bits, quiet, seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import LinearModeConnectivity

STEPS = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}


def lmc(**options):
    return LinearModeConnectivity(**({"points": 4, "network": "net"} | options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": 1}, "1 points make no line: choose 2 or more"),
        ({"norm_batches": 0}, "norm_batches=0 give no statistics: choose 1 or more"),
        ({"norms": "mean"}, "norms='mean' is not known: choose one of average, reestimate"),
        ({"to": "a.ckpt"}, "to='a.ckpt' is one path: give a list of them, or a dict by name"),
        ({"to": ["a/last.ckpt", "b/last.ckpt"]}, "two checkpoints have files of one name: give a dict of names"),
        ({"to": ["previous.ckpt"]}, "a checkpoint is named 'previous', as is the level before"),
    ],
)
def test_what_makes_no_line_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearModeConnectivity(**arguments)


def other_architecture(path):
    torch.save(Net((6, 13, 5)).state_dict(), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, r"one\.ckpt is missing or no checkpoint \(.*\): give one of torch or Lightning$"),
        (lambda path: path.write_bytes(b"torn"), r"one\.ckpt is missing or no checkpoint \(.*\): give one of torch or"),
        (lambda path: torch.save(torch.ones(2), path), r"one\.ckpt holds a Tensor: give a state dict, or a checkpoint"),
        (other_architecture, r"line to 'one': net\.1\.weight is \(12, 6\) in the first network and \(13, 6\) in the s"),
    ],
)
def test_a_checkpoint_that_cannot_be_compared_is_refused_before_the_first_step(tmp_path, write, message):
    write(tmp_path / "one.ckpt")
    module = seeded(0, Net)
    before = bits(module)
    with pytest.raises(ValueError, match=message):
        quiet(tmp_path, [lmc(to=[tmp_path / "one.ckpt"])], **STEPS).fit(module, Blobs())
    assert bits(module) == before


def test_a_module_without_forward_and_data_that_are_none_are_refused_before_the_first_step(tmp_path):
    def refused(message, callback, *data, **options):
        with pytest.raises(ValueError, match=message):
            quiet(tmp_path, [callback], **STEPS | options).fit(Net(), *data)

    refused("Net has no forward: name the submodule that maps inputs to logits in network", lmc(network=None), Blobs())
    refused("on validation data, and there are none: give the fit some, and", lmc(), Blobs(), limit_val_batches=0)
    data = Blobs()
    data.setup("fit")
    train = DataLoader(TensorDataset(*data.splits["train"]), 7)
    several = {"a": train, "b": train}
    refused("needs one training loader, and there are several", lmc(norms="reestimate"), several, train)


def broken(_, batch):
    raise ValueError("this loss knows no such batch")


class Several(nn.Sequential):
    def forward(self, input):
        return super().forward(input), input


def made(change):
    module = Net()
    change(module)
    return module


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda module: None, {"loss": broken}, "^this loss knows no such batch$"),
        (lambda module: setattr(module, "net", Several(*module.net)), {}, "^Several gives a tuple and no tensor: name"),
        (
            lambda module: setattr(module, "net", torch.jit.script(module.net)),
            {},
            "^net is scripted: give it as it was",
        ),
        (
            lambda module: module.register_buffer("wide", torch.ones(1).expand(3)),
            {},
            "^wide is expanded, and cannot be",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(tmp_path, change, options, message):
    probe, module = Probe(), seeded(0, lambda: made(change))
    before = bits(module)
    module.validation_step = lambda batch, batch_idx: None
    with pytest.raises(ValueError, match=message):
        quiet(tmp_path, [lmc(**options), probe], **STEPS).fit(module, Blobs())
    assert probe.steps == []
    assert bits(module) == before


@pytest.mark.parametrize("sanity", [0, 1])
def test_labels_that_are_no_classes_are_refused_before_the_first_step(tmp_path, sanity):
    data, probe = Blobs(), Probe()
    data.setup("fit")
    train = DataLoader(TensorDataset(*data.splits["train"]), 7)
    trainer = quiet(tmp_path, [lmc(), probe], max_epochs=1, num_sanity_val_steps=sanity)
    with pytest.raises(
        ValueError, match=r"^the batches are no \(inputs, class labels\): give a loss that treats them$"
    ):
        trainer.fit(Net(), train, DataLoader(TensorDataset(torch.ones(8, 6), torch.ones(8, 5)), 4))
    assert probe.steps == []


def test_a_module_without_validation_step_is_told_of_it(tmp_path):
    class Never(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.schedule = nn.Linear(6, 5), None

        training_step, configure_optimizers = Net.training_step, Net.configure_optimizers

    with pytest.raises(ValueError, match=r"there are none: give the fit some, and the module a validation_step$"):
        quiet(tmp_path, [lmc()], max_steps=2).fit(Never(), Blobs())


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_a_strategy_that_shards_parameters_is_refused_at_setup_of_a_fit(strategy):
    trainer = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(ValueError, match=f"^{strategy.__name__} shards parameters: evaluate lines with ddp$"):
        lmc().setup(trainer, Net(), "fit")
    lmc().setup(trainer, Net(), "test")
