"""Scripts around edge-popup: one figure from three experiments' tables, and the benchmark of a step."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOTTERY = (
    "trial,level,arm,kept,test_acc_end\n0,0,ticket,100,0.9\n1,0,ticket,100,0.8\n0,1,ticket,50,0.7\n0,1,reinit,50,0.1\n"
)
POPUP = (
    "network,weights,sparsity,kept,test_acc_end\ndense,trained,0.0,100,0.9\n"
    "Dense,signed_constant,0.5,50,0.6\nDense,signed_constant,0.5,50,0.4\nwide,signed_constant,0.5,80,0.5\n"
)
STRONG = (
    'question,size,kept,accuracy\n"n = 21, k = 2",2,300,0.9\n"n = 21, k = 3",3,400,0.9\n"n = 21, any size",,900,0.9\n'
)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("compare_tickets")


def test_series_points_and_the_dense_network_s_weights(script, tmp_path, monkeypatch, capsys):
    drawn = {}
    monkeypatch.setattr(script, "comparison_figure", lambda *given: drawn.update(given=given) or b"png")
    for name, text in (("lottery", LOTTERY), ("popup", POPUP), ("strong", STRONG)):
        (tmp_path / name).write_text(text)
    out = tmp_path / "tickets.png"
    options = {"--lottery": "lottery", "--edge-popup": "popup", "--strong-ticket": "strong"}
    script.main([str(out), *(str(word) for key, name in options.items() for word in (key, tmp_path / name))])
    assert drawn["given"] == (
        {
            "trained, dense": [(100, [0.9, 0.8])],
            "trained, winning ticket (magnitude pruning)": [(50, [0.7])],
            "never trained, edge-popup, signed constant, Dense": [(50, [0.6, 0.4])],
            "never trained, edge-popup, signed constant, wide": [(80, [0.5])],
            "never trained, subset sum, k products, n = 21": [(300, [0.9]), (400, [0.9])],
            "never trained, subset sum, any size, n = 21": [(900, [0.9])],
        },
        100,
        "LeNet-300-100, MNIST",
    )
    assert out.read_bytes() == b"png"
    assert "never trained, subset sum, k products, n = 21: 2 points" in capsys.readouterr().out


def test_the_committed_tables_are_drawn(script, tmp_path):
    out, results = tmp_path / "tickets.png", ROOT / "results"
    tables = [
        "--lottery",
        results / "lth/lenet_mnist_small.csv",
        "--strong-ticket",
        results / "strong_tickets/lenet_mnist.csv",
    ]
    script.main([str(out), *map(str, tables)])
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert out.stat().st_size > 20_000


def test_a_benchmark_of_two_steps_says_what_it_should(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench = importlib.import_module("bench_edge_popup")
    assert bench.main(["--networks", "lenet", "--steps", "2", "--rounds", "1"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["lenet.scores"] == 266_200
    assert found["lenet.edge_popup_over_dense"] > 0
