"""Lets the tests of this folder import `stranger`, under any import mode of pytest."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    for message in ("does not have many workers", "exists and is not empty", "The number of training batches"):
        config.addinivalue_line("filterwarnings", f"ignore:.*{message}")
