"""The loops that `bench_training.py` sets beside the framework: written by hand, and Lightning as people write it.

Each trains a model for the steps of an experiment and validates at the same steps on the same images. Data, network,
initial weights, precision and batch sizes are the experiment's.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, random_split
from torchmetrics.classification import MulticlassAccuracy
from torchvision import datasets, transforms

from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.steps import Step
from lottery_lightning.data import CIFAR10, MNIST
from lottery_lightning.data.cifar10 import DEVIATION, MEAN
from lottery_lightning.experiments import Training
from lottery_lightning.tasks import ImageClassifier


class Experiment(Protocol):
    """What the loops read of an experiment; its data module has read its set."""

    data: MNIST | CIFAR10
    training: Training


def wait() -> float:
    """The time in seconds, when the device has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def autocast(experiment: Experiment, device: torch.device, **options: Any) -> torch.autocast:
    """The precision of the experiment."""
    precision = experiment.training.trainer.get("precision", "32-true")
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(f"precision={precision!r}: the hand-written loops know 32-true and bf16-mixed")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed", **options)


def bare(experiment: Experiment, model: ImageClassifier) -> float:
    """Train in a loop over tensors on the device, by hand, with no mask, log or checkpoint: its seconds."""
    (images, labels), network, optimizer = start(experiment, model)
    began, due = wait(), validations(experiment)
    batches = orders(labels, experiment.data.batch_size, experiment.training.max_steps)
    for step, index in enumerate(batches, start=1):
        optimizer.zero_grad()
        with autocast(experiment, images.device):
            loss = F.cross_entropy(network(images[index]), labels[index])
        loss.backward()
        optimizer.step()
        if step in due:
            validate(experiment, network)
    return wait() - began


def graph(experiment: Experiment, model: ImageClassifier) -> float:
    """The same by a CUDA graph of one step; shapes are fixed, so the short last batch of an epoch is left out.

    Warm-up (3 steps on a stream of their own) and capture are not timed.
    """
    (images, labels), network, optimizer = start(experiment, model)
    for group in optimizer.param_groups:
        group["capturable"] = True
    size = experiment.data.batch_size
    chosen = torch.zeros(size, dtype=torch.int64, device=images.device)
    batch, answers = images[:size].clone(), labels[:size].clone()

    def step() -> None:
        torch.index_select(images, 0, chosen, out=batch)
        torch.index_select(labels, 0, chosen, out=answers)
        with autocast(experiment, images.device, cache_enabled=False):
            loss = F.cross_entropy(network(batch), answers)
        loss.backward()
        optimizer.step()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            optimizer.zero_grad()
            step()
    torch.cuda.current_stream().wait_stream(aside)
    captured = torch.cuda.CUDAGraph()
    optimizer.zero_grad()  # to None: the captured backward allocates the gradients in the graph's own memory
    with torch.cuda.graph(captured):
        step()
    began, due = wait(), validations(experiment)
    for count, index in enumerate(orders(labels, size, experiment.training.max_steps, whole=True), start=1):
        chosen.copy_(index)
        captured.replay()
        if count in due:
            validate(experiment, network)
    return wait() - began


def start(experiment: Experiment, model: ImageClassifier) -> tuple[tuple[Tensor, Tensor], nn.Module, Optimizer]:
    """The training set, and network and optimizer of `model` beside it."""
    train = experiment.data.splits["train"]
    network = model.network.to(train[0].device).train()
    return train, network, model.make_optimizer(network.parameters())


