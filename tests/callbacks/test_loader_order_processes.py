"""Ordinary shuffled DataLoaders in real processes: a fit that is killed, and two ranks that are resumed.

The killed fit, and with DDP the second rank, run this file as a program.
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
import torch.distributed
from lightning.pytorch.callbacks import ModelCheckpoint
from ordinary_loaders import LOADERS, Module, Points, fit
from stranger import Interrupted, StopAt, bits, quiet

from lottery_callbacks import IterativeMagnitudePruning, newest_checkpoint


class Kill(L.Callback):
    """Ends the process at once, as `kill -9` does."""

    def __init__(self, step, hook):
        setattr(self, hook, lambda trainer, *_: self.end(trainer.global_step >= step))

    def end(self, due):
        if due:
            os.kill(os.getpid(), signal.SIGKILL)


def start(*arguments):
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "MASTER_PORT")}
    return subprocess.run([sys.executable, __file__, *map(str, arguments)], env=environment, check=False, timeout=240)


@pytest.mark.parametrize("loader", ["shuffled", pytest.param("workers", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("keeper", "step", "hook"),
    [
        ("resume, each 3", 13, "on_train_batch_start"),
        ("resume, each epoch", 16, "on_train_epoch_end"),
        ("model, with validations", 12, "on_validation_batch_start"),
    ],
)
def test_a_killed_fit_ends_in_the_bits_of_an_unbroken_one(tmp_path, loader, keeper, step, hook):
    whole, _ = fit(tmp_path / "whole", loader, keeper)
    assert start("kill", tmp_path / "torn", loader, keeper, step, hook).returncode == -signal.SIGKILL
    resumed, _ = fit(tmp_path / "torn", loader, keeper, seed=123)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert 0 < len(resumed.seen) < len(whole.seen)
    assert bits(resumed) == bits(whole)


def level(folder, run_dir, number, *callbacks, seed=0):
    """One level of a lottery whose rewind point lies inside an epoch, on two ranks with a part of the data each."""
    imp = IterativeMagnitudePruning(rewind="3it", run_dir=run_dir)
    imp.select(number)
    if number and os.environ.get("LOCAL_RANK", "0") == "0":
        imp.ticket_path(2).unlink(missing_ok=True)  # of the fit before: a finished level is refused
    keeper = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)
    trainer = quiet(
        folder, [imp, *callbacks, keeper], max_epochs=4, strategy="ddp", devices=2, enable_checkpointing=True
    )
    L.seed_everything(seed, verbose=False)  # also the seed of the DistributedSampler
    torch.manual_seed(seed + 7 * trainer.global_rank)  # dropout differs between the ranks
    module = Module()
    trainer.fit(module, LOADERS["workers"](Points()), ckpt_path=newest_checkpoint(folder))
    torch.distributed.barrier()  # rank 0 has written the ticket
    return {"seen": module.seen, "bits": bits(module)}


def ranks(folder):
    found = {name: level(folder / name, folder, number) for number, name in enumerate(("level_00", "whole"))}
    with pytest.raises(Interrupted):
        level(folder / "torn", folder, 1, StopAt(8))
    found["resumed"] = level(folder / "torn", folder, 1, seed=55)
    rank = os.environ.get("LOCAL_RANK", "0")
    (folder / f"rank_{rank}.json").write_text(json.dumps(found))


def test_two_ranks_go_on_with_their_own_parts_of_the_epoch(tmp_path):
    assert start("ranks", tmp_path).returncode == 0
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    for rank in (first, second):
        dense, whole, resumed = (rank[name]["seen"] for name in ("level_00", "whole", "resumed"))
        assert whole == dense[3:]  # the order of a DistributedSampler is a function of its seed and the epoch
        assert resumed == dense[6:]
        assert rank["resumed"]["bits"] == rank["whole"]["bits"] == first["whole"]["bits"]
    epoch = [
        index for rank in (first, second) for at, _, batch in rank["level_00"]["seen"] if at == 0 for index in batch
    ]
    assert sorted(epoch) == list(range(40))


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        _, _, where, loader_name, keeper_name, at_step, at_hook = sys.argv
        fit(Path(where), loader_name, keeper_name, Kill(int(at_step), at_hook))
    else:
        ranks(Path(sys.argv[2]))
