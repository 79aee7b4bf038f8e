"""What an experiment keeps in its `run_dir`: whose folder it is, who works in it, which runs are done."""

import csv
import fcntl
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lottery_callbacks.ticket import write_atomically


def claim(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Make `run_dir` the folder of the experiment `config`; in the folder of an equal one, go on there.

    `run_dir/config.yaml` is the experiment's identity, its own `run_dir` apart (finished folders may be moved).

    Raises:
        ValueError: the folder belongs to another experiment; one line names the first key that differs.
    """
    path = run_dir / "config.yaml"
    kept = ("tickets/*.safetensors", "resume/*", "result.json", "points.jsonl")
    begun = [run_dir.rglob(pattern) for pattern in kept]
    if not any(map(any, begun)) and not any(map(_held, run_dir.rglob(".lock"))):  # nothing that this could spoil
        write_atomically(path, yaml.safe_dump(dict(config), sort_keys=False).encode())
        return
    old, new = _flat(yaml.safe_load(path.read_text()) or {}), _flat(yaml.safe_load(yaml.safe_dump(dict(config))))
    for key in [*new, *old]:
        if key.split(".")[-1] != "run_dir" and old.get(key) != new.get(key):
            raise ValueError(
                f"{run_dir} holds another experiment: {key} is {old.get(key)!r} there and {new.get(key)!r} now; "
                "choose another run_dir, or remove that one"
            )


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    nested = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items())
    return {key: value for part in nested for key, value in part.items()}


def _held(lock: Path) -> bool:
    """Whether a living process works in the folder of this lock."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def share_trials(folders: Sequence[Path], do: Callable[[int], None], tell: Callable[[str], None]) -> None:
    """Do each trial in its folder; one that another process works on is left to it, and told."""
    for trial, folder in enumerate(folders):
        with working_on(folder) as mine:
            if mine:
                do(trial)
            else:
                tell(f"trial {trial} is left to the process that works on it")


@contextmanager
def working_on(folder: Path) -> Iterator[bool]:
    """Whether this process may work in `folder`: False while another one does (freed when that one dies)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value, or None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """A table of these columns, by default those of the first row, whole or not at all."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns or list(rows[0]), extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, text.getvalue().encode())


class PointFile:
    """Lists of numbers, written as they are found, one a line; a last line that was torn is forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[list[float]]:
        """The whole lines; the file holds these alone afterwards."""
        if not self.path.exists():
            return []
        whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_atomically(self.path, "".join(whole).encode())
        return [json.loads(line) for line in whole]

    def append(self, numbers: Sequence[float]) -> None:
        """One more line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(list(numbers)) + "\n")
