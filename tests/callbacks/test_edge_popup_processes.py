"""Edge-popup in real processes: two ranks search one mask, and a search that is killed ends in the same ticket.

Lightning starts the second rank by running this file again; both do everything in `main`, and the tests read it.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stranger import Blobs, Interrupted, Net, StopAt, bits, quiet, seeded
from torch import nn

from lottery_callbacks import EdgePopup
from lottery_callbacks.functional.masks import digest, kept

STEPS, CUT, SAVED = 14, 9, 7


class Smooth(Net):
    """Without dropout and batch norm, whose draws and statistics are each rank's own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))


class Seen(L.Callback):
    def __init__(self, popup, save):
        self.popup, self.save, self.rows = popup, save, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = bits({name: pl_module.get_parameter(name) for name in self.popup.masks})
        self.rows.append([digest(self.popup.masks), weights, bits(self.popup.scores)])
        if self.save and trainer.global_step == SAVED:
            trainer.save_checkpoint(self.save)


class Parts:
    """Batches of 12, of which each rank has its part; Lightning shards DataLoaders alone."""

    def __init__(self, rank, world):
        data = Blobs()
        data.setup("fit")
        parts = [split.split(12) for split in data.splits["train"]]
        self.batches = [(images[rank::world], labels[rank::world]) for images, labels in zip(*parts, strict=True)]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def search(folder, module, data=None, save=None, stop=(), checkpoint=None, seed=100, world=2, path=None, **arguments):
    popup = EdgePopup(0.6, seed=4, path=path, **arguments)
    seen = Seen(popup, save)
    ranks = {"strategy": "ddp", "devices": 2} if world == 2 else {}
    trainer = quiet(folder, [popup, seen, *stop], max_steps=STEPS, limit_val_batches=0, **ranks)
    L.seed_everything(seed + 7 * trainer.global_rank, verbose=False)  # dropout differs between the ranks
    data = data(trainer.global_rank, world) if data else Blobs(batch_size=6)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return popup, seen.rows


def main(folder):
    rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.manual_seed(rank)  # the ranks begin apart; DDP broadcasts rank 0's weights
    found = {}
    for scope in ("layerwise", "global", "threshold"):
        popup, rows = search(folder, Smooth(), Parts, scope=scope, path=folder / f"{scope}_{rank}.safetensors")
        torch.save(popup.scores, folder / f"{scope}_{rank}.pt")
        found[scope] = {"rows": rows, "kept": kept(popup.masks)}
    found["module"] = {"rows": search(folder, Smooth(), Parts, weights="module")[1]}
    checkpoint = folder / "saved.ckpt"
    found["whole"] = search(folder, Net(), save=checkpoint)[1]
    with pytest.raises(Interrupted):
        search(folder, Net(), stop=[StopAt(CUT)])
    found["resumed"] = search(folder, seeded(31, Net), checkpoint=checkpoint, seed=977)[1]
    (folder / f"rank_{rank}.json").write_text(json.dumps(found))


class Die(L.Callback):
    def on_before_zero_grad(self, trainer, *args):  # between the forward and the backward pass
        if trainer.global_step == 11:
            os.kill(os.getpid(), signal.SIGKILL)


def alone(folder, *callbacks):
    """One process, with a checkpoint at each step, from which it goes on if there is one."""
    popup = EdgePopup(0.6, end="12it", path=folder / "ticket.safetensors")
    last = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    begun = (folder / "last.ckpt").exists()
    module = seeded(os.getpid(), Net)  # whose norm layers are those of any initialisation
    options = {"max_steps": STEPS, "limit_val_batches": 0, "enable_checkpointing": True}
    trainer = quiet(folder, [popup, *callbacks, last], **options)
    L.seed_everything(977 if begun else 3, verbose=False)
    trainer.fit(module, Blobs(), ckpt_path="last" if begun else None)
    return bits(module)


def process(*arguments):
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "MASTER_PORT")}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder and what each of the two ranks recorded."""
    folder = tmp_path_factory.mktemp("popup")
    done = process(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, *(json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1))


@pytest.mark.parametrize("name", ["layerwise", "global", "threshold", "module"])
def test_ranks_agree_at_every_step(ranks, name):
    _, first, second = ranks
    assert first[name] == second[name]
    assert len(first[name]["rows"]) == STEPS
    assert len({row[0] for row in first[name]["rows"]}) > 1


@pytest.mark.parametrize("scope", ["layerwise", "global", "threshold"])
def test_two_processes_search_as_one_does(ranks, tmp_path, scope):
    folder, first, _ = ranks
    popup, _ = search(tmp_path, seeded(9, Smooth), Parts, world=1, scope=scope)
    scores = torch.load(folder / f"{scope}_0.pt", weights_only=True)
    for name, score in popup.scores.items():
        torch.testing.assert_close(scores[name], score, rtol=0, atol=1e-6)
    assert first[scope]["kept"] == kept(popup.masks)
    assert (folder / f"{scope}_0.safetensors").exists()
    assert not (folder / f"{scope}_1.safetensors").exists()  # rank 0 alone writes


def test_a_broken_off_search_of_two_processes_goes_on_to_the_same_bits(ranks):
    for found in ranks[1:]:
        assert found["resumed"] == found["whole"][SAVED:]


def test_a_killed_process_ends_in_the_ticket_and_weights_of_an_unbroken_one(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    killed = process(torn, "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert torch.load(torn / "last.ckpt", weights_only=True)["global_step"] == 11
    assert alone(torn) == alone(whole)
    assert (whole / "ticket.safetensors").read_bytes() == (torn / "ticket.safetensors").read_bytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else alone(Path(sys.argv[1]), Die())
