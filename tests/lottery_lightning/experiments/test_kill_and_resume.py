"""Real processes, really killed: the same command again gives the same bits as if nothing had happened."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
COMMAND = [
    "lottery", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--levels", "2", "--controls", "{reinit: 1}",
    "--training.max_steps", "40", "--training.checkpoint_seconds", "0", "--rule.rewind", "7it",
]  # fmt: skip

# Runs the command, notes each fit and the step it began at, and kills itself at `event`.
DRIVER = """
import json, os, signal, sys
import lightning.pytorch as L
import lottery_callbacks.ticket as ticket
import torch
from lightning.fabric.plugins.io import torch_io
from lottery_callbacks import IterativeMagnitudePruning
from lottery_lightning.cli import main
from lottery_lightning.progress import ExperimentProgress

event, log, *arguments = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def at(level, step, trainer):
    imp = next(c for c in trainer.callbacks if hasattr(c, "fit_masks"))
    return getattr(imp, "level", None) == level and trainer.global_step == step

class Watch(ExperimentProgress):
    def on_train_start(self, trainer, module):
        with open(log, "a") as file:
            print(json.dumps([str(trainer.default_root_dir), trainer.global_step]), file=file)
        if event == "before first step" and at(1, 7, trainer):
            die()
    def visit_ends(self, per_epoch, last):
        return (5, 33)
    def on_train_batch_end(self, trainer, *rest):
        super().on_train_batch_end(trainer, *rest)
        if event == "before the rewind step" and at(0, 5, trainer) or event == "mid level" and at(1, 33, trainer):
            die()
    def on_validation_batch_start(self, trainer, *rest):
        if event == "inside validation" and at(0, 30, trainer):
            die()

import lottery_lightning.experiments.lottery as lottery
lottery.ExperimentProgress = Watch

if event == "ticket":
    replace = os.replace
    os.replace = lambda a, b: die() if "level_02" in str(b) else replace(a, b)
if event == "checkpoint":
    def torn(checkpoint, path):
        torch.save(checkpoint, path)
        if "level_02" in str(path) and "step=30" in str(path):
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            die()
    torch_io._atomic_save = lambda checkpoint, path: torn(checkpoint, path)
if event == "record":
    import lottery_lightning.experiments.runs as runs
    runs.write_json = lambda path, value: die()
sys.exit(main(arguments))
"""
EVENTS = (
    "before the rewind step", "inside validation", "record", "before first step", "mid level", "ticket", "checkpoint",
)  # fmt: skip


def run(event, run_dir, log):
    command = [sys.executable, "-c", DRIVER, event, str(log), *COMMAND, "--run_dir", str(run_dir)]
    return subprocess.run(command, cwd=run_dir.parent, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    whole = run("none", folder / "whole", folder / "whole.log")
    assert whole.returncode == 0, whole.stderr
    for event in EVENTS:
        killed = run(event, folder / "torn", folder / "torn.log")
        assert killed.returncode == -signal.SIGKILL, (event, killed.stderr)
    last = run("none", folder / "torn", folder / "torn.log")
    assert last.returncode == 0, last.stderr
    return folder, last


def test_tickets_weights_and_tables_are_bitwise_those_of_the_unbroken_run(runs):
    folder, _ = runs
    names = {path.relative_to(folder / "whole") for path in (folder / "whole").rglob("*") if path.is_file()}
    kept = {name for name in names if name.suffix in (".safetensors", ".csv") or name.name == "result.json"}
    assert len(kept) == 4 + 1 + 5  # tickets 0 to 3; results.csv; 3 levels and 2 controls
    for name in kept:
        assert (folder / "torn" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    finals = {name for name in names if name.name in ("final.ckpt", "best.ckpt")}
    assert len(finals) == 10
    for name in finals:
        whole, torn = (torch.load(folder / side / name, weights_only=True)["state_dict"] for side in ("whole", "torn"))
        assert whole.keys() == torn.keys()
        assert all(torch.equal(whole[key], torn[key]) for key in whole), name


def test_fits_went_on_where_they_were_torn_and_finished_levels_were_not_trained_again(runs):
    folder, _ = runs
    fits = [json.loads(line) for line in (folder / "torn.log").read_text().splitlines()]
    began = [(Path(path).name, step) for path, step in fits]
    assert began == [
        ("level_00", 0),  # killed before the rewind step
        ("level_00", 0),  # killed inside the validation of step 30
        ("level_00", 20),  # done, killed before its record is written; the next fit finds the end
        ("level_01", 7),  # killed before its first step
        ("level_01", 7),  # killed at step 33
        ("level_01", 30),  # done, killed while ticket 2 is written; the next fit finds the end
        ("level_02", 7),  # killed while the checkpoint of step 30 is written
        ("level_02", 20),  # goes on from the checkpoint before
        ("level_01_reinit_0", 0),
        ("level_02_reinit_0", 0),
    ]


def test_a_torn_checkpoint_is_reported(runs):
    _, last = runs
    assert "is torn and is passed over" in last.stderr + last.stdout
