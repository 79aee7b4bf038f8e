"""What the walks over foreign modules do with each: whole lotteries, controls and scores, or a clear refusal."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from stranger import quiet, raw, seeded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

import lottery_callbacks
from lottery_callbacks import (
    ApplyTicket,
    EdgePopup,
    GradualPruning,
    IterativeMagnitudePruning,
    NMPruning,
    Pruning,
    Ticket,
)
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.scores import Evidence
from lottery_callbacks.functional.synaptic_flow import synaptic_flow
from lottery_callbacks.names import named_parameters

PACKAGE = str(Path(lottery_callbacks.__file__).parent)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(16, 8, generator=torch.Generator().manual_seed(0))), 4, shuffle=True)


class Between(L.LightningModule):
    """A module between two linear layers, on the way to a loss."""

    def __init__(self, make: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.own, self.head = nn.Linear(8, 8), make(), nn.Linear(8, 3)
        self.call = call

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.stem(values)
        found = self.call(self.own, hidden)
        outputs = [part for part in (found if isinstance(found, tuple) else (found,)) if isinstance(part, Tensor)]
        return self.head(hidden).square().mean() + sum(part.float().mean() for part in outputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)


def fit(module: L.LightningModule, *callbacks: L.Callback, data: Callable[[], DataLoader] = loader) -> None:
    trainer = quiet(Path(), callbacks, max_steps=2, enable_checkpointing=False)
    L.seed_everything(5, verbose=False)
    trainer.fit(module, data())


def outcome(what: Callable[[], Any], culprits: Callable[[], list[str]]) -> str:
    """ "" where it went well, or the message of a refusal: ours, of one line, that names one of the culprits."""
    try:
        what()
    except (ValueError, RuntimeError) as error:
        text, place = str(error), traceback.extract_tb(error.__traceback__)[-1]
        kind = type(error).__name__
    else:
        return ""
    assert place.filename.startswith(PACKAGE), f"raw {kind} at {place.filename}: {text}"
    assert "\n" not in text
    assert any(name in text for name in culprits()), text
    return text


def names_in(module: nn.Module) -> list[str]:
    """Of its submodules, their classes and its parameters."""
    parts = [name for name, _ in module.named_modules() if name]
    own = [name for name, _ in module.named_parameters()]
    return parts + own + [type(part).__name__ for part in module.modules()] + ["momentum_buffer"]


def check_sparse(module: nn.Module, masks: M.Masks) -> None:
    own = named_parameters(module)
    for name, mask in masks.items():
        assert not own[name][~mask].any(), name


def lottery(make: Callable[[], Any], folder: Path, rewind: str, data: Callable[[], DataLoader] = loader) -> Ticket:
    """Two levels, the ticket written and read, applied to a new module, and trained again."""
    imp, module = IterativeMagnitudePruning(rate=0.5, rewind=rewind, run_dir=folder), seeded(0, make)
    for _ in imp.levels(1):
        fit(module, imp, data=data)
        check_sparse(module, imp.fit_masks)
    assert imp.ticket is not None
    ticket = Ticket.load(imp.ticket_path(2))
    first = Ticket.load(imp.ticket_path(0))
    for name, mask in ticket.masks.items():
        assert int(mask.sum()) == M.survivors(mask.numel(), 0.5, 2), name
    fresh = ticket.apply_(seeded(1, make))
    check_sparse(fresh, ticket.masks)
    for name, parameter in named_parameters(fresh).items():
        kept = ticket.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert raw(parameter[kept]) == raw(first.rewind.tensors[name][kept]), name
    return ticket


def reinitialised(make: Callable[[], Any], ticket: Ticket, data: Callable[[], DataLoader] = loader) -> None:
    """The control with new weights: those of the seed, under the mask, whatever the module held."""

    class Start(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            drawn.append({name: tensor.detach().clone() for name, tensor in named_parameters(pl_module).items()})

    drawn: list[dict[str, Tensor]] = []
    for seed in (1, 2):
        fit(module := seeded(seed, make), ApplyTicket(ticket, weights="reinit", seed=7), Start(), data=data)
        check_sparse(module, ticket.masks)
    for name, one in drawn[0].items():
        assert raw(one) == raw(drawn[1][name]), name


def within(make: Callable[[], Any], callback: Any, data: Callable[[], DataLoader] = loader) -> None:
    fit(module := seeded(0, make), callback, data=data)
    check_sparse(module, callback.fit_masks)
    assert 0 < M.density(callback.fit_masks) < 1


WITHIN: dict[str, Callable[[], Any]] = {
    "movement": lambda: GradualPruning(0.5, "1it", pruning=Pruning(score="movement")),
    "n:m": lambda: NMPruning(1, 2, "1it"),
    "edge-popup": lambda: EdgePopup(0.5),
}


def score_of(module: Any, score: str, loss: Callable[[], Tensor], batch: Any) -> None:
    """One pruning by a score, outside of a fit."""
    rule = Pruning(score=score)
    weights = rule.prunable(module)
    evidence = Evidence(
        weights, torch.Generator(), losses=lambda: [loss()], flow=lambda: synaptic_flow(module, weights, batch)
    )
    dense = {name: mask.cpu() for name, mask in M.ones(weights).items()}
    with sdpa_kernel(SDPBackend.MATH):  # as in a fit: fast kernels of attention have no second derivative
        masks = rule.next_masks(evidence, dense, 0.5)
    for name, mask in masks.items():
        assert int(mask.sum()) == M.survivors(mask.numel(), 0.5), name
