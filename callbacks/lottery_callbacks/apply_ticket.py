"""Train a ticket, or a control of it, in one ordinary fit."""

import os
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import lightning.pytorch as L
import torch
from torch import nn

from lottery_callbacks import random_state
from lottery_callbacks.functional import masks as M
from lottery_callbacks.masked_training import MaskedTraining
from lottery_callbacks.messages import describe, one_of
from lottery_callbacks.names import named_parameters, plain_modules
from lottery_callbacks.ticket import Ticket

Weights = Literal["rewind", "reinit"]
MaskSource = Literal["ticket", "layerwise_random", "global_random"]


class ApplyTicket(MaskedTraining):
    """Trains a ticket, or a control of it, in one `trainer.fit`.

    At the start of the fit the module takes the rewind point under the mask, W = mask * W_k, with the optimizer,
    schedulers and loops of step k; then it trains as any other, with the pruned weights held at zero (see
    `MaskedTraining`). Checkpoints are sparse and load into the plain network. For k > 0 the learning rate, momentum
    and weight decay are those of step k as well, whatever the module asks for.

    Args:
        ticket: a `Ticket`, or the path of one.
        weights: "rewind" starts from the ticket's rewind point; "reinit" from a fresh draw by the modules' own
            `reset_parameters` (the random reinitialisation control of arXiv 1803.03635), at step 0.
        mask: "ticket", or a random-mask control: "layerwise_random" (each layer's mask permuted: same density per
            layer) or "global_random" (the same number of weights anywhere in the network).
        seed: of the draws that `weights` and `mask` make; the global random state is left alone.

    Raises:
        ValueError: the ticket is for another architecture; a checkpoint holds another mask or none;
            `reset_parameters` is missing where "reinit" needs it.
    """

    def __init__(
        self,
        ticket: Ticket | str | os.PathLike[str],
        weights: Weights = "rewind",
        mask: MaskSource | str = "ticket",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.ticket = ticket if isinstance(ticket, Ticket) else Ticket.load(ticket)
        self.weights = one_of("weights", weights, ("rewind", "reinit"))
        self.mask = _mask_source(mask)
        self.seed = seed
        self.level = self.ticket.level
        self.masks = self._draw_masks()

    def _draw_masks(self) -> M.Masks:
        generator = torch.Generator().manual_seed(self.seed)
        if self.mask == "layerwise_random":
            return M.shuffled(self.ticket.masks, generator)
        if self.mask == "global_random":
            return M.random_like(self.ticket.masks, generator)
        return self.ticket.masks

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        resumes = self.resumes(trainer)
        if self.weights == "reinit":
            self.ticket.check(pl_module)
            if not resumes:
                reinitialise(pl_module, self.seed)
        else:
            start_from(self.ticket, trainer, pl_module, resumes)
        self.apply_masks(trainer, pl_module)


def _mask_source(mask: str) -> MaskSource:
    """The name, or that which a former one has today."""
    if mask == "shuffled":
        warnings.warn(
            'mask="shuffled" is deprecated and will be removed: write mask="layerwise_random"',
            FutureWarning,
            stacklevel=3,
        )
        return "layerwise_random"
    if mask == "random":
        raise ValueError(
            'mask="random" is ambiguous: choose "global_random" (as many weights anywhere in the network, what '
            '"random" meant here) or "layerwise_random" (each layer\'s mask permuted)'
        )
    return one_of("mask", mask, get_args(MaskSource))


def start_from(ticket: Ticket, trainer: L.Trainer, module: nn.Module, resumes: bool) -> None:
    """Put a fit into the ticket's rewind point, unless a checkpoint has put it further already."""
    ticket.check(module)
    if not resumes:
        ticket.rewind.restore(trainer, module)
    elif "learning_rates" in ticket.rewind.training:
        trainer.lr_scheduler_configs.clear()  # fine-tuning: the checkpoint holds the rate, and no schedule


@torch.no_grad()
def reinitialise(module: nn.Module, seed: int) -> None:
    """Redraw every trainable parameter by `reset_parameters`, children before parents, from `seed` alone.

    Frozen parameters keep their values; normalisation layers reset their running statistics too.

    Raises:
        ValueError: a trainable parameter belongs to no module with `reset_parameters`.
    """
    frozen = {parameter: parameter.clone() for parameter in module.parameters() if not parameter.requires_grad}
    missing = [
        name
        for name, parameter in named_parameters(module).items()
        if parameter not in frozen and not any(_resetter(part) for part in _lineage(module, name))
    ]
    if missing:
        raise ValueError(f"cannot reinitialise {describe(missing)}: give the module that owns it reset_parameters()")
    with random_state.forked():
        torch.manual_seed(seed)
        for part in reversed(plain_modules(module)):
            if reset := _resetter(part):
                reset()
    for parameter, value in frozen.items():
        parameter.copy_(value)


def _resetter(part: nn.Module) -> Callable[[], None] | None:
    """`reset_parameters`, which `nn.MultiheadAttention` and `nn.Transformer` spell with an underscore."""
    return getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)


def _lineage(module: nn.Module, parameter: str) -> list[nn.Module]:
    path = parameter.split(".")[:-1]
    return [module.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)]
