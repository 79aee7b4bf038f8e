"""Heavy-tailed noise in real processes: two ranks draw the same, and a fit that is killed ends in the same bits.

Lightning starts the second rank by running this file again; both do everything in `ranks`, and the test reads it.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stranger import Blobs, Net, bits, quiet, seeded, ticket_of

from lottery_callbacks import ApplyTicket
from lottery_callbacks.heavy_tailed_noise import HeavyTailedNoise

STEPS, KILLED = 14, 11


class Die(L.Callback):
    def on_before_zero_grad(self, trainer, *args):  # between the forward and the backward pass
        if trainer.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder, *callbacks, seed=3, checkpoint=None, **options):
    """A ticket with noise on a module, whose initialisation the ticket overwrites."""
    ticket = ticket_of(seeded(1, Net))
    module = seeded(seed, Net)
    noise = HeavyTailedNoise(1.7, 0.01, "rotation", include=["net.5.weight"])
    trainer = quiet(folder, [noise, ApplyTicket(ticket), *callbacks], max_steps=STEPS, limit_val_batches=0, **options)
    L.seed_everything(seed, verbose=False)
    trainer.fit(module, Blobs(batch_size=6), ckpt_path=checkpoint)
    return bits(dict(module.named_parameters())), {
        name: [stream["begin"].tolist(), stream["used"]]
        for name, streams in noise.state_dict()["streams"].items()
        for stream in streams
    }


def ranks(folder):
    rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.manual_seed(rank)
    found = fit(folder, seed=100 + rank, strategy="ddp", devices=2)  # dropout and data differ between the ranks
    (folder / f"rank_{rank}.json").write_text(json.dumps(found))


def alone(folder, *callbacks):
    """One process with a checkpoint at each step, from which it goes on if there is one."""
    begun = (folder / "last.ckpt").exists()
    last = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    return fit(
        folder,
        *callbacks,
        last,
        seed=977 if begun else 3,
        checkpoint="last" if begun else None,
        enable_checkpointing=True,
    )


def process(*arguments):
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "MASTER_PORT")}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_two_ranks_add_the_same_noise(tmp_path):
    done = process("ranks", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (weights, streams), other = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert [weights, streams] == other
    assert {used for _, used in streams.values()} == {STEPS}


def test_a_fit_that_is_killed_ends_in_the_bits_of_an_unbroken_one(tmp_path):
    assert process("killed", tmp_path).returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == KILLED
    whole = tmp_path / "whole"
    assert alone(tmp_path) == fit(whole, seed=3)


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in the tests' own process: another number may round elsewhere
    job, folder = sys.argv[1], Path(sys.argv[2])
    ranks(folder) if job == "ranks" else alone(folder, Die())
