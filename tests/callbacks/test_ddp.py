"""Two real processes: the masks and weights of both ranks agree, and one of them writes.

Lightning starts the second rank by running this file again; both do everything in `main`, and the tests read it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from stranger import Blobs, Interrupted, Net, StopAt, bits, half_masks, seeded, ticket_of

from lottery_callbacks import ApplyTicket, IterativeMagnitudePruning, Pruning, Ticket
from lottery_callbacks.functional.masks import digest, kept
from lottery_callbacks.gradual_pruning import GradualPruning
from lottery_callbacks.nm_pruning import NMPruning

STEPS = 14  # of 5 an epoch and rank
CUT, SAVED = 9, 7  # where the killed fits end, and the checkpoint that they are taken up from
WITHIN = {
    "gradual": lambda: GradualPruning(0.8, "2it", "10it", "4it"),
    "snip": lambda: GradualPruning(0.8, "0it", "8it", "4it", Pruning(score="snip", scope="global", batches=3), 0.5),
    "n of m": lambda: NMPruning(1, 2, at="8it", pruning=Pruning(score="random")),
}


class Seen(L.Callback):
    """The labels that this rank trains on, and the mask of each step; saves a checkpoint."""

    def __init__(self, callback, save=None):
        self.callback, self.save = callback, save
        self.labels, self.masks = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.labels.append(batch[1].tolist())

    def on_train_batch_end(self, trainer, *args):
        self.masks.append(digest(self.callback.masks))
        if self.save and trainer.global_step == SAVED:
            trainer.save_checkpoint(self.save)


def fit(folder, module, callback, level=0, checkpoint=None, save=None, stop=(), seed=100):
    seen = Seen(callback, save)
    trainer = L.Trainer(
        strategy="ddp", accelerator="cpu", devices=2, max_steps=STEPS, callbacks=[callback, seen, *stop], logger=False,
        default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    L.seed_everything(seed + level + 7 * trainer.global_rank, verbose=False)  # dropout differs between the ranks
    trainer.fit(module, Blobs(batch_size=6), ckpt_path=checkpoint)
    return {
        "level": level,
        "mask": digest(callback.fit_masks),
        "kept": kept(callback.fit_masks),
        "next": digest(callback.masks),
        "masks": seen.masks,
        "weights": bits(dict(module.named_parameters())),
        "zeros": {name: int((module.get_parameter(name) == 0).sum()) for name in callback.fit_masks},
        "labels": seen.labels,
    }


def lottery(folder, **options):
    module = Net()
    imp = IterativeMagnitudePruning(rate=0.3, rewind="4it", run_dir=folder, **options)
    return imp, [fit(folder, module, imp, level.number, level.checkpoint) for level in imp.levels(2)]


def killed_and_taken_up(folder, make):
    """An unbroken fit, and the same one broken off and resumed by new objects at other random states."""
    checkpoint = folder / "saved.ckpt"
    whole = fit(folder, Net(), make(), save=checkpoint)
    with pytest.raises(Interrupted):
        fit(folder, Net(), make(), stop=[StopAt(CUT)])
    return whole, fit(folder, seeded(31, Net), make(), checkpoint=checkpoint, seed=977)


def refusal(folder, callback):
    try:
        fit(folder, Net(), callback)
    except RuntimeError as error:
        return str(error)
    return None


def main(folder):
    torch.set_num_threads(1)
    written = []
    sys.addaudithook(lambda event, args: written.append(Path(args[1]).name) if event == "os.rename" else None)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.manual_seed(rank)  # the ranks begin apart; DDP broadcasts rank 0's weights
    imp, levels = lottery(folder)
    record = {
        "levels": levels,
        "alone": fit(folder, Net(), ApplyTicket(imp.ticket_path(2)), 2),
        "written": [name for name in written if name.endswith("safetensors")],
        "snip levels": lottery(folder / "snip", pruning=Pruning(score="snip"))[1],
        "killed": killed_and_taken_up(folder, lambda: ApplyTicket(imp.ticket_path(0))),
        "within": {name: killed_and_taken_up(folder, make) for name, make in WITHIN.items()},
    }

    def by_rank(evidence):
        return {name: weight.abs() * (-1) ** rank for name, weight in evidence.weights.items()}

    ticket = ticket_of(seeded(0, Net), half_masks(seeded(0, Net)))
    record["refusals"] = {
        "at the start of a fit": refusal(folder, ApplyTicket(ticket, mask="layerwise_random", seed=rank)),
        "within a fit": refusal(folder, GradualPruning(0.5, "3it", pruning=Pruning(score=by_rank))),
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and what each of the two ranks recorded."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, *(json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1))


def assert_agree(mine, other):
    """Both ranks trained the same masks and weights on shards of their own."""
    assert mine["labels"] != other["labels"]
    assert {k: v for k, v in mine.items() if k != "labels"} == {k: v for k, v in other.items() if k != "labels"}


def test_two_ranks_agree_on_every_mask_and_weight_and_write_each_ticket_once(run):
    folder, first, second = run
    for mine, other in zip([*first["levels"], first["alone"]], [*second["levels"], second["alone"]], strict=True):
        assert_agree(mine, other)
    tickets = [Ticket.load(folder / "tickets" / f"level_{level:02d}.safetensors") for level in range(4)]
    for level, result in enumerate(first["levels"]):
        assert result["mask"] == digest(tickets[level].masks)
        assert result["next"] == digest(tickets[level + 1].masks)
        assert result["zeros"] == {name: int((~mask).sum()) for name, mask in tickets[level].masks.items()}
    assert len({result["mask"] for result in first["levels"]}) == 3
    assert tickets[0].rewind.step == 4
    assert first["alone"]["weights"] == first["levels"][2]["weights"]
    assert first["written"] == [f"level_{level:02d}.safetensors" for level in range(4)]
    assert second["written"] == []


def test_a_score_of_the_data_gives_both_ranks_the_same_tickets(run):
    _, first, second = run
    for mine, other in zip(first["snip levels"], second["snip levels"], strict=True):
        assert_agree(mine, other)
    assert len({result["next"] for result in first["snip levels"]}) == 3
    assert first["snip levels"][1]["mask"] != first["levels"][1]["mask"]


@pytest.mark.parametrize("name", WITHIN)
def test_pruning_within_a_fit_gives_both_ranks_the_same_masks_at_every_step(run, name):
    _, first, second = run
    mine, other = first["within"][name][0], second["within"][name][0]
    assert_agree(mine, other)
    changes = [step for step in range(1, STEPS) if mine["masks"][step] != mine["masks"][step - 1]]
    assert changes == {"gradual": [6, 10], "snip": [4, 8], "n of m": [8]}[name]
    assert sum(mine["kept"].values()) == {"gradual": 26, "snip": 26, "n of m": 66}[name]  # of 72 + 60
    assert mine["zeros"] == {n: size - mine["kept"][n] for n, size in zip(mine["kept"], (72, 60), strict=True)}


@pytest.mark.parametrize("name", ["killed", *WITHIN])
def test_a_killed_fit_goes_on_to_the_bits_of_an_unbroken_one_on_both_ranks(run, name):
    for record in run[1:]:
        whole, resumed = record["killed"] if name == "killed" else record["within"][name]
        assert resumed["labels"] == whole["labels"][SAVED - STEPS :]
        assert resumed["masks"] == whole["masks"][SAVED - STEPS :]
        assert resumed["weights"] == whole["weights"]


@pytest.mark.parametrize("when", ["at the start of a fit", "within a fit"])
def test_masks_that_differ_between_ranks_are_refused_on_both(run, when):
    for record in run[1:]:
        assert record["refusals"][when].startswith(
            "the masks on rank 1 differ from those on rank 0: give every rank the same"
        )
        assert "\n" not in record["refusals"][when]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
