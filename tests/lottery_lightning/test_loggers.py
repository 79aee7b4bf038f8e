import csv
import sys
from pathlib import Path

import pytest

from lottery_lightning.cli import main
from lottery_lightning.loggers import close, log_image, log_level, log_table, log_ticket, make_logger

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


def test_wandb_asked_for_and_absent_is_one_line_with_the_mend(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(ValueError, match=r"pip install 'lottery-lightning\[wandb\]'"):
        make_logger("wandb", tmp_path, "p", "g", "n")


def test_tensorboard_asked_for_and_absent_is_one_line_with_the_mend(tmp_path, monkeypatch):
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{name}", False)
    with pytest.raises(ValueError, match=r"pip install 'lottery-lightning\[tensorboard\]'"):
        make_logger("tensorboard", tmp_path, "p", "g", "n")


def test_an_unknown_logger_is_told_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="logger='mlflow' is not known: choose none, csv, tensorboard or wandb"):
        make_logger("mlflow", tmp_path, "p", "g", "n")  # pyright: ignore[reportArgumentType]


def test_wandb_runs_have_an_id_of_their_folder_and_the_project_of_the_environment_if_it_names_one(
    tmp_path, monkeypatch
):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    first = make_logger("wandb", tmp_path / "a", "p", "g", "n")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    again, other = (make_logger("wandb", tmp_path / folder, "p", "g", "n") for folder in ("a", "b"))
    assert first.version == again.version != other.version
    assert (first.name, again.name) == ("p", "ours")


def test_under_an_agent_only_the_run_without_a_group_is_logged(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    assert make_logger("wandb", tmp_path, "p", "g", "n") is False
    assert make_logger("wandb", tmp_path, "p", None, "n") is not False
    assert make_logger("csv", tmp_path, "p", "g", "n") is not False


def test_a_run_without_a_logger_is_passed_over(tmp_path):
    for logger in (None, False):
        log_level(logger, {"a": 1.0}, 0)
        log_image(logger, "picture", b"no picture", 0)
        log_table(logger, "table", [{"a": 1}], 0)
        log_ticket(logger, tmp_path / "no ticket")
        close(logger)
    assert not list(tmp_path.iterdir())


def test_csv_takes_scalars_and_leaves_out_pictures_tables_and_tickets(tmp_path):
    logger = make_logger("csv", tmp_path, "p", "g", "n")
    log_level(logger, {"a": 0.5}, 3)
    log_image(logger, "picture", b"no picture", 3)
    log_table(logger, "table", [{"b": 1}], 3)
    log_ticket(logger, tmp_path / "no ticket")
    close(logger)
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert metrics.read_text().splitlines() == ["a,step", "0.5,3"]


def test_a_table_of_rows_with_other_keys_has_all_their_columns(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = make_logger("tensorboard", tmp_path, "p", "g", "n")
    log_table(logger, "table", [{"arm": "ticket", "density": 1 / 3}, {"arm": "dense", "kept": 7}], 2)
    close(logger)
    (event,) = EventAccumulator(str(tmp_path / "logs")).Reload().Tensors("table/text_summary")
    assert event.step == 2
    assert event.tensor_proto.string_val[0].decode().splitlines() == [
        "| arm | density | kept |", "| --- | --- | --- |", "| ticket | 0.333333 |  |", "| dense |  | 7 |"
    ]  # fmt: skip
