"""The benchmark of the training loops runs on sets of a few images, and says what it should; nothing is timed."""

import csv
import gc
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
VARIANTS = ["bare", "framework", "framework_single", "framework_heard", "framework_dense", "stock"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("bench_training")
    for constant, value in {"SHORT_LEVELS": 8, "SHORT_STEPS": 2}.items():
        monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr(importlib.import_module("bench_measuring"), "SECONDS", 0.01)
    gc.freeze()  # its many collections need not look at all that was imported
    yield module
    gc.unfreeze()


@pytest.fixture
def files(tmp_path):
    """A `data_dir` with MNIST's and CIFAR-10's formats: 80 training and 20 test images each."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0)
    arrays = {}
    for name, split, size in (("train", "train", 80), ("t10k", "test", 20)):
        images, labels = draw.integers(0, 256, (size, 28, 28), np.uint8), draw.integers(0, 10, size, np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            np.array([0x803, size, 28, 28], ">i4").tobytes() + images.tobytes()
        )
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(np.array([0x801, size], ">i4").tobytes() + labels.tobytes())
        arrays |= {f"x_{split}": draw.integers(0, 256, (size, 32, 32, 3), np.uint8), f"y_{split}": labels}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    return tmp_path


def options(files, **more):
    few = {"--device": "cpu", "--rounds": 2, "--steps": 4, "--data": files, **more}
    few |= {"--data.val_size": 20, "--data.batch_size": 4, "--training.val_every": "2it"}
    return [str(word) for pair in few.items() for word in pair]


@pytest.mark.parametrize(("model", "rounds"), [("lenet", 2), ("conv2", 1)])
def test_it_measures_every_variant_in_every_section(bench, files, capsys, tmp_path, model, rounds):
    more = {"--models": model, "--rounds": rounds, "--out": tmp_path / "out" / "rows.csv"}
    assert bench.main(options(files, **more)) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["rounds"] == rounds
    assert "threads" in found["device"]
    with (tmp_path / "out" / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == VARIANTS
    for row in rows:
        assert 0 < float(row["us_min"]) <= float(row["us_median"]) <= float(row["us_max"])
        assert float(row["us_median"]) == found[f"{model}.{row['variant']}_us"]
    bare, *others = rows
    assert bare["ratio_min"] == bare["ratio_max"] == "1.0"
    for row in others:
        key = f"{model}.{row['variant']}_over_bare"
        assert found[key] == float(row["ratio_median"])
        assert found[f"{key}_range"] == [float(row["ratio_min"]), float(row["ratio_max"])]
    parts = [value for key, value in found.items() if key.startswith(f"{model}.boundary.")]
    assert len(parts) >= 5
    assert all(value >= 0 for value in parts)
    assert {f"{model}.masks_over_bare", f"{model}.boundary_over_level"} <= found.keys()
    only_lenet = {"lenet.memory_growth_mib_per_level", "lenet.where.backward_us", "lenet.where.masks_bitwise_us"}
    assert only_lenet <= found.keys() if model == "lenet" else not only_lenet & found.keys()


def test_sections_and_models_are_chosen(bench, files, capsys):
    assert bench.main(options(files, **{"--models": "lenet", "--sections": "boundary"})) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(key.startswith("lenet.boundary") for key in found.keys() - {"device", "rounds"})
    with pytest.raises(SystemExit):
        bench.main(["--sections", "speed"])
    assert "speed: choose of steps, boundary, memory, where" in capsys.readouterr().err


def test_the_loops_by_hand_learn_and_validate_as_the_framework_does(bench, files):
    import bench_loops

    args, overrides = bench.arguments(options(files, **{"--models": "lenet", "--training.max_steps": 60}))
    measures = bench.Bench("lenet", args, overrides, files)
    measures.framework_dense()
    experiment, model = measures.experiment, measures.fresh_model()
    assert bench_loops.validations(experiment) == set(range(2, 61, 2))
    before, _ = bench_loops.validate(experiment, model.network)
    images, labels = experiment.data.splits["val"]
    assert before == pytest.approx(torch.nn.functional.cross_entropy(model(images), labels).item(), rel=1e-5)
    indices = list(bench_loops.orders(torch.zeros(10), 4, 5))
    assert [len(index) for index in indices] == [4, 4, 2, 4, 4]
    assert sorted(torch.cat(indices[:3]).tolist()) == list(range(10))
    assert [len(index) for index in bench_loops.orders(torch.zeros(10), 4, 5, whole=True)] == [4] * 5
    images, labels = experiment.data.splits["train"]
    untrained = torch.nn.functional.cross_entropy(model(images), labels).item()
    assert bench_loops.bare(experiment, model) > 0
    assert torch.nn.functional.cross_entropy(model(images), labels).item() < untrained / 2


def test_stock_trains_at_a_fifth_of_its_weights(bench, files, tmp_path):
    import bench_loops

    args, overrides = bench.arguments(options(files, **{"--models": "lenet"}))
    measures = bench.Bench("lenet", args, overrides, files)
    measures.framework_dense()
    model, laps = measures.fresh_model(), bench.Laps()
    bench_loops.stock(measures.experiment, model, tmp_path / "stock", laps)
    assert laps.seconds["training"] > 0
    for name, weight in model.network.named_parameters():
        if weight.ndim > 1:
            assert int((weight != 0).sum()) == weight.numel() - round(0.8 * weight.numel()), name
