import csv
import sys
from pathlib import Path

import pytest

from lottery_lightning.cli import main
from lottery_lightning.loggers import make_logger

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
TINY = ["lottery", "--config", QUICKSTART, "--levels", "1", "--controls", "{}", "--training.max_steps", "20"]


def test_none_is_no_logger_and_writes_nothing(tmp_path):
    assert make_logger("none", tmp_path / "x", "p", "g", "n") is False
    assert not (tmp_path / "x").exists()


def test_csv_logs_lie_below_each_run_and_the_levels_below_the_experiment(tmp_path):
    assert main([*TINY, "--run_dir", str(tmp_path / "run"), "--training.logger", "csv"]) == 0
    (level,) = (tmp_path / "run" / "trial_0" / "level_01" / "logs").rglob("metrics.csv")
    with level.open() as file:
        rows = list(csv.DictReader(file))
    assert {round(float(row["prune/density"]), 4) for row in rows if row["prune/density"]} == {0.802}
    assert any(row["val/acc"] for row in rows)
    (summary,) = (tmp_path / "run" / "logs").rglob("metrics.csv")
    with summary.open() as file:
        levels = list(csv.DictReader(file))
    assert [row["step"] for row in levels] == ["0", "1"]
    assert all(0 < float(row["ticket/test_acc_end"]) <= 1 for row in levels)


def test_wandb_runs_offline_one_a_level_and_one_of_levels(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--run_dir", str(tmp_path / "run"), "--training.logger", "wandb"]) == 0
    offline = [path.parents[2].relative_to(tmp_path / "run") for path in tmp_path.rglob("offline-run-*/*.wandb")]
    assert sorted(map(str, offline)) == [".", "trial_0/level_00", "trial_0/level_01"]
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # nothing beside the run_dir


def test_wandb_asked_for_and_absent_is_one_line_with_the_mend(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(ValueError, match=r"pip install 'lottery-lightning\[wandb\]'"):
        make_logger("wandb", tmp_path, "p", "g", "n")
