"""The file of a ticket: safetensors, a JSON header and a checksum. `callbacks/README.md` describes the format."""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from lottery_callbacks.functional.tensor_bytes import checksum, require_storable, safetensors_bytes

FORMAT = "lottery-ticket/1"
Tensors = dict[str, Tensor]


def write_ticket(path: str | os.PathLike[str], tensors: Tensors, training: Any, header: dict[str, Any]) -> Path:
    """Write `tensors` by their names in the file, the tensors in `training` besides, and `header` with a checksum."""
    tensors = dict(tensors)
    header = {"format": FORMAT, "training": _take_tensors(training, "training", tensors)} | header
    try:
        header = json.loads(json.dumps(header))  # as it will be read: integer keys are strings, and sorted as such
    except TypeError as error:
        raise ValueError(f"the provenance is no JSON ({error}): give numbers, strings, lists and dicts") from error
    require_storable(tensors)
    header["checksum"] = checksum(tensors, _text(header))
    # One metadata entry: safetensors does not keep the order of several.
    return write_atomically(path, safetensors_bytes(tensors, {"ticket": _text(header)}))


def read_ticket(path: str | os.PathLike[str]) -> tuple[Tensors, Any, dict[str, Any]]:
    """What `write_ticket` wrote: tensors by their names (those of the training state included), training, header.

    Raises:
        ValueError: the file is missing, torn, damaged, or no ticket.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("ticket", "")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is {_state(path)} ({error}): restore it, or find the ticket again") from error
    try:
        header = json.loads(text)
        if header["format"] != FORMAT:
            raise ValueError(header["format"])
        written = header.pop("checksum", None)  # absent in files of older versions
        if written is not None and written != checksum(tensors, _text(header)):
            raise _Damaged
        training = _give_tensors(header["training"], tensors)
        header = {"step": header["step"], "provenance": header["provenance"]}
    except _Damaged:
        raise ValueError(
            f"{path} is damaged, its checksum differs: a bit flipped or the file was edited after it was written; "
            "restore it, or find the ticket again"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"{path} is no ticket of format {FORMAT}, or its header is damaged: give a file of a run's tickets/ folder"
        ) from error
    return tensors, training, header


class _Damaged(Exception):
    """The checksum differs."""


def _text(header: dict[str, Any]) -> str:
    return json.dumps(header, sort_keys=True)


def _state(path: str | os.PathLike[str]) -> str:
    """What to say of a file that safetensors cannot read: damaged, where it has its full length."""
    try:
        data = Path(path).read_bytes()
        length = 8 + int.from_bytes(data[:8], "little")
        if len(data) < max(8, length):
            return "missing or torn"
        header = json.loads(data[8:length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return "missing or torn" if len(data) < length + max(ends, default=0) else "damaged"
    except OSError:
        return "missing or torn"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):  # of full length, but its index is unreadable
        return "damaged"


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
