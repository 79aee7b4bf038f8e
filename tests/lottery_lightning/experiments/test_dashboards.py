"""What dashboards get of a lottery, and of a project of one's own: written offline, and read back from the disk."""

import base64
import csv
import hashlib
import io
import json
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from lottery_callbacks import IterativeMagnitudePruning, Ticket
from lottery_lightning import loggers
from lottery_lightning.cli import main
from lottery_lightning.figures import mask_figure

QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
TINY = [
    *("lottery", "--config", QUICKSTART, "--levels", "2", "--controls", '{"reinit": 1}'),
    *("--training.max_steps", "20", "--training.trainer", '{"log_every_n_steps": 10}'),
]
MEASURED = ("early_stop_iteration", "test_acc_early_stop", "test_acc_end")
LAYERS = [f"network.{name}.weight" for name in ("hidden.0", "hidden.1", "output")]
BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("wandb", "tensorboard", "tensorboardX"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
from lottery_lightning.cli import main
sys.exit(main(sys.argv[1:] + ["csv", "--run_dir", "csv"]) or main(sys.argv[1:] + ["none", "--run_dir", "none"]))
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """W&B without a network; everything it writes is below one temporary folder."""
    wandb = pytest.importorskip("wandb")
    home = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MODE": "offline", "SILENT": "true"}.items():
            patch.setenv(f"WANDB_{name}", value)
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
            patch.setenv(f"WANDB_{name}", str(home))
        for name in ("PROJECT", "SWEEP_ID", "RUN_ID"):
            patch.delenv(f"WANDB_{name}", raising=False)
        wandb.teardown()  # it reads the environment once
        yield
    wandb.teardown()


@pytest.fixture(scope="module")
def lottery(offline, tmp_path_factory):
    """The folder of a tiny lottery under W&B, and its runs by their folder's name."""
    folder = tmp_path_factory.mktemp("lottery") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        assert main([*TINY, "--training.logger", "wandb", "--run_dir", str(folder)]) == 0
    return folder, read_all(folder)


def read_all(folder):
    """The offline runs below a folder, by the name of the folder that each lies in."""
    import wandb

    wandb.teardown()  # a finished run's file is whole once the service has ended
    return {path.parents[2].name: read(path) for path in folder.rglob("offline-run-*/*.wandb")}


def read(path):
    """An offline run: its record, config, history (one dict a log), metric definitions and artifacts."""
    history, config, metrics, artifacts, run = [], {}, {}, {}, None
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        if kind in ("run", "config"):
            update = record.run.config.update if kind == "run" else record.config.update
            config |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in update}
        if kind == "history":
            items = record.history.item
            history.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
        if kind == "metric":
            metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        if kind == "artifact":
            artifacts[record.artifact.name] = record.artifact
    return SimpleNamespace(
        run=run, config=config, history=history, metrics=metrics, artifacts=artifacts, files=path.parent / "files"
    )


def records(path):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def values(run, key):
    return [row[key] for row in run.history if key in row]


