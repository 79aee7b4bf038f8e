"""Small fits that tests make with and without visits."""

import lightning.pytorch as L
import torch
from torch import nn

from lottery_callbacks import Pruning, RewindPoint, Ticket
from lottery_callbacks.rewinding import snapshot
from lottery_lightning.data import TensorDataModule
from lottery_lightning.tasks import ImageClassifier

EPOCH = 9  # batches: 70 examples by 8, the last of 6


class Blobs(TensorDataModule):
    def load(self):
        generator = torch.Generator().manual_seed(3)
        return {name: self.draw(size, generator) for name, size in (("train", 70), ("val", 20), ("test", 20))}

    def draw(self, size, generator):
        images = torch.randn(size, 6, generator=generator)
        return images, (images[:, :3] + 0.3 * torch.randn(size, 3, generator=generator)).argmax(1)


class Noisy(Blobs):
    """Augmented by draws of each batch."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.augmentation = lambda images, generator: images + 0.1 * torch.randn(images.shape, generator=generator)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def task(steps_per_visit, cls=ImageClassifier, **arguments):
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.25), nn.Linear(12, 3))
    return cls(network, **{"optimizer": adam, "num_classes": 3, "steps_per_visit": steps_per_visit} | arguments)


class Watch(L.Callback):
    """The optimizer step after each visit, and whether there were visits."""

    def __init__(self):
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        trainer.made_visits = not pl_module.automatic_optimization

    def visit_ends(self, per_epoch, last):
        return ()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(trainer.global_step)


def bits(trainer):
    """Weights, buffers and optimizer state."""
    state = dict(trainer.lightning_module.state_dict())
    for optimizer in trainer.optimizers:
        for index, entries in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
        state |= {"lr": torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)}
    return {name: value.detach().reshape(-1).view(torch.uint8).tolist() for name, value in state.items()}


def half(module):
    """A ticket that keeps every other weight."""
    weights = Pruning().prunable(module)
    masks = {name: (torch.arange(weight.numel()) % 2 == 0).view_as(weight) for name, weight in weights.items()}
    return Ticket(masks, RewindPoint(0, snapshot(module)), {"level": 1})
