"""What the copies of the instability experiment start from: W_k of a dense run, or m * W_k under a ticket's mask."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from lottery_callbacks import ApplyTicket, Ticket
from lottery_callbacks.functional.steps import Step
from lottery_lightning.experiments.runs import Run

DENSE = "dense"


@dataclass(frozen=True)
class Start:
    """The network ("dense", or a ticket's name) and the step k."""

    network: str
    at: Step

    @property
    def folder(self) -> str:
        """Its name in those of files."""
        return re.sub(r"[^\w.-]+", "_", f"{self.network}_{self.at}")

    def __str__(self) -> str:
        return f"{self.network} at {self.at}"


@dataclass(frozen=True)
class Trial:
    """Where one trial keeps what it makes, in its own folder."""

    folder: Path
    number: int
    copies: int

    @property
    def dense(self) -> Run:
        """The run that each W_k is taken from."""
        return Run(self.folder / DENSE, self.number, 0, DENSE)

    def point(self, step: Step) -> Path:
        """The state W_k, as a ticket that keeps all weights."""
        return self.folder / "tickets" / f"{step}.safetensors"

    def runs(self, start: Start) -> list[Run]:
        """The copies from one start; of the dense network copy 0 is the dense run."""
        runs = [Run(self.folder / f"{start.folder}_{c}", self.number, 0, str(start), c) for c in range(self.copies)]
        return [self.dense, *runs[1:]] if start.network == DENSE else runs

    def pairs(self, start: Start) -> dict[tuple[int, int], Path]:
        """Where the line between each two copies is kept."""
        pairs = combinations(range(self.copies), 2)
        return {(one, two): self.folder / "lines" / f"{start.folder}_{one}_{two}.json" for one, two in pairs}


def mask_of(tickets: Mapping[str, str], start: Start, trial: int) -> Ticket:
    """The ticket whose mask applies; see `Instability` for what paths may name.

    Raises:
        ValueError: the file is missing or torn, or the path names something else.
    """
    path = tickets[start.network]
    try:
        path = path.format(trial=trial, at=start.at)
    except (KeyError, IndexError) as error:
        raise ValueError(f"tickets: {path} names {error}, and only {{trial}} and {{at}} are known") from error
    return Ticket.load(path)


def require_weights_of(trial: int, name: str, ticket: Ticket, weights: Mapping[str, Tensor]) -> None:
    """Compare the ticket's rewind point with the trial's own weights at its step.

    Raises:
        ValueError: it is of another network.
    """
    one, other = (
        torch.cat([of[n].flatten().double() for n in ticket.masks]) for of in (ticket.rewind.tensors, weights)
    )
    apart = float((one - other).norm() / other.norm())  # sqrt(2) for independent draws, far less for other machines
    if apart > 0.5:
        raise ValueError(
            f"ticket {name!r} of trial {trial} starts from other weights at step {ticket.rewind.step} ({apart:.0%} "
            "away): give that of a lottery with this model, data and seed, 'trial_{trial}/tickets/level_10.safetensors'"
        )


def begin(start: Start, trial: int, point: Ticket, tickets: Mapping[str, str]) -> ApplyTicket:
    """What trains a copy from `point`, W_k; the order of its data is that of level 0, whatever the ticket's level.

    After a partial rewind to step k what is not pruned starts as the ticket has it, trained.

    Raises:
        ValueError: the ticket's own rewind point is at step k too, and of another network.
    """
    if start.network == DENSE:
        return ApplyTicket(point)
    ticket, rewind = mask_of(tickets, start, trial), point.rewind
    if ticket.rewind.step == rewind.step:
        require_weights_of(trial, start.network, ticket, rewind.tensors)
        if ticket.provenance.get("retrain") == "prunable_weights":
            left = {name: value for name, value in ticket.rewind.tensors.items() if name not in ticket.masks}
            rewind = replace(rewind, tensors=rewind.tensors | left)
    return ApplyTicket(Ticket(ticket.masks, rewind))
