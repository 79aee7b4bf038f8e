"""Every config runs through the real command line, on small files in the formats of the real sets."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lottery_lightning.cli import EXPERIMENTS, LIGHTNING, main
from lottery_lightning.data import MNIST, DistilledSet, Preprocessing, Whitening

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweeps")  # W&B's own form

SMALL = {  # what makes an experiment short
    "distill": [
        *("--trials", "1", "--images.per_class", "1", "--making.max_steps", "2", "--method.init_args.real_batch", "2"),
        *("--training.max_steps", "2", "--training.val_every", "2it"),
        *("--whole.max_steps", "2", "--whole.val_every", "2it"),
    ],
    "distilled-pruning": [
        *("--trials", "1", "--copies", "2", "--levels", "[1]", "--lines.points", "2"),
        *("--training.max_steps", "2", "--training.val_every", "2it"),
    ],
    "edge-popup": ["--trials", "1", "--training.max_steps", "2", "--sparsities", "[0.5]"],
    "geometry": [
        *("--trials", "1", "--batches", "1", "--views.points", "2"),
        *("--spectra.draws", "1", "--spectra.spectrum_draws", "1", "--spectra.steps", "2"),
    ],
    "heavy-tails": [
        *("--trials", "1", "--alphas", "[null, 1.75]", "--compression.ratios", "[0.5]"),
        *("--training.max_steps", "2", "--training.val_every", "2it"),
    ],
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
    beats = draw.standard_normal((200, 140)).astype(np.float32)
    np.savez(folder / "ecg5000_train.npz", x=beats, y=draw.integers(0, 5, 200))
    return folder


def short_routes(content):
    """Write a set wherever a config of distilled pruning names one; its routes in a few steps."""
    colour = content["data"]["class_path"] == "CIFAR10"
    shape = (3, 32, 32) if colour else (1, 28, 28)
    whitening = Whitening(torch.zeros(3072), torch.eye(3072)) if colour else None
    preprocessing = Preprocessing((0.0,) * 3, (1.0,) * 3, whitening) if colour else MNIST().preprocessing
    distilled = DistilledSet(torch.zeros(10, *shape), torch.arange(10), preprocessing)
    for path in {route["distilled"] for route in content["routes"].values() if "distilled" in route}:
        distilled.save(path)
    short = {"training": {"max_steps": 2, "val_every": "2it"}}
    return ["--routes", yaml.safe_dump({name: route | short for name, route in content["routes"].items()})]


def finished_runs(content, files):
    """Do the experiments whose runs a geometry measures, in a few steps; those of its planes that are there then."""
    planes = content["planes"]
    named = [*content["networks"].values(), *(folder for own in planes.values() for folder in own)]
    for path in CONFIGS:
        ((command, given),) = yaml.safe_load(path.read_text()).items()
        if any(folder.startswith(f"{given.get('run_dir')}/") for folder in named):
            small = ["--trials", "1", "--training.max_steps", "2", "--training.val_every", "2it"]
            small += ["--data.init_args.data_dir", str(files), "--data.init_args.val_size", "20"]
            small += ["--at", "[0it]", "--lines.points", "2"] if command == "instability" else []
            if command == "distilled-pruning":
                small += [*short_routes(given), "--levels", "[9]", "--lines.points", "2"]
            assert main([command, "--config", str(path), *small, "--data.init_args.batch_size", "4"]) == 0
    there = {name: own for name, own in planes.items() if all(Path(one.format(trial=0)).exists() for one in own)}
    assert there
    return ["--planes", yaml.safe_dump(there)]


def test_every_config_names_its_command():
    assert len(CONFIGS) >= 20
    for path in CONFIGS:
        (command,) = yaml.safe_load(path.read_text())
        assert command in (*EXPERIMENTS, *LIGHTNING)


@pytest.mark.filterwarnings("error:one optimizer step a visit")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs(path, tmp_path, files, monkeypatch):
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
        monkeypatch.chdir(tmp_path)
        if command == "geometry":
            run += finished_runs(content, files)
        elif command == "distilled-pruning":
            run += short_routes(content)
        elif "widths: [784" in path.read_text():
            run += ["--model.init_args.network.init_args.widths", "[784, 8, 10]"]
    else:
        run = [command, *run, "--trainer.fast_dev_run", "true", "--trainer.default_root_dir", str(tmp_path)]
    assert main(run) == 0
    if command == "lottery":
        assert len(list((tmp_path / "run").rglob("result.json"))) == expected
        assert len((tmp_path / "run" / "results.csv").read_text().splitlines()) == 1 + expected
    elif command in EXPERIMENTS:
        assert (tmp_path / "run" / "results.json").exists()
