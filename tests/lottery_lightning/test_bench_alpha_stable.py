"""The benchmark of alpha-stable noise runs on a few numbers and steps, and says what it should; nothing is timed."""

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_alpha_stable")


def test_it_measures_every_variant_in_every_section(bench, capsys):
    pytest.importorskip("scipy")
    assert bench.main(["--rounds", "2", "--count", "2000", "--steps", "2", "--alpha", "1.9"]) == 0
    *lines, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["alpha"] == 1.9
    for section, first, others, ratio in (
        ("draws", "scipy", ("formula", "table", "rotation"), "speedup"),
        ("steps", "plain", ("neuron", "weight", "rotation"), "over_plain"),
    ):
        assert found[f"{section}.{first}"] > 0
        for name in others:
            low, high = found[f"{section}.{name}_{ratio}_range"]
            assert 0 < low <= found[f"{section}.{name}_{ratio}"] <= high
    assert sum(" ns a number " in line for line in lines) == sum(" us a step " in line for line in lines) == 4


def test_sections_are_chosen(bench, capsys):
    assert bench.main(["--rounds", "1", "--sections", "steps", "--steps", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {key.split(".")[0] for key in found} == {"device", "rounds", "alpha", "steps"}
    with pytest.raises(SystemExit):
        bench.main(["--sections", "speed"])
    assert "speed: choose of draws, steps" in capsys.readouterr().err