def validations(experiment: Experiment) -> set[int]:
    """The steps after which the experiment validates."""
    data, last = experiment.data, experiment.training.max_steps
    every = Step.parse(experiment.training.val_every)
    distance = every.in_iterations(-(-len(data.splits["train"][1]) // data.batch_size))
    return {*range(distance, last, distance), last}


def orders(labels: Tensor, size: int, steps: int, whole: bool = False) -> Iterator[Tensor]:
    """The indices of `steps` batches, each epoch shuffled anew on the device; `whole` leaves out short batches."""
    while steps > 0:
        for index in torch.randperm(len(labels), device=labels.device).split(size)[:steps]:
            if len(index) == size or not whole:
                steps -= 1
                yield index


@torch.no_grad()
def validate(experiment: Experiment, network: nn.Module) -> tuple[float, float]:
    """Loss and accuracy over the validation set."""
    images, labels = experiment.data.splits["val"]
    loss, right = torch.zeros((), device=images.device), torch.zeros((), device=images.device)
    network.eval()
    size = experiment.data.eval_batch_size
    for some, answers in zip(images.split(size), labels.split(size), strict=True):
        with autocast(experiment, images.device):
            logits = network(some)
            loss += F.cross_entropy(logits, answers, reduction="sum")
        right += (logits.argmax(1) == answers).sum()
    network.train()
    return loss.item() / len(labels), right.item() / len(labels)


class Stock(L.LightningModule):
    """A classifier as tutorials write it: everything is logged at every step, and Adam is torch's default."""

    def __init__(self, network: nn.Module, rate: float) -> None:
        super().__init__()
        self.network, self.rate = network, rate
        self.train_acc, self.val_acc = (MulticlassAccuracy(10, average="micro") for _ in range(2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels)
        self.train_acc(logits, labels)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_acc", self.train_acc, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.network(images)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


class PruneFirst(ModelPruning):
    """Lightning's ModelPruning, which prunes at the ends of epochs, before the first step instead."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ModelPruning.apply_pruning(self, 0.8)


def stock(experiment: Experiment, model: ImageClassifier, folder: Path, stopwatch: L.Callback) -> None:
    """Train with Lightning as people write it, at 20 % density in each layer; `stopwatch` is one more callback.

    A torchvision data set with transforms in a DataLoader (shuffled, no workers), CSVLogger, the default progress
    bar, ModelCheckpoint, and ModelPruning of the weight matrices by magnitude.
    """
    rate = model.make_optimizer(model.network.parameters()).param_groups[0]["lr"]
    data, training = experiment.data, experiment.training
    layers: Any = [(part, "weight") for part in model.network.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    prune = PruneFirst("l1_unstructured", layers, amount=0.8, use_global_unstructured=False, apply_pruning=False)
    trainer = L.Trainer(
        max_steps=training.max_steps,
        val_check_interval=min(validations(experiment)),
        check_val_every_n_epoch=None,
        logger=CSVLogger(folder),
        callbacks=[prune, ModelCheckpoint(folder, monitor="val_loss"), stopwatch],
        default_root_dir=folder,
        devices=1,
        **training.trainer,
    )
    train, val = pictures(type(data), data.data_dir, data.val_size)
    trainer.fit(
        Stock(model.network, rate),
        DataLoader(train, batch_size=data.batch_size, shuffle=True, num_workers=0),
        DataLoader(val, batch_size=data.eval_batch_size, num_workers=0),
    )


@cache
def pictures(kind: type, folder: Path, held: int) -> Any:
    """Training and validation set as torchvision reads them: a PIL image through transforms for each example."""
    change: Callable[[Any], Any] = transforms.ToTensor()
    if issubclass(kind, MNIST):
        change = transforms.Compose([change, transforms.Normalize((0.1307,), (0.3081,))])
        whole: Any = datasets.MNIST(folder, transform=change)
    elif issubclass(kind, CIFAR10):
        change = transforms.Compose([change, transforms.Normalize(MEAN.tolist(), DEVIATION.tolist())])
        file = folder / "cifar10.npz"
        whole = Pictures(file, change) if file.exists() else datasets.CIFAR10(folder, transform=change)
    else:
        raise ValueError(f"no torchvision data set stands for {kind.__name__}: there are MNIST and CIFAR10")
    return random_split(whole, [len(whole) - held, held])


class Pictures(Dataset):
    """The training images of an `.npz` as torchvision's CIFAR10 serves them."""

    def __init__(self, file: Path, transform: Callable[[Any], Any]) -> None:
        with np.load(file) as arrays:
            self.data, self.targets = arrays["x_train"], arrays["y_train"].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def parts_of_a_step(experiment: Experiment, model: ImageClassifier, density: float) -> dict[str, Callable[[], Any]]:
    """What a bare step does, and ways of stepping and of masking, each as a function to time by itself."""
    (images, labels), network, optimizer = start(experiment, model)
    index = torch.randperm(len(labels), device=labels.device)[: experiment.data.batch_size]
    batch, answers, rate = images[index], labels[index], optimizer.param_groups[0]["lr"]

    def forward() -> Tensor:
        with autocast(experiment, images.device):
            return F.cross_entropy(network(batch), answers)

    loss, parameters = forward(), list(network.parameters())

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, parameters, retain_graph=True)

    def adam(**options: Any) -> Callable[[], Any]:
        copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        for copy, gradient in zip(copies, backward(), strict=True):
            copy.grad = gradient.clone()
        return torch.optim.Adam(copies, lr=rate, **options).step

    weights = [parameter.detach().clone() for parameter in parameters if parameter.ndim > 1]
    masks = [torch.rand_like(weight) < density for weight in weights]

    def masking(act: Callable[[Tensor, Tensor], Any], prepared: list[Tensor]) -> Callable[[], Any]:
        return lambda: [act(weight, mask) for weight, mask in zip(weights, prepared, strict=True)]

    return {
        "gather": lambda: (images[index], labels[index]),
        "forward": forward,
        "backward": backward,
        "adam_fused": adam(fused=True),
        "adam_foreach": adam(foreach=True),
        "adam_default": adam(),
        "masks_bitwise": masking(M.zero_pruned_, [M.as_bits(m, w) for m, w in zip(masks, weights, strict=True)]),
        "masks_float_product": masking(Tensor.mul_, [mask.float() for mask in masks]),
        "masks_bool_product": masking(Tensor.mul_, masks),
        "masks_masked_fill": masking(lambda weight, pruned: weight.masked_fill_(pruned, 0), [~mask for mask in masks]),
        "validation": lambda: validate(experiment, network),
    }
