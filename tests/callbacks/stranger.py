"""What the tests of the callbacks share: small networks and data, a quiet trainer, probes and a masked loop by hand."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lottery_callbacks import IterativeMagnitudePruning, RewindPoint, Ticket, ValidationCurve
from lottery_callbacks.functional.masks import Masks
from lottery_lightning.data import TensorDataModule


class Blobs(TensorDataModule):
    """60 training points in 5 classes: 9 batches of 7 an epoch, the last one of 4."""

    def __init__(self, batch_size: int = 7, **options: Any) -> None:
        super().__init__(batch_size=batch_size, **options)

    def load(self) -> dict[str, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(3)
        labels = torch.arange(100) % 5
        images = torch.randn(100, 6, generator=generator) + labels.unsqueeze(1)
        return {"train": (images[:60], labels[:60]), "val": (images[60:80], labels[60:80]), "test": (images, labels)}


class Net(L.LightningModule):
    """BatchNorm, dropout, momentum, and one of two schedules; keeps its optimizer for the tests to look at."""

    def __init__(self, sizes: tuple[int, int, int] = (6, 12, 5), schedule: str | None = None) -> None:
        super().__init__()
        first, hidden, last = sizes
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(first, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(hidden, last),
        )  # fmt: skip
        self.schedule = schedule

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        schedulers = torch.optim.lr_scheduler
        if self.schedule == "onecycle":
            scheduler = schedulers.OneCycleLR(optimizer, 0.2, total_steps=70)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        if self.schedule == "multistep":
            return {"optimizer": optimizer, "lr_scheduler": schedulers.MultiStepLR(optimizer, [1, 2])}
        return optimizer


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    """What `make` makes right after seeding."""
    L.seed_everything(seed, verbose=False)
    return make()


def quiet(folder: Path, callbacks: Iterable[Any], trainer: type = L.Trainer, **options: Any) -> Any:
    """A trainer on the CPU that writes and shows nothing: 24 steps with a validation every 4, if not told otherwise."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "num_sanity_val_steps": 0,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
    }  # fmt: skip
    if not options.keys() & {"max_steps", "max_epochs", "fast_dev_run"}:
        defaults |= {"max_steps": 24, "val_check_interval": 4, "check_val_every_n_epoch": None}
    return trainer(**(defaults | options), callbacks=list(callbacks))


def raw(tensor: Tensor) -> bytes:
    """The bits of a tensor: tells -0.0 from 0.0, and a NaN equals itself."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bits(source: nn.Module | Mapping[str, Tensor]) -> dict[str, str]:
    """The digests of the bits of a module's state_dict, or of named tensors."""
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    return {name: hashlib.sha256(raw(tensor)).hexdigest()[:16] for name, tensor in tensors.items()}


def frozen_state(value: Any) -> Any:
    """Nested state with its tensors as bits, so that == compares everything."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), raw(value)
    if isinstance(value, RewindPoint):
        return value.step, frozen_state(value.tensors), frozen_state(value.training)
    if isinstance(value, dict):
        return {key: frozen_state(item) for key, item in value.items()}
    return [frozen_state(item) for item in value] if isinstance(value, list | tuple) else value


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, tensor, torch.zeros_like(tensor))


def half_masks(module: nn.Module, seed: int = 0) -> Masks:
    """A random mask of half density for every weight matrix."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in module.named_parameters() if p.ndim > 1}


def ticket_of(module: nn.Module, masks: Masks | None = None) -> Ticket:
    """A ticket of level 1 that starts from the module's present state."""
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return Ticket(half_masks(module) if masks is None else masks, RewindPoint(0, tensors), {"level": 1})


def make_plain(base: type = L.LightningModule) -> Any:
    """A stranger's module: own loss, tied and frozen weights, a shared layer, no validation, nothing of ours."""

    class Plain(base):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.encoder = nn.Linear(6, 10)
            self.fixed = nn.Linear(10, 10).requires_grad_(False)
            self.again = self.encoder
            self.decoder = nn.Linear(10, 10)
            self.tied = nn.Linear(10, 10)
            self.tied.weight = self.decoder.weight
            self.head = nn.Conv1d(1, 3, 5)
            self.steps = 0

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.fixed(self.again(x)).relu()
            hidden = self.tied(self.decoder(hidden).relu())
            return self.scale * self.head(hidden.unsqueeze(1)).mean(2)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
            self.steps += 1
            return {"loss": F.huber_loss(self(batch[0]), batch[0][:, :3])}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Plain()


