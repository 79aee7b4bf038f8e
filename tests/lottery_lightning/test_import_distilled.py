"""The import of a published set, on a CIFAR-10 of a few images; the whitening itself is tested beside `zca`."""

import importlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lottery_lightning.data import CIFAR10, DistilledDataModule, DistilledSet, Whitening
from lottery_lightning.data.cifar10 import NORMALISED

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """The script, whose `zca` keeps what it was given and makes a matrix without eigenvectors of 3,072 numbers."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("import_distilled")
    module.seen = []

    def zca(images, eps):
        module.seen.append((images, eps))
        return Whitening(images.flatten(1).mean(0), torch.eye(3072) / eps)

    monkeypatch.setattr(module, "zca", zca)
    monkeypatch.setattr(module, "CIFAR10", partial(CIFAR10, val_size=30))
    return module


@pytest.fixture
def folder(tmp_path):
    """With cifar10.npz, 50 training images of 10 classes, and source.npz, 20 distilled ones."""
    draw = np.random.default_rng(0)
    arrays = {}
    for name, size in (("train", 50), ("test", 10)):
        arrays |= {f"x_{name}": draw.integers(0, 256, (size, 32, 32, 3), np.uint8)}
        arrays |= {f"y_{name}": np.arange(size, dtype=np.uint8) % 10}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    images = draw.standard_normal((20, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "source.npz", images=images, labels=np.arange(20) // 2)
    return tmp_path


def run(script, folder, *more):
    arguments = [folder / "source.npz", folder / "out" / "set.safetensors", "--data", folder, *more]
    script.main([str(argument) for argument in arguments])
    return DistilledSet.load(folder / "out" / "set.safetensors")


def test_the_set_keeps_its_images_and_says_what_was_recomputed(script, folder):
    found = run(script, folder)
    with np.load(folder / "source.npz") as source, np.load(folder / "cifar10.npz") as file:
        assert np.array_equal(found.images.numpy(), source["images"])
        assert np.array_equal(found.labels.numpy(), source["labels"])
        pixels = np.sort((file["x_train"] / np.float32(255)).sum((1, 2, 3)))
    ((images, eps),) = script.seen
    assert eps == 0.1
    np.testing.assert_allclose(np.sort(images.sum((1, 2, 3)).numpy()), pixels, rtol=1e-4)  # all, in [0, 1]
    assert (found.preprocessing.mean, found.preprocessing.deviation) == ((0.0,) * 3, (1.0,) * 3)
    assert torch.equal(found.preprocessing.whitening.mean, images.flatten(1).mean(0))
    assert (
        found.provenance["whitening"] == "recomputed: ZCA, eps 0.1, of the pixels in [0, 1] of all 50 training images"
    )
    assert "took part in making the set" in found.provenance["validation"]
    assert found.augmentation == "color_crop_cutout_flip_scale_rotate"
    assert (found.network, found.method) == ("ConvNet(depth=3, width=128)", "trajectory matching (imported)")


def test_another_whitening_is_made_where_asked(script, folder):
    found = run(script, folder, "--eps", "0.5", "--normalised", "--network", "other")
    ((images, eps),) = script.seen
    assert eps == 0.5
    assert images.min() < -1.5
    assert found.preprocessing.mean == NORMALISED.mean
    assert found.provenance["whitening"].startswith("recomputed: ZCA, eps 0.5, of the normalised images of all 50")
    assert found.network == "other"


def test_both_kinds_of_images_are_compared(script, folder, capsys):
    found = run(script, folder)
    header, _, distilled, real, _ = capsys.readouterr().out.splitlines()
    assert header.startswith("| images | n | mean | sd |")
    assert distilled.startswith("| distilled | 20 | ")
    assert f"| {float(found.images.mean()):.3f} | {float(found.images.std()):.3f} | " in distilled
    held = CIFAR10(folder, download=False, val_size=30, whitening=folder / "out" / "set.safetensors")
    images = held.load()["val"][0]
    assert f"| real | 30 | {float(images.mean()):.3f} | {float(images.std()):.3f} | " in real
    assert f" | {float(images.min()):.2f} | {float(images.max()):.2f} |" in real


def test_neighbours_are_correlated_along_rows(script):
    images = torch.arange(10.0).view(1, 1, 10, 1).expand(4, 2, 10, 6)
    assert float(script.neighbours(images)) == pytest.approx(1)
    signs = torch.tensor([1.0, -1.0]).repeat(3).expand(4, 2, 10, 6)
    assert float(script.neighbours(signs)) == pytest.approx(-1)


def test_real_images_whitened_by_the_file_go_with_it_and_others_do_not(script, folder):
    path = folder / "out" / "set.safetensors"
    run(script, folder)
    data = DistilledDataModule(path, CIFAR10(folder, download=False, val_size=10, whitening=path))
    data.setup("fit")
    assert [len(labels) for _, labels in data.splits.values()] == [20, 10, 10]
    with pytest.raises(ValueError, match=r"preprocessed in another way .* as CIFAR10\(whitening=FILE\) does"):
        DistilledDataModule(path, CIFAR10(folder, download=False, val_size=10)).setup("fit")


@pytest.mark.parametrize(
    "arrays", [None, {"images": np.zeros((2, 3, 8, 8)), "labels": np.zeros(2)}, {"images": np.zeros((2, 3, 32, 32))}]
)
def test_a_source_of_another_form_is_refused_in_one_line(script, folder, arrays):
    (folder / "source.npz").write_bytes(b"torn")
    if arrays:
        np.savez(folder / "source.npz", **arrays)
    with pytest.raises(
        ValueError, match=r"source\.npz is no distilled CIFAR-10 \(.*\): give an \.npz with images and"
    ) as error:
        run(script, folder)
    assert "\n" not in str(error.value)
    assert not (folder / "out").exists()