def pixels(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_a_level_is_a_run_in_the_group_of_its_trial_and_its_config_says_which(lottery):
    folder, runs = lottery
    names = {"level_00", "level_01", "level_02", "level_01_reinit_0", "level_02_reinit_0"}
    assert set(runs) == {*names, "tiny"}
    assert {runs[name].run.run_group for name in names} == {"tiny-trial_0"}
    assert {run.run.project for run in runs.values()} == {"tiny"}
    for name in names:
        record = json.loads((folder / "trial_0" / name / "result.json").read_text())
        config = runs[name].config
        assert {key: config[key] for key in ("trial", "level", "arm", "draw")} == {
            key: record[key] for key in ("trial", "level", "arm", "draw")
        }
        assert config["seed"] == 0
        assert (config["rule"]["rate"], config["rule"]["rewind"]) == (0.2, "0it")
        assert runs[name].run.display_name.startswith(f"trial 0 level {record['level']} {record['arm']}")
    assert (runs["tiny"].run.run_group, runs["tiny"].run.display_name) == ("", "tiny")
    assert (runs["tiny"].config["seed"], runs["tiny"].config["trials"]) == (0, 1)


def test_nothing_is_written_beside_the_run_dir_and_each_run_lies_in_its_own(lottery):
    folder, runs = lottery
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert {run.files.parents[2].relative_to(folder) for name, run in runs.items() if name != "tiny"} == {
        Path("trial_0") / name for name in runs if name != "tiny"
    }
    assert runs["tiny"].files.parents[2] == folder


def test_the_history_of_a_run_holds_what_its_record_says(lottery):
    folder, runs = lottery
    for path in folder.glob("trial_0/*/result.json"):
        record, run = json.loads(path.read_text()), runs[path.parent.name]
        for key in MEASURED:
            assert values(run, f"{record['arm']}/{key}") == [record[key]]
        assert values(run, "prune/density") == [record["density"]]
        assert values(run, "prune/kept") == [record["kept"]]
        for layer, size in zip(LAYERS, (64 * 300, 300 * 100, 100 * 10), strict=True):
            assert values(run, f"prune/density/{layer}") == [record["kept_per_layer"][layer] / size]
        assert sum(record["kept_per_layer"].values()) == record["kept"]
        curve = [point["val/loss"] for point in record["curve"]]
        assert values(run, "val/loss") == pytest.approx(curve, rel=1e-6)


def test_the_summary_has_the_level_as_its_axis(lottery):
    folder, runs = lottery
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    summary = runs["tiny"]
    assert values(summary, "level") == [0, 1, 2]
    assert values(summary, "prune/density") == [float(row["density"]) for row in rows if row["arm"] == "ticket"]
    for arm in ("ticket", "reinit"):
        for key in MEASURED:
            assert values(summary, f"{arm}/{key}") == [float(row[key]) for row in rows if row["arm"] == arm]
            assert summary.metrics[f"{arm}/{key}"] == "level"
    assert summary.metrics["prune/density"] == "level"
    found = json.loads((folder / "results.json").read_text())
    assert values(summary, "finding/best_acc") == [found["best_acc"]]
    assert values(summary, "finding/ticket_minus_reinit") == [found["ticket_minus_reinit"]["mean"]]


def test_the_table_has_a_row_a_run_with_what_each_layer_keeps(lottery):
    folder, runs = lottery
    (path,) = values(runs["tiny"], "levels.path")
    table = json.loads((runs["tiny"].files / path).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    stored = [json.loads(path.read_text()) for path in folder.glob("trial_0/*/result.json")]
    assert len(rows) == len(stored) == 5
    for record in stored:
        (row,) = (row for row in rows if (row["level"], row["arm"]) == (record["level"], record["arm"]))
        for key in ("trial", "draw", "density", "kept", "min_val_loss", *MEASURED):
            assert row[key] == record[key]
        assert {layer: row[f"kept/{layer}"] for layer in LAYERS} == record["kept_per_layer"]


def test_the_figures_of_the_folder_are_the_pictures_of_the_summary(lottery):
    folder, runs = lottery
    for name in ("lottery", "masks"):
        ((path,),) = values(runs["tiny"], f"{name}.filenames")
        shown = pixels((runs["tiny"].files / path).read_bytes())
        assert np.array_equal(shown, pixels((folder / f"{name}.png").read_bytes()))
        assert shown.std() > 10


def test_tickets_are_artifacts_that_load(lottery):
    folder, runs = lottery
    for level in range(3):
        original = folder / "trial_0" / "tickets" / f"level_{level:02d}.safetensors"
        artifacts = runs[f"level_{level:02d}"].artifacts
        artifact = artifacts[f"tiny-trial_0-level_{level:02d}"]
        assert artifact.type == "ticket"
        (entry,) = artifact.manifest.contents
        assert entry.path == original.name
        staged = Path(entry.local_path)
        assert entry.digest == base64.b64encode(hashlib.md5(original.read_bytes()).digest()).decode()
        assert staged.read_bytes() == original.read_bytes()
        ticket, expected = Ticket.load(staged), Ticket.load(original)
        assert all(torch.equal(mask, expected.masks[name]) for name, mask in ticket.masks.items())
        metadata = json.loads(artifact.metadata)
        assert (metadata["level"], metadata["density"], metadata["rate"]) == (level, expected.density, 0.2)
    assert not any(artifact.type == "ticket" for artifact in runs["level_01_reinit_0"].artifacts.values())


def test_the_command_again_logs_nothing_again(lottery):
    folder, runs = lottery
    assert main([*TINY, "--training.logger", "wandb", "--run_dir", str(folder)]) == 0
    assert len(list(folder.rglob("offline-run-*"))) == len(runs)


def test_under_an_agent_the_summary_is_the_run_of_the_sweep_and_the_only_one(offline, tmp_path, monkeypatch):
    import wandb
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    parameters = tmp_path / "parameters.yaml"
    save_config_file_from_dict(str(parameters), {"seed": {"value": 3}})
    for name, value in {"SWEEP_ID": "sweep1", "RUN_ID": "run7", "SWEEP_PARAM_PATH": str(parameters)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()
    levels = ["--levels", "1", "--controls", "{}", "--seed=3"]
    assert main([*TINY, *levels, "--training.logger", "wandb", "--run_dir", str(tmp_path / "tiny")]) == 0
    ((name, run),) = read_all(tmp_path).items()
    assert (name, run.run.run_id, run.run.sweep_id) == ("tiny", "run7", "sweep1")
    assert run.config["seed"] == 3
    assert values(run, "level") == [0, 1]


def test_tensorboard_shows_scalars_pictures_table_and_tickets(tmp_path):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "tiny"
    assert main([*TINY, "--training.logger", "tensorboard", "--run_dir", str(folder)]) == 0
    for path in folder.glob("trial_0/*/result.json"):
        record, events = json.loads(path.read_text()), read_events(path.parent / "logs")
        for key in MEASURED:
            (event,) = events.Scalars(f"{record['arm']}/{key}")
            assert (event.step, event.value) == (20, pytest.approx(record[key]))
        assert events.Scalars("prune/density")[0].value == pytest.approx(record["density"])
    (text,) = read_events(folder / "trial_0" / "level_02" / "logs").Tensors("ticket/text_summary")
    assert str(folder / "trial_0" / "tickets" / "level_02.safetensors") in str(text.tensor_proto.string_val[0])
    summary = read_events(folder / "logs")
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for arm in ("ticket", "reinit"):
        shown = [(event.step, event.value) for event in summary.Scalars(f"{arm}/test_acc_end")]
        assert shown == [(int(r["level"]), pytest.approx(float(r["test_acc_end"]))) for r in rows if r["arm"] == arm]
    for name in ("lottery", "masks"):
        (event,) = summary.Images(name)
        assert np.array_equal(pixels(event.encoded_image_string), pixels((folder / f"{name}.png").read_bytes()))
    (table,) = summary.Tensors("levels/text_summary")
    lines = table.tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[0].startswith("| trial | level | arm |")
    assert f"| {rows[0]['kept']} |" in lines[2]


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


@pytest.mark.parametrize("kind", ["wandb", "tensorboard", "csv"])
def test_the_five_lines_of_the_docstring_work_in_a_project_of_ones_own(
    kind, offline, tmp_path, make_module, loaders, make_trainer
):
    if kind != "csv":
        pytest.importorskip(kind)
    logger = {
        "wandb": lambda: WandbLogger(save_dir=tmp_path, project="mine", id="own"),
        "tensorboard": lambda: TensorBoardLogger(tmp_path, name="logs", version=""),
        "csv": lambda: CSVLogger(tmp_path, name="logs", version=""),
    }[kind]()
    example = (loggers.__doc__ or "").split("```")[1].removeprefix("python\n")
    scope = vars(loggers) | {"mask_figure": mask_figure}
    imp = IterativeMagnitudePruning(rate=0.5, run_dir=tmp_path / "mine")
    shown = []
    for level in imp.levels(1):
        trainer = make_trainer(callbacks=[imp], logger=logger)
        trainer.fit(make_module(), *loaders)
        shown.append(float(trainer.callback_metrics["val/acc"]))
        exec(example, scope | {"level": level, "trainer": trainer})
    loggers.close(logger)
    if kind == "csv":
        with (tmp_path / "logs" / "metrics.csv").open() as file:
            logged = [row["ticket/acc"] for row in csv.DictReader(file) if row["ticket/acc"]]
        assert [float(value) for value in logged] == shown
    if kind == "tensorboard":
        events = read_events(tmp_path / "logs")
        assert [event.value for event in events.Scalars("ticket/acc")] == shown
        assert len(events.Images("masks")) == 2
    if kind == "wandb":
        (run,) = read_all(tmp_path).values()
        assert values(run, "ticket/acc") == shown
        assert values(run, "level") == [0, 1]
        assert run.metrics["ticket/acc"] == "level"
        assert {"own-level_00", "own-level_01"} <= set(run.artifacts)
        assert len(values(run, "masks.filenames")) == len(values(run, "levels.path")) == 2


def test_the_lottery_needs_neither_wandb_nor_tensorboard(tmp_path):
    command = [sys.executable, "-c", BLOCKED, *TINY, "--levels", "1", "--controls", "{}", "--training.logger"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "csv" / "masks.png").read_bytes() == (tmp_path / "none" / "masks.png").read_bytes()
    assert len(list(tmp_path.rglob("metrics.csv"))) == 3
    assert not list((tmp_path / "none").rglob("logs"))
