"""Every config runs through the real command line."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from lottery_lightning.cli import EXPERIMENTS, LIGHTNING, main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(scope="session")
def mnist_files(tmp_path_factory):
    """Small files in MNIST's own format, so that its configs run on any machine."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, size in (("train", 5600), ("t10k", 200)):
        images = draw.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        labels = draw.integers(0, 10, size, dtype=np.uint8)
        header = np.array([0x803, size, 28, 28], dtype=">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x801, size], dtype=">i4").tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return folder


def test_every_config_names_its_command():
    assert len(CONFIGS) >= 4
    for path in CONFIGS:
        (command,) = yaml.safe_load(path.read_text())
        assert command in (*EXPERIMENTS, *LIGHTNING)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs(path, tmp_path, mnist_files):
    (command,), (content,) = zip(*yaml.safe_load(path.read_text()).items(), strict=True)
    run = ["--config", str(path)]
    if content["data"]["class_path"] == "MNIST":
        run += ["--data.init_args.data_dir", str(mnist_files)]
    if command == "lottery":
        run += ["--run_dir", str(tmp_path / "run"), "--levels", "1", "--trials", "1"]
        run += ["--training.max_steps", "4", "--training.val_every", "2"]
        expected = 2 + sum(content["controls"].values())
    else:
        run = [command, *run, "--trainer.fast_dev_run", "true", "--trainer.default_root_dir", str(tmp_path)]
    assert main(run) == 0
    if command == "lottery":
        assert len(list((tmp_path / "run").rglob("result.json"))) == expected
        assert len((tmp_path / "run" / "results.csv").read_text().splitlines()) == 1 + expected
