"""Shared fixtures: quiet and reproducible tests, tiny real fits, and the folder of the real MNIST."""

import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

settings.register_profile("house", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    _seed()  # what a module draws while it is collected
    for message in ("does not have many workers", "exists and is not empty", "litlogger", "GPU available", "LeafSpec"):
        config.addinivalue_line("filterwarnings", f"ignore:.*{message}")


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global state is what is seeded)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that draws without a seed of its own draws the same alone, in another order and on another day.

    Fixtures of a module or the session run before it: they seed what they draw.
    """
    _seed()


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    """Lightning's info lines are off: a test that reads them sets the level of `lightning.pytorch` by caplog."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """A folder with the real MNIST/raw: $LOTTERY_DATA_DIR, else data/ in the repository."""
    folder = Path(os.environ.get("LOTTERY_DATA_DIR") or Path(__file__).parents[1] / "data")
    if not (folder / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST/raw in {folder}: run `make data`, or name a folder in LOTTERY_DATA_DIR")
    return folder


def _global_rng() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global state is what is watched)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), (kind, keys.tobytes(), *rest)


@pytest.fixture
def global_rng() -> Callable[[], tuple[Any, ...]]:
    """Reads the global random state of torch, Python and NumPy, comparable by ==."""
    return _global_rng


@pytest.fixture
def global_rng_untouched() -> Iterator[None]:
    """Fails the test that draws from, or seeds, a global random state."""
    before = _global_rng()
    yield
    assert _global_rng() == before, "the global random state was touched"


class _TinyModule(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.25), nn.Linear(12, 3)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self.network(batch[0])
        self.log("val/loss", F.cross_entropy(logits, batch[1]), batch_size=len(batch[1]), on_epoch=True)
        self.log("val/acc", (logits.argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]), on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.fixture
def make_module() -> Callable[[], L.LightningModule]:
    """Makes the same tiny classifier each time: Linear, BatchNorm, ReLU, Dropout, Linear; 108 prunable weights."""

    def make(seed: int = 0) -> L.LightningModule:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _TinyModule()

    return make


@pytest.fixture
def loaders() -> tuple[DataLoader, DataLoader]:
    """Training (4 batches of 8) and validation (2 of 8) loaders of fixed random data, in a fixed order."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(48, 6, generator=generator)
    labels = (images[:, :3] + 0.1 * torch.randn(48, 3, generator=generator)).argmax(1)
    train, val = TensorDataset(images[:32], labels[:32]), TensorDataset(images[32:], labels[32:])
    return DataLoader(train, batch_size=8), DataLoader(val, batch_size=8)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Makes a CPU trainer that shows, logs and checkpoints nothing unless asked to."""

    def make(**options: Any) -> L.Trainer:
        defaults = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
            "max_steps": 8,
            "val_check_interval": 2,
        }
        return L.Trainer(**defaults | options)

    return make


class _Trace(L.Callback):
    """Everything that a monitor may not change, as bytes, at every step and validation."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def _record(self, module: L.LightningModule) -> None:
        tensors = module.state_dict() | {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        bits = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        self.rows.append((bits, [part.training for part in module.modules()], _global_rng()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._record(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._record(pl_module)

    def on_validation_start(self, trainer, pl_module) -> None:
        self._record(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._record(pl_module)

    def on_fit_end(self, trainer, pl_module) -> None:
        self._record(pl_module)


@pytest.fixture
def trace_fit(make_module, loaders, make_trainer) -> Callable[..., list[Any]]:
    """Fits the tiny module with the given callbacks; returns weights, buffers, gradients, flags and random states."""

    def fit(*callbacks: L.Callback, **options: Any) -> list[Any]:
        trace = _Trace()
        L.seed_everything(7, verbose=False)
        make_trainer(callbacks=[*callbacks, trace], **options).fit(make_module(), *loaders)
        return trace.rows

    return fit
