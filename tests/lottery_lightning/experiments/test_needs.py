"""Modules and data of other people's projects: what a run needs of them is found before the first optimizer step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lottery_lightning.cli import main
from lottery_lightning.experiments.needs import Needs

ROOT = Path(__file__).parents[3]
OWN = '''
import lightning as L, torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

class Own(L.LightningModule):
    """A module that logs what our experiments read."""
    val, test = "val/loss", "test/acc"

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        self.dropout = nn.Dropout(0.2)

    def forward(self, images):
        return self.network(self.dropout(images.flatten(1)))

    def training_step(self, batch, index):
        open("stepped", "a").close()
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        if not self.trainer.sanity_checking:
            self.log(self.val, F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, index):
        self.log(self.test, (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class OtherTest(Own):
    test = "test/accuracy"

class OtherVal(Own):
    val = "valid_loss"

class Silent(Own):
    def test_step(self, batch, index): pass

class NoTest(Own):
    test_step = L.LightningModule.test_step

class Indexed(Own):
    def test_step(self, batch, index, dataloader_idx=0): super().test_step(batch, index)

class NoVal(Own):
    validation_step = L.LightningModule.validation_step

class Pair(Own):
    def forward(self, images): return self.network(images), images
    def training_step(self, batch, index): open("stepped", "a").close()
    def validation_step(self, batch, index): self.log("val/loss", 1.0)
    def test_step(self, batch, index): self.log("test/acc", 1.0)

class Data(L.LightningDataModule):
    """Draws its split in the first `setup`, and its orders from the global random state or a generator of its own."""
    def __init__(self):
        super().__init__()
        self.parts, self.generator = None, torch.Generator().manual_seed(3)

    def setup(self, stage):
        if self.parts is None:
            self.parts = random_split(TensorDataset(torch.randn(96, 64), torch.arange(96) % 10), [64, 16, 16])

    def train_dataloader(self): return DataLoader(self.parts[0], 16, shuffle=True, generator=self.generator)
    def val_dataloader(self): return DataLoader(self.parts[1], 8, shuffle=True, generator=self.generator)
    def test_dataloader(self): return DataLoader(self.parts[2], 8)

class OnlyFit(Data):
    """Has validation data only in a fit."""
    def setup(self, stage):
        super().setup(stage)
        self.val_part = self.parts[1] if stage == "fit" else None
    def val_dataloader(self): return DataLoader(self.val_part, 8)

class NoTestData(Data):
    test_dataloader = L.LightningDataModule.test_dataloader

class NoValData(Data):
    val_dataloader = L.LightningDataModule.val_dataloader

class EmptyVal(Data):
    def val_dataloader(self): return DataLoader(self.parts[1], 32, drop_last=True)

class NoLoader(Data):
    def val_dataloader(self): return []

class TwoTests(Data):
    def test_dataloader(self): return [DataLoader(self.parts[2], 8)] * 2
'''
SHORT = ["--training.max_steps", "6", "--training.val_every", "3it"]
PLAIN = ["--training.max_steps", "6", "--training.val_every", "3it", "--data", "own_project.Data"]
COMMANDS = {
    "lottery": [*PLAIN, "--levels", "1", "--controls", "{}"],
    "instability": [*PLAIN, "--copies", "2", "--lines.points", "2"],
    "heavy-tails": PLAIN,
    "edge-popup": [*PLAIN, "--sparsities", "[0.5]"],
    "strong-ticket": PLAIN,
    "subset-sum-network": PLAIN,
    "distilled-pruning": [*SHORT, "--data", "Digits", "--routes", "{real: {}}", "--levels", "[1]", "--copies", "2"],
    "distill": [*SHORT, "--data", "MNIST", "--method", "DistributionMatching"],
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the module `own_project`, from which commands are run."""
    (tmp_path / "own_project.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_project", raising=False)
    return tmp_path


