"""Two real processes: the masks and weights of both ranks agree, and one of them writes.

Lightning starts the second rank by running this file again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
from stranger import Blobs, Net, bits

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, Ticket
from lottery_callbacks.functional.masks import digest

STEPS = 14  # of 5 an epoch and rank


class Seen(L.Callback):
    """The labels that this rank trains on."""

    def __init__(self):
        self.labels = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.labels.append(batch[1].tolist())


def fit(folder, module, callback, level, checkpoint=None):
    seen = Seen()
    trainer = L.Trainer(
        strategy="ddp", accelerator="cpu", devices=2, max_steps=STEPS, callbacks=[callback, seen], logger=False,
        default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    L.seed_everything(100 + level + 7 * trainer.global_rank, verbose=False)  # dropout differs between the ranks
    trainer.fit(module, Blobs(batch_size=6), ckpt_path=checkpoint)
    return {
        "level": level,
        "mask": digest(callback.fit_masks),
        "next": digest(callback.masks),
        "weights": bits(dict(module.named_parameters())),
        "zeros": {name: int((module.get_parameter(name) == 0).sum()) for name in callback.fit_masks},
        "labels": seen.labels,
    }


def main(folder):
    torch.set_num_threads(1)
    written = []
    sys.addaudithook(lambda event, args: written.append(Path(args[1]).name) if event == "os.rename" else None)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.manual_seed(rank)  # the ranks begin apart; DDP broadcasts rank 0's weights
    module = Net()
    imp = IterativeMagnitudePruning(rate=0.3, rewind="4it", run_dir=folder)
    levels = [fit(folder, module, imp, level.number, level.checkpoint) for level in imp.levels(2)]
    alone = fit(folder, Net(), ApplyTicket(imp.ticket_path(2)), 2)
    record = {"levels": levels, "alone": alone, "written": [name for name in written if name.endswith("safetensors")]}
    (folder / f"rank_{rank}.json").write_text(json.dumps(record))


def test_two_ranks_agree_on_every_mask_and_weight_and_write_each_ticket_once(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    for mine, other in zip([*first["levels"], first["alone"]], [*second["levels"], second["alone"]], strict=True):
        shards = mine.pop("labels"), other.pop("labels")
        assert shards[0] != shards[1]
        assert mine == other
    tickets = [Ticket.load(tmp_path / "tickets" / f"level_{level:02d}.safetensors") for level in range(4)]
    for level, result in enumerate(first["levels"]):
        assert result["mask"] == digest(tickets[level].masks)
        assert result["next"] == digest(tickets[level + 1].masks)
        assert result["zeros"] == {name: int((~mask).sum()) for name, mask in tickets[level].masks.items()}
    assert len({result["mask"] for result in first["levels"]}) == 3
    assert tickets[0].rewind.step == 4
    assert first["alone"]["weights"] == first["levels"][2]["weights"]
    assert first["written"] == [f"level_{level:02d}.safetensors" for level in range(4)]
    assert second["written"] == []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
