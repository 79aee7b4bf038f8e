"""The script that asks whether two finished runs are connected."""

import importlib
import json
from pathlib import Path

import torch

from lottery_lightning.data import Digits
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier

SCRIPTS = Path(__file__).parents[2] / "scripts"
OPTIONS = """
run_dir: {folder}/run
lines: {{points: 5}}
model:
  class_path: ImageClassifier
  init_args: {{network: {{class_path: Dense, init_args: {{widths: [64, 20, 10]}}}}}}
data: {{class_path: Digits}}
"""


def test_a_permuted_network_has_a_barrier_that_matching_takes_away(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    (tmp_path / "options.yaml").write_text(OPTIONS.format(folder=tmp_path))
    torch.manual_seed(0)
    module, order, data = ImageClassifier(Dense([64, 20, 10])), torch.randperm(20), Digits()
    data.setup("fit")
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for batch in [*data.train_dataloader()] * 3:
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    state = module.state_dict()
    moved = dict(state) | {
        "network.hidden.0.weight": state["network.hidden.0.weight"][order],
        "network.hidden.0.bias": state["network.hidden.0.bias"][order],
        "network.output.weight": state["network.output.weight"][:, order],
    }
    (tmp_path / "one").mkdir()
    torch.save({"state_dict": state}, tmp_path / "one" / "final.ckpt")
    torch.save({"state_dict": moved}, tmp_path / "two.ckpt")
    figure = tmp_path / "barrier.png"
    runs = [str(tmp_path / "one"), str(tmp_path / "two.ckpt")]
    barrier = importlib.import_module("barrier")
    assert barrier.main(["--config", str(tmp_path / "options.yaml"), *runs, "--out", str(figure)]) == 0
    plain, matched, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["points"] == 5
    assert found["matched"] == {"barrier": 0.0, "instability": 0.0}
    assert found["plain"]["instability"] > 0.01
    assert plain.startswith("plain")
    assert matched.startswith("matched  loss barrier 0.0000, instability 0.00 points")
    assert figure.read_bytes()[:4] == b"\x89PNG"