def refusal(command, capsys, *options, model="Own"):
    """The one line of a command that fails before any step."""
    options = [command, "--model", f"own_project.{model}", "--run_dir", "run", *COMMANDS[command], *options]
    assert main(options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert not Path("stepped").exists()
    assert not list(Path("run").rglob("*.ckpt"))
    return line


OTHER = "error: the model logs no 'test/acc' in test_step: it logs test/accuracy; have OtherTest.test_step log it"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "distill"])
def test_a_test_metric_of_another_name_is_refused_before_the_first_step(command, project, capsys):
    assert refusal(command, capsys, model="OtherTest") == OTHER


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            "OtherVal",
            "the model logs no 'val/loss' in validation_step: it logs valid_loss; have OtherVal.validation_step",
        ),
        ("Silent", "the model logs no 'test/acc' in test_step: it logs nothing; have Silent.test_step log it"),
        ("NoTest", "NoTest has no test_step, which every run needs: define it"),
        ("NoVal", "NoVal has no validation_step, which every run needs: define it"),
    ],
)
def test_what_a_module_lacks_is_named(model, said, project, capsys):
    assert said in refusal("lottery", capsys, model=model)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("NoTestData", "NoTestData has no test_dataloader, which every run needs: define it"),
        ("NoValData", "NoValData has no val_dataloader, which every run needs: define it"),
        ("EmptyVal", "val_dataloader of EmptyVal gives no batch: every run needs validation data"),
        ("NoLoader", "val_dataloader of NoLoader gives no batch: every run needs validation data"),
        ("TwoTests", "test_dataloader of TwoTests gives 2 loaders: a run is tested on one"),
    ],
)
def test_what_data_lack_is_named(data, said, project, capsys):
    assert said in refusal("lottery", capsys, "--data", f"own_project.{data}", model="Indexed")


@pytest.mark.parametrize("command", ["instability", "heavy-tails"])
def test_a_forward_without_logits_is_refused_where_networks_are_evaluated(command, project, capsys):
    assert "Pair.forward must map inputs to logits" in refusal(command, capsys, model="Pair")


def test_until_needs_the_validation_accuracy(project, capsys):
    line = refusal("heavy-tails", capsys, "--until", "0.9")
    assert line.startswith("error: the model logs no 'val/acc' in validation_step: it logs val/loss")


def test_inputs_below_0_are_found_before_the_target_is_trained(project, capsys):
    assert "inputs='nonnegative', but the data" in refusal("strong-ticket", capsys, "--inputs", "nonnegative")


def test_every_model_of_an_experiment_is_looked_at_before_the_first_run(project, capsys):
    assert refusal("edge-popup", capsys, "--dense", "own_project.Own", model="OtherTest") == OTHER
    route = "{real: {}, other: {model: {class_path: own_project.OtherTest}}}"
    assert refusal("distilled-pruning", capsys, "--routes", route) == OTHER


@pytest.mark.parametrize("data", ["Data", "OnlyFit"])
@pytest.mark.parametrize("logger", ["none", "csv"])
def test_the_check_leaves_every_bit_of_the_runs(data, logger, project, monkeypatch):
    def results(folder, *more):
        options = ["--training.max_steps", "6", "--training.val_every", "3it", "--levels", "1", "--trials", "2"]
        options += ["--data", f"own_project.{data}", "--training.logger", logger, *more]
        assert main(["lottery", "--model", "own_project.Own", "--run_dir", folder, *options]) == 0
        weights = {
            path.relative_to(folder): torch.load(path, weights_only=True)["state_dict"]
            for path in Path(folder).rglob("final.ckpt")
        }
        return Path(folder, "results.csv").read_bytes(), weights

    checks, check = [], Needs.check
    monkeypatch.setattr(Needs, "check", lambda self, *given: (checks.append(given), check(self, *given)))
    csv, weights = results("with")
    assert len(checks) == 1  # of 10 runs
    monkeypatch.setattr(Needs, "check", lambda self, *given: None)
    plain_csv, plain = results("without")
    assert csv == plain_csv
    assert len(weights) == len(plain) == 10
    for path, state in plain.items():
        assert all(torch.equal(weights[path][name], value) for name, value in state.items())


def test_finished_runs_are_not_checked_again(project, monkeypatch):
    options = ["lottery", "--model", "own_project.Own", "--run_dir", "run", *COMMANDS["lottery"]]
    assert main(options) == 0
    monkeypatch.setattr(Needs, "check", None)
    assert main(options) == 0


def test_train_py_says_it_in_one_line_and_no_level_is_trained(project):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "lottery",
        "--model",
        "own_project.OtherTest",
        "--run_dir",
        "run",
    ]
    paths = os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(
        [*command, *COMMANDS["lottery"]], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == OTHER
    assert not (project / "stepped").exists()
