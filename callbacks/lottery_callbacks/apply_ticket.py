"""Train a ticket, or a control of it, in one ordinary fit."""

import os
import warnings
from typing import Literal, get_args

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lottery_callbacks.functional import masks as M
from lottery_callbacks.masked_training import MaskedTraining
from lottery_callbacks.messages import one_of
from lottery_callbacks.plan import plan_of_masks, require_held
from lottery_callbacks.prunable import require_values
from lottery_callbacks.reinitialise import reinitialise
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
            "reinit" cannot draw a trainable parameter (see `reinitialise`).
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
        require_values(pl_module)
        self.ticket.check(pl_module)
        require_held(pl_module, self.masks)
        rank_zero_info(plan_of_masks(pl_module, self.masks))
        resumes = self.resumes(trainer)
        if self.weights == "reinit":
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
