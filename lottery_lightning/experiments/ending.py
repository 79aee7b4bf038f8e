"""How every experiment ends: results.json, a table, the files' names, one sentence of finding, one line of JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lottery_lightning.experiments.store import write_json


def conclude(
    summary: Mapping[str, Any],
    table: Table,
    files: str,
    sentence: str,
    width: int = 120,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write `summary` and what `more` there is to results.json in its `run_dir`, and print the rest.

    Args:
        summary: the last line; its `run_dir` is the folder.
        table: what was found, for people.
        files: what else was written.
        sentence: the finding.
        width: of the table at least: a wrapped row loses no digits, a cropped one does.
        more: kept in the file alone.
    """
    write_json(Path(summary["run_dir"]) / "results.json", {**summary, **(more or {})})
    console = Console()
    console.width = max(console.width, width)
    console.print(table)
    print(f"\n{files}")
    print(sentence)
    print(json.dumps(summary))
