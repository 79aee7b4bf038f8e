"""Strategies that spawn or fork their processes: what the callbacks found is there when `fit` returns."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from stranger import Blobs, Net, bits, quiet, seeded

from lottery_callbacks import (
    EdgePopup,
    GradualPruning,
    HeavyTailedNoise,
    IterativeMagnitudePruning,
    LinearModeConnectivity,
    SparsityMonitor,
    TailIndexMonitor,
    Ticket,
    ValidationCurve,
)
from lottery_callbacks.functional.masks import digest, kept

pytestmark = pytest.mark.slow  # each process imports torch and lightning again

STRATEGIES = ("ddp_spawn", "ddp_fork")  # of level 0 and level 1


def fit(folder, module, callbacks, strategy, checkpoint=None):
    trainer = quiet(
        folder, callbacks, strategy=strategy, devices=2, max_steps=8, val_check_interval=4, check_val_every_n_epoch=None
    )
    trainer.fit(module, Blobs(batch_size=6), ckpt_path=checkpoint)


def main(folder):
    torch.set_num_threads(1)
    imp, module = IterativeMagnitudePruning(rate=0.3, rewind="2it", run_dir=folder), Net()
    curve, density, tails = ValidationCurve(metrics=()), SparsityMonitor(), TailIndexMonitor(None, batches=0)
    lines, levels = LinearModeConnectivity(points=3, network="net"), []
    for level, strategy in zip(imp.levels(1), STRATEGIES, strict=True):
        L.seed_everything(level.number, verbose=False)
        fit(level.run_dir, module, [imp, curve, density, tails, lines], strategy, level.checkpoint)
        levels.append(
            {
                "next": imp.level,
                "ticket": digest(imp.ticket.masks),
                "kept": kept(imp.fit_masks),
                "zeros": {name: int((module.get_parameter(name) != 0).sum()) for name in imp.fit_masks},
                "rows": [row["iteration"] for row in curve.rows],
                "densities": density.densities,
                "tails": len(tails.estimates),
                "lines": list(lines.results),
            }
        )
    gradual, popup, noise = GradualPruning(0.8, begin="2it"), EdgePopup(), HeavyTailedNoise(1.8, 1e-3)
    for callback in (gradual, popup, noise):
        fit(folder, module := Net(), [callback], "ddp_fork")
        if callback is gradual:
            made = gradual.ticket(module).masks
    found = {
        "levels": levels,
        "gradual": kept(made),
        "popup": [digest(popup.masks), digest(popup.ticket.masks), sorted(popup.scores) == sorted(popup.fixed)],
        "noise": noise.layers,
    }
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spawned")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "found.json").read_text())


def test_a_lottery_and_its_monitors_are_as_in_one_process(run):
    folder, found = run
    tickets = [Ticket.load(folder / "tickets" / f"level_{level:02d}.safetensors") for level in range(3)]
    for level, ticket in zip(found["levels"], tickets, strict=False):
        assert level["next"] == ticket.level + 1
        assert level["ticket"] == digest(tickets[ticket.level + 1].masks)
        assert level["kept"] == level["zeros"] == kept(ticket.masks)
        assert level["rows"] == [4, 8]
        assert level["densities"] == {n: count / ticket.masks[n].numel() for n, count in level["kept"].items()}
        assert level["tails"] == 4
    assert [level["lines"] for level in found["levels"]] == [[], ["previous"]]


def test_masks_and_tickets_found_within_a_fit_come_back(run):
    _, found = run
    assert sum(found["gradual"].values()) == 26  # of 72 + 60
    assert found["popup"][0] == found["popup"][1]
    assert found["popup"][2]
    assert found["noise"] == ["net.1.weight"]


def test_a_copy_in_one_process_is_another_callback(tmp_path):
    """Of two that look the same, the one that was given to the Trainer gets what was found."""
    first = GradualPruning(0.5)
    second, third = copy.deepcopy(first), pickle.loads(pickle.dumps(first))
    assert len({first._identity, second._identity, third._identity}) == 3
    fits = [(bits(module := seeded(0, Net)), callback, module) for callback in (first, second, third)]
    for _, callback, module in fits:
        quiet(tmp_path, [callback]).fit(module, Blobs())
    assert digest(first.fit_masks) == digest(second.fit_masks) == digest(third.fit_masks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
