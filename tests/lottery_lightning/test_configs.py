"""Every config runs through the real command line, on small files in the formats of the real sets."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from lottery_lightning.cli import EXPERIMENTS, LIGHTNING, main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweeps")  # W&B's own form

SMALL = {  # what makes an experiment short
    "edge-popup": ["--trials", "1", "--training.max_steps", "2", "--sparsities", "[0.5]"],
    "instability": [
        *("--trials", "1", "--copies", "2", "--at", "[0it, 1it]", "--lines.points", "3"),
        *("--training.max_steps", "2", "--training.val_every", "2it"),
    ],
    "strong-ticket": [
        "--trials",
        "1",
        "--training.max_steps",
        "2",
        "--ns",
        "[3]",
        "--any_size",
        "[3]",
        "--search_steps",
        "2",
    ],
    "subset-sum": ["--trials", "3", "--sizes", "[2, 3]", "--largest", "6", "--largest_any", "4"],
    "subset-sum-network": ["--trials", "1", "--training.max_steps", "2", "--n", "8"],
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A `data_dir` with MNIST's and CIFAR-10's formats: 80 training and 20 test images each."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0)
    arrays = {}
    for name, split, size in (("train", "train", 80), ("t10k", "test", 20)):
        images = draw.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        labels = draw.integers(0, 10, size, dtype=np.uint8)
        header = np.array([0x803, size, 28, 28], dtype=">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x801, size], dtype=">i4").tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        arrays |= {f"x_{split}": draw.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8), f"y_{split}": labels}
    np.savez(folder / "cifar10.npz", **arrays)
    return folder


def test_every_config_names_its_command():
    assert len(CONFIGS) >= 20
    for path in CONFIGS:
        (command,) = yaml.safe_load(path.read_text())
        assert command in (*EXPERIMENTS, *LIGHTNING)


@pytest.mark.filterwarnings("error:one optimizer step a visit")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs(path, tmp_path, files):
    (command,), (content,) = zip(*yaml.safe_load(path.read_text()).items(), strict=True)
    run = ["--config", str(path)]
    if "data_dir" in content.get("data", {}).get("init_args", {}):
        small = {"data_dir": files, "val_size": 20, "batch_size": 4}
        run += [word for key, value in small.items() for word in (f"--data.init_args.{key}", str(value))]
    if command == "lottery":
        rewind = "1it" if content["rule"].get("rewind", "0it") != "0it" else "0it"
        run += ["--run_dir", str(tmp_path / "run"), "--levels", "1", "--trials", "1", "--rule.rewind", rewind]
        run += ["--training.max_steps", "2", "--training.val_every", "2it", "--training.threads", "1"]
        if "data_dir" in content["data"]["init_args"]:  # the controls of large networks take long, and are the same
            run += ["--controls", "{reinit: 1}" if path.stem.endswith("_small") else "{}"]
            content["controls"] = {"reinit": 1} if path.stem.endswith("_small") else {}
        expected = 2 + sum(content["controls"].values())
    elif command in EXPERIMENTS:
        run += ["--run_dir", str(tmp_path / "run"), *SMALL[command]]
        if "widths: [784" in path.read_text():
            run += ["--model.init_args.network.init_args.widths", "[784, 8, 10]"]
    else:
        run = [command, *run, "--trainer.fast_dev_run", "true", "--trainer.default_root_dir", str(tmp_path)]
    assert main(run) == 0
    if command == "lottery":
        assert len(list((tmp_path / "run").rglob("result.json"))) == expected
        assert len((tmp_path / "run" / "results.csv").read_text().splitlines()) == 1 + expected
    elif command in EXPERIMENTS:
        assert (tmp_path / "run" / "results.json").exists()