class Probe(L.Callback):
    """Records the steps of a fit, and its whole state where the batch after step `at` (or the first) begins."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.steps: list[tuple[int, int, int, float]] = []  # step, epoch, batch, learning rate
        self.labels: list[list[int]] = []
        self.state: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step, groups = trainer.global_step, trainer.optimizers[0].param_groups
        self.steps.append((step, trainer.current_epoch, batch_idx, groups[0]["lr"]))
        self.labels.append(batch[1].tolist())
        if not self.state and step == (step if self.at is None else self.at):
            schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
            self.state = {
                "step": step,
                "module": {name: tensor.clone() for name, tensor in pl_module.state_dict().items()},
                "groups": copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in groups]),
                "optimizer": {
                    name: copy.deepcopy(trainer.optimizers[0].state.get(parameter, {}))
                    for name, parameter in pl_module.named_parameters()
                },
                "schedulers": copy.deepcopy(schedulers),
            }


class Interrupted(Exception):
    """What `StopAt` raises."""


class StopAt(L.Callback):
    """Raises in `hook` once `step` optimizer steps are done, as a killed process would end there."""

    def __init__(self, step: int, hook: str = "on_train_batch_end") -> None:
        def stop(trainer: Any, *args: Any) -> None:
            if trainer.global_step == step:
                raise Interrupted(f"{hook} at step {step}")

        setattr(self, hook, stop)


class Lottery:
    """A lottery over `Net` on `Blobs`, level by level; what each level gave is kept for comparison."""

    def __init__(self, folder: Path, make: Callable[[], Any], data: Callable[[], Any] = Blobs, **options: Any) -> None:
        self.folder, self.make, self.data = folder, make, data
        self.trainer = options.pop("trainer", {})
        self.imp = IterativeMagnitudePruning(**({"rate": 0.3, "run_dir": folder} | options))
        self.module = seeded(0, make)
        self.finals: list[dict[str, Tensor]] = []
        self.curves: list[list[dict[str, float]]] = []
        self.probes: list[Probe] = []

    def run(self, last: int) -> "Lottery":
        for level in self.imp.levels(last):
            self.fit(level)
        return self

    def fit(self, level: Any, *callbacks: Any, seed: int | None = None) -> None:
        curve, probe = ValidationCurve(metrics=()), Probe()
        checkpointing = {"enable_checkpointing": bool(callbacks)}
        trainer = quiet(level.run_dir, [self.imp, curve, probe, *callbacks], **(checkpointing | self.trainer))
        L.seed_everything(100 + level.number if seed is None else seed, verbose=False)
        trainer.fit(self.module, self.data(), ckpt_path=level.checkpoint)
        self.finals.append({name: tensor.clone() for name, tensor in self.module.state_dict().items()})
        self.curves.append(curve.rows)
        self.probes.append(probe)


def fit_with(folder: Path, module: Any, data: Any, *callbacks: Any, seed: int = 0, **options: Any) -> Any:
    """One fit after seeding; returns (module, curve, probe)."""
    curve, probe = ValidationCurve(metrics=()), Probe()
    trainer = quiet(folder, [*callbacks, curve, probe], **options)
    L.seed_everything(seed, verbose=False)
    trainer.fit(module, data)
    return module, curve, probe


class Functional(nn.Module):
    """Calls where others have modules; layers are not in the order of their definition."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.body = nn.ModuleDict(
            {"b": nn.Conv2d(4, 6, 3, padding="same", bias=False), "a": nn.Conv2d(2, 4, 3, stride=2)}
        )
        self.dropout = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        values = F.max_pool2d(F.relu(self.body["a"](images.contiguous())), 2, 1)
        values = F.dropout(self.body["b"](values).relu(), 0.5, self.training)
        return self.head(self.dropout(values.mean((2, 3))))
