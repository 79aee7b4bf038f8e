"""The ticket: mask + rewind point + provenance, in one safetensors file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lottery_callbacks.foreign import plain
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.prefixes import below, differing_prefixes
from lottery_callbacks.messages import describe
from lottery_callbacks.names import canonical, computed_from, named_buffers, named_parameters
from lottery_callbacks.rewinding import RewindPoint, check_same_architecture
from lottery_callbacks.ticket_file import FORMAT, read_ticket, write_atomically, write_ticket

__all__ = ["FORMAT", "Ticket", "write_atomically"]


@dataclass(frozen=True)
class Ticket:
    """Which weights live, and from what state to train them.

    Attributes:
        masks: boolean tensors by parameter name, True = kept; parameters without a mask are dense. Masks of another
            dtype, and arrays, are taken where they hold 0 and 1 alone.
        rewind: the state that training starts from; one without tensors where the masks are all that is known.
        provenance: how it was found, as JSON primitives (level, rate, score, scope, seed, parent, versions).

    Raises:
        ValueError: names a mask that holds other values than 0 and 1, or that fits no tensor of the rewind point.
    """

    masks: M.Masks
    rewind: RewindPoint
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        masks = {name: M.boolean(name, mask) for name, mask in self.masks.items()}
        object.__setattr__(self, "masks", masks)
        for name, mask in masks.items() if self.rewind.tensors else ():
            tensor = self.rewind.tensors.get(name)
            if tensor is None:
                raise ValueError(
                    f"the rewind point has no tensor {name}, of which there is a mask: it has "
                    f"{describe(list(self.rewind.tensors))}; name masks and tensors as the plain network does"
                )
            if tensor.shape != mask.shape:
                shapes = tuple(mask.shape), tuple(tensor.shape)
                raise ValueError(f"the mask of {name} is {shapes[0]}, and its tensor in the rewind point {shapes[1]}")

    def __repr__(self) -> str:
        kept, size = sum(M.kept(self.masks).values()), sum(mask.numel() for mask in self.masks.values())
        return (
            f"Ticket(level {self.level}, density {self.density:.4g}, kept {kept:,} of {size:,} weights, masks "
            f"{len(self.masks)}, {self.rewind!r})"
        )

    @property
    def level(self) -> int:
        """0 for the dense network, one more per pruning."""
        return int(self.provenance.get("level", 0))

    @property
    def density(self) -> float:
        """Fraction of prunable weights kept."""
        return M.density(self.masks)

    def check(self, module: nn.Module) -> None:
        """Raise ValueError, in one line, where `module` is not the architecture of the ticket."""
        masked = {name: p.shape for name, p in named_parameters(module).items() if name in self.masks}
        try:
            check_same_architecture({name: mask.shape for name, mask in self.masks.items()}, masked)
        except ValueError as error:
            raise ValueError(self._of_other_names(module) or str(error)) from None

    def apply_(self, module: nn.Module) -> nn.Module:
        """Overwrite `module` in place with the sparse network at the rewind point, and return it.

        Works on the LightningModule that the ticket was found on and on any module of the same names, also where it
        is compiled or wrapped (see `names`); for the bare network inside it, see `for_submodule`. Values take the
        module's dtype, as `load_snapshot` says.

        Raises:
            ValueError: another architecture, or a ticket of masks alone.
        """
        self.check(module)
        self._require_tensors()
        parameters = named_parameters(module)
        try:
            self.rewind.load_(module)
        except ValueError as error:
            raise ValueError(self._of_other_names(module) or str(error)) from None
        for name, mask in self.masks.items():
            M.zero_pruned_(parameters[name], M.as_bits(mask, parameters[name]))
        return module

    def _require_tensors(self) -> None:
        if self.masks and not self.rewind.tensors:
            raise ValueError("the ticket holds masks alone: give it a rewind point with tensors, RewindPoint(0, state)")

    def _of_other_names(self, module: nn.Module) -> str:
        """What to say where the ticket fits `module` under other names; empty where it does not."""
        parameters = {name: p.shape for name, p in named_parameters(module).items()}
        for plain_names, parametrized, where in (
            (self.masks, parameters, "network"),
            (parameters, self.masks, "ticket"),
        ):
            for name in parametrized:
                if name not in plain_names and computed_from(name) in plain_names:
                    return (
                        f"{computed_from(name)} is parametrised in the {where} alone, as {name}: apply a ticket "
                        "with the parametrizations that the network had when it was found"
                    )
        shapes = parameters | {name: b.shape for name, b in named_buffers(module).items()}
        tensors = {name: t.shape for name, t in (self.rewind.tensors or self.masks).items()}
        masks = {name: mask.shape for name, mask in self.masks.items()} or tensors
        if not (prefixes := differing_prefixes(masks, parameters if self.masks else shapes)):
            return ""
        inner, outer = prefixes
        if self.rewind.tensors and not below(outer, parameters).items() <= below(inner, tensors).items():
            return ""
        action = f"ticket.for_submodule({inner!r})" if inner else "ticket"
        if outer:
            whole = len(below(outer, shapes)) == len(shapes)
            action += f".as_submodule({outer!r})" if whole else f".apply_(module.{outer})"
        name = next(iter(masks))
        other = ".".join(filter(None, [outer, name.removeprefix(f"{inner}." if inner else "")]))
        return (
            f"the ticket is for this network under another prefix: {name} in the ticket is {other} in the network; "
            f"use {action}".replace("'", '"')
        )

    def for_submodule(self, name: str) -> "Ticket":
        """The same ticket under the names of submodule `name`: `ticket.for_submodule("network").apply_(net)`.

        The optimizer's state stays behind, since it belongs to the whole module.
        """
        prefix = canonical(name) + "."

        def inside(tensors: dict[str, Any]) -> dict[str, Any]:
            return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

        masks, tensors = inside(self.masks), inside(self.rewind.tensors)
        if not (masks or (tensors and not self.masks)):
            raise ValueError(f"no mask below {name!r}: the ticket has {describe(list(self.masks)) or 'none'}")
        return replace(self, masks=masks, rewind=self.rewind.renamed(inside))

    def as_submodule(self, name: str) -> "Ticket":
        """The same ticket for a module that holds the network as its submodule `name`, all of whose tensors it is.

        The inverse of `for_submodule`: a ticket of a bare network trains inside a LightningModule.
        """
        prefix = canonical(name) + "."

        def outside(tensors: dict[str, Any]) -> dict[str, Any]:
            return {prefix + key: tensor for key, tensor in tensors.items()}

        return replace(self, masks=outside(self.masks), rewind=self.rewind.renamed(outside))

    def state_dict(self) -> dict[str, Tensor]:
        """The sparse network at the rewind point, mask * W_k, as a plain dense state dict: copies, pruned ones +0.0.

        ```python
        network.load_state_dict(ticket.for_submodule("network").state_dict())
        ```

        Loads with `strict=True` where the network ties no weights and has no extra state: a rewind point holds tied
        tensors once. For the others `apply_(network).state_dict()` has the right names.

        Raises:
            ValueError: a ticket of masks alone.
        """
        self._require_tensors()
        tensors = {name: tensor.clone() for name, tensor in self.rewind.tensors.items()}
        for name, mask in self.masks.items():
            M.zero_pruned_(tensors[name], M.as_bits(mask, tensors[name]))
        return tensors

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], provenance: dict[str, Any] | None = None) -> "Ticket":
        """The ticket of a network that `torch.nn.utils.prune` pruned, wrapped and compiled or not (see `plain`).

        Its rewind point is the state dict as it stands, at step 0, copied to the CPU; W_orig keeps its values under
        the mask, which a shuffled mask may bring back. Tensors that share their memory are tied: they are kept once,
        under their first name, whose mask then holds at every end. Without a provenance it is of level 1, so that a
        lottery goes on from it: save it as `IterativeMagnitudePruning.ticket_path(1)`.

        Raises:
            ValueError: no mask is in it, or `plain` cannot read it.
        """
        tensors, masks = plain(state_dict)
        if not masks:
            raise ValueError(
                "the state dict holds no *_orig and *_mask, and a mask is never read off zeros: "
                "give Ticket(masks, RewindPoint(0, tensors)) masks of your own"
            )
        first = _first_names(tensors)
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items() if first[name] == name}
        of_masks = {first[n]: m.cpu().clone() for n, m in masks.items() if first[n] == n or first[n] not in masks}
        return cls(of_masks, RewindPoint(0, copies), {"level": 1} if provenance is None else provenance)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write atomically; equal tickets give equal bytes.

        Raises:
            ValueError: names a tensor or an entry of the training state that a file cannot hold.
        """
        tensors = {f"mask/{name}": mask for name, mask in self.masks.items()}
        tensors |= {f"rewind/{name}": tensor for name, tensor in self.rewind.tensors.items()}
        header = {"step": self.rewind.step, "density": self.density, "provenance": self.provenance}
        return write_ticket(path, tensors, self.rewind.training, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Ticket":
        """Read a ticket; nothing in the file is executed.

        Raises:
            ValueError: the file is missing, torn, damaged (its checksum differs), or no ticket.
        """
        tensors, training, header = read_ticket(path)

        def below(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

        try:
            return cls(below("mask/"), RewindPoint(header["step"], below("rewind/"), training), header["provenance"])
        except ValueError as error:
            raise ValueError(f"{path} is no valid ticket: {error}") from error


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Each name with the first name of the same memory: its own where it is not tied."""
    first: dict[Any, str] = {}
    places = {n: (t.data_ptr(), t.shape, t.dtype, t.device) if t.numel() else n for n, t in tensors.items()}
    return {name: first.setdefault(place, name) for name, place in places.items()}
