"""The figure of lines, in every logger that shows pictures."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lottery_callbacks.functional.interpolation import Line
from lottery_lightning.cli import main
from lottery_lightning.figures import connectivity_figure
from lottery_lightning.loggers import log_lines
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier

FIT = Path(__file__).parents[2] / "configs" / "fit_digits.yaml"
LINES = {"previous": Line((0, 0.5, 1), (1.0, 2.0, 1.5), (0.1, 0.2, 0.1), "average")}


class Fake(WandbLogger):
    """Neither the package nor an account is needed."""

    def __init__(self):
        self.seen = []

    def log_image(self, key, images, step):
        self.seen.append((key, [image.size for image in images], step))


def test_every_logger_that_shows_pictures_gets_one_at_the_last_step(tmp_path):
    loggers = [CSVLogger(tmp_path), Fake(), Fake()]
    log_lines(SimpleNamespace(loggers=loggers, global_step=7), LINES)
    assert loggers[1].seen == loggers[2].seen
    ((key, (size,), step),) = loggers[1].seen
    assert (key, step) == ("lmc", 7)
    assert size == tuple(int.from_bytes(connectivity_figure(LINES)[at : at + 4], "big") for at in (16, 20))


def test_without_such_a_logger_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("lottery_lightning.figures.connectivity_figure", lambda lines: 1 / 0)
    for loggers in ([], [CSVLogger(tmp_path)]):
        log_lines(SimpleNamespace(loggers=loggers, global_step=7), LINES)
    with pytest.raises(ZeroDivisionError):
        log_lines(SimpleNamespace(loggers=[Fake()], global_step=7), LINES)


def pictures(folder):
    """[(name, step)] of the images in TensorBoard's files."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loading.EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return [(name, image.step) for name in events.Tags()["images"] for image in events.Images(name)]


def test_tensorboard_shows_it(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path)
    log_lines(SimpleNamespace(loggers=[logger], global_step=7), LINES)
    logger.finalize("success")
    assert pictures(logger.log_dir) == [("lmc", 7)]


def test_a_config_names_it_by_its_class_path(tmp_path):
    pytest.importorskip("tensorboard")
    config = yaml.safe_load(FIT.read_text())
    torch.save(ImageClassifier(Dense([64, 300, 100, 10])).state_dict(), tmp_path / "other.pt")
    options = {"to": [str(tmp_path / "other.pt")], "points": 2, "report": "lottery_lightning.loggers.log_lines"}
    trainer = {"max_steps": 4, "val_check_interval": 2, "default_root_dir": str(tmp_path), "accelerator": "cpu"}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer["logger"] = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(tmp_path), "version": "one"}}
    trainer["callbacks"] = [{"class_path": "LinearModeConnectivity", "init_args": options}]
    config["fit"]["trainer"] |= trainer
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "fit.yaml")]) == 0
    folder = tmp_path / "lightning_logs" / "one"
    assert pictures(folder) == [("lmc", 4)]
    (kept,) = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["callbacks"]
    assert kept["init_args"]["report"] == "lottery_lightning.loggers.log_lines"
