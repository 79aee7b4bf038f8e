"""The ticket: mask + rewind point + provenance, in one safetensors file."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from lottery_callbacks.foreign import plain
from lottery_callbacks.functional import masks as M
from lottery_callbacks.messages import describe
from lottery_callbacks.names import canonical, named_parameters
from lottery_callbacks.rewinding import RewindPoint, check_same_architecture

FORMAT = "lottery-ticket/1"


@dataclass(frozen=True)
class Ticket:
    """Which weights live, and from what state to train them.

    Attributes:
        masks: boolean tensors by parameter name, True = kept; parameters without a mask are dense.
        rewind: the state that training starts from.
        provenance: how it was found, as JSON primitives (level, rate, score, scope, seed, parent, versions).
    """

    masks: M.Masks
    rewind: RewindPoint
    provenance: dict[str, Any] = field(default_factory=dict)

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
        check_same_architecture({name: mask.shape for name, mask in self.masks.items()}, masked)

    def apply_(self, module: nn.Module) -> nn.Module:
        """Overwrite `module` in place with the sparse network at the rewind point, and return it.

        Works on the LightningModule that the ticket was found on and on any module of the same names, compiled or
        not; for the bare network inside it, see `for_submodule`. Values take the module's dtype, as `load_snapshot`
        says.

        Raises:
            ValueError: another architecture.
        """
        self.check(module)
        parameters = named_parameters(module)
        self.rewind.load_(module)
        for name, mask in self.masks.items():
            M.zero_pruned_(parameters[name], M.as_bits(mask, parameters[name]))
        return module

    def for_submodule(self, name: str) -> "Ticket":
        """The same ticket under the names of submodule `name`: `ticket.for_submodule("network").apply_(net)`.

        The optimizer's state stays behind, since it belongs to the whole module.
        """
        prefix = canonical(name) + "."

        def inside(tensors: dict[str, Any]) -> dict[str, Any]:
            return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

        if not inside(self.masks):
            raise ValueError(f"no mask below {name!r}: the ticket has {describe(list(self.masks))}")
        return replace(self, masks=inside(self.masks), rewind=self.rewind.renamed(inside))

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
        """
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
        """Write atomically; equal tickets give equal bytes."""
        tensors = {f"mask/{name}": mask.cpu() for name, mask in self.masks.items()}
        tensors |= {f"rewind/{name}": tensor for name, tensor in self.rewind.tensors.items()}
        training = _take_tensors(self.rewind.training, "training", tensors)
        header = {
            "format": FORMAT,
            "step": self.rewind.step,
            "density": self.density,
            "provenance": self.provenance,
            "training": training,
        }
        # One metadata entry: safetensors does not keep the order of several.
        data = safetensors.torch.save(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            metadata={"ticket": json.dumps(header, sort_keys=True)},
        )
        return write_atomically(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Ticket":
        """Read a ticket; nothing in the file is executed.

        Raises:
            ValueError: the file is missing, torn, or no ticket.
        """
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {}).get("ticket", "")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is missing or torn ({error}): restore it, or find the ticket again") from error
        try:
            header = json.loads(text)
            if header["format"] != FORMAT:
                raise ValueError(header["format"])
            training = _give_tensors(header["training"], tensors)
            step, provenance = header["step"], header["provenance"]
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise ValueError(
                f"{path} is no ticket of format {FORMAT}: give a file of a run's tickets/ folder"
            ) from error
        return cls(
            masks={key.removeprefix("mask/"): t for key, t in tensors.items() if key.startswith("mask/")},
            rewind=RewindPoint(
                step=step,
                tensors={key.removeprefix("rewind/"): t for key, t in tensors.items() if key.startswith("rewind/")},
                training=training,
            ),
            provenance=provenance,
        )


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write so that a reader, and a killed writer, see the old file or the new one and never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Each name with the first name of the same memory: its own where it is not tied."""
    first: dict[Any, str] = {}
    places = {n: (t.data_ptr(), t.shape, t.dtype, t.device) if t.numel() else n for n, t in tensors.items()}
    return {name: first.setdefault(place, name) for name, place in places.items()}


def _take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved into `tensors`; dicts become pair lists, since keys may be integers."""
    if isinstance(value, Tensor):
        name = f"training/{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[key, _take_tensors(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_take_tensors(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"the state at {path} is a {type(value).__name__}, and a ticket holds tensors and primitives only; "
        "rewind to '0it', or make that optimizer's or scheduler's state primitive"
    )


def _give_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content]
    if kind in ("dict", "counter"):
        given = {key: _give_tensors(item, tensors) for key, item in content}
        return Counter(given) if kind == "counter" else given
    items = [_give_tensors(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
