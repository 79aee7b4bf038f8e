"""What the tests of edge-popup share: a network, its fits, what is looked at, and straight-through masks by hand."""

import lightning.pytorch as L
import torch
from stranger import Blobs, Net, masked, quiet, raw, seeded

FIRST, LAST = "net.1.weight", "net.5.weight"  # 72 and 60 weights
SIZES = {FIRST: 72, LAST: 60}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)


class Searched(Net):
    """`Net` with an optimizer to choose; two parameter groups, unlike in all but the weights of the last layer."""

    def __init__(self, optimizer=sgd):
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self):
        last = [name.endswith("5.weight") for name, _ in self.named_parameters()]
        groups = [
            [p for p, own in zip(self.parameters(), last, strict=True) if own == which] for which in (False, True)
        ]
        return self.optimizer([{"params": groups[0]}, {"params": groups[1], "lr": 0.03}])


def fit(folder, callback, *others, module=None, seed=5, data=Blobs, ckpt_path=None, **options):
    module = module or seeded(1, Searched)
    trainer = quiet(folder, [callback, *others], **{"max_steps": 20, "limit_val_batches": 0} | options)
    L.seed_everything(seed, verbose=False)
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return module


def counts(sparsity):
    return {name: max(1, size - round(sparsity * size)) for name, size in SIZES.items()}


class Watch(L.Callback):
    """After each batch and validation: masks, scores, and whether each parameter holds W under the mask, to the bit."""

    def __init__(self, popup):
        self.popup, self.masks, self.scores, self.baked = popup, [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.masks.append(dict(self.popup.masks))
        self.scores.append({name: score.clone() for name, score in self.popup.scores.items()})
        self.look(pl_module)

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.look(pl_module)

    def look(self, module):
        for name, mask in self.popup.masks.items():
            self.baked.append(raw(module.get_parameter(name)) == raw(masked(self.popup.fixed[name], mask)))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.02, weight_decay=1e-2)


class StraightThrough(torch.autograd.Function):
    """1 where a score is among the highest, by a stable sort; backward the identity."""

    @staticmethod
    def forward(ctx, scores, kept):
        mask = torch.zeros(scores.numel())
        mask[(-scores.flatten()).argsort(stable=True)[:kept]] = 1
        return mask.view(scores.shape)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def hidden_masks(scores, scope):
    """By name, as differentiable floats, at one half."""
    if scope == "threshold":
        return {n: StraightThrough.apply(score, int((score > 0).sum())) for n, score in scores.items()}
    if scope == "layerwise":
        return {n: StraightThrough.apply(score.abs(), score.numel() // 2) for n, score in scores.items()}
    flat = StraightThrough.apply(torch.cat([score.abs().flatten() for score in scores.values()]), 66)
    parts = flat.split([score.numel() for score in scores.values()])
    return {n: part.view(score.shape) for (n, score), part in zip(scores.items(), parts, strict=True)}
