"""The ticket: mask + rewind point + provenance, in one safetensors file."""

import json
import os
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from lottery_callbacks.functional import masks as M
from lottery_callbacks.messages import describe
from lottery_callbacks.rewinding import RewindPoint, check_same_architecture, load_snapshot

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
        masked = {name: p.shape for name, p in module.named_parameters() if name in self.masks}
        check_same_architecture({name: mask.shape for name, mask in self.masks.items()}, masked)

    def apply_(self, module: nn.Module) -> nn.Module:
        """Overwrite `module` in place with the sparse network at the rewind point, and return it.

        Works on the LightningModule that the ticket was found on and on any module of the same names; for the
        bare network inside it, see `for_submodule`.

        Raises:
            ValueError: another architecture.
        """
        self.check(module)
        parameters = dict(module.named_parameters())
        load_snapshot(module, self.rewind.tensors)
        for name, mask in self.masks.items():
            M.zero_pruned_(parameters[name], M.as_bits(mask, parameters[name]))
        return module

    def for_submodule(self, name: str) -> "Ticket":
        """The same ticket under the names of submodule `name`: `ticket.for_submodule("network").apply_(net)`.

        The optimizer's state stays behind, since it belongs to the whole module.
        """
        prefix = name + "."

        def inside(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

        if not inside(self.masks):
            raise ValueError(f"no mask below {name!r}: the ticket has {describe(list(self.masks))}")
        return replace(
            self, masks=inside(self.masks), rewind=RewindPoint(self.rewind.step, inside(self.rewind.tensors))
        )

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
