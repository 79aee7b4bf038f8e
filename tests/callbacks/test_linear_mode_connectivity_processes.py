"""Lines in two real processes: of the first one's network, each on its own part of the data.

Lightning starts the second rank by running this file again; both do everything in `main`, and the test reads it.
"""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from stranger import Blobs, Net, bits, quiet, seeded

from lottery_callbacks import LinearModeConnectivity
from lottery_callbacks.functional.evaluation import evaluate_on
from lottery_callbacks.functional.interpolation import along

OPTIONS = {
    "max_steps": 6, "val_check_interval": 4, "check_val_every_n_epoch": None, "strategy": "ddp", "devices": 2,
}  # fmt: skip


def main(folder):
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    record = {}
    for norms in ("average", "reestimate"):
        callback = LinearModeConnectivity(points=4, norms=norms, norm_batches=2, network="net")
        finals, after = [], []
        for seed in range(2):
            module = seeded(seed, Net)
            L.seed_everything(seed + 7 * rank, verbose=False)  # dropout differs between the ranks
            quiet(folder, [callback], **OPTIONS).fit(module, Blobs(batch_size=6))
            finals.append({name: tensor.tolist() for name, tensor in module.state_dict().items()})
            after.append(bits(module))
        line = callback.results["previous"]
        record[norms] = {"losses": line.losses, "errors": line.errors, "norms": line.norms, "finals": finals}
        bare = seeded(1, Net)
        L.seed_everything(1 + 7 * rank, verbose=False)
        quiet(folder, [], **OPTIONS).fit(bare, Blobs(batch_size=6))
        record[norms]["as without it"] = bits(bare) == after[1]
    (folder / f"rank_{rank}.json").write_text(json.dumps(record))


def test_two_processes_find_the_lines_of_the_first_ones_network_on_all_data(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "MASTER_PORT")}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    data = Blobs(batch_size=6)
    data.setup("fit")
    evaluate = evaluate_on([data.splits["val"]])
    for norms in ("average", "reestimate"):
        for key in ("losses", "errors"):
            assert first[norms][key] == second[norms][key]
        assert first[norms]["norms"] == norms
        assert first[norms]["as without it"]
        assert second[norms]["as without it"]
        assert first[norms]["finals"] != second[norms]["finals"]  # statistics after the last validation
    like = Net().state_dict()
    finals = [
        {name: torch.tensor(values, dtype=like[name].dtype) for name, values in final.items()}
        for final in first["average"]["finals"]
    ]
    expected = along(Net(), finals[1], finals[0], lambda one: evaluate(one.net), 4)
    assert first["average"]["losses"] == pytest.approx(expected.losses, rel=1e-6)
    assert first["average"]["errors"] == pytest.approx(expected.errors)
    assert first["reestimate"]["losses"][0] == first["average"]["losses"][0]
    batches = []
    for rank in (0, 1):
        data._place = lambda rank=rank: (rank, 2)
        loader = data.train_dataloader()
        loader.load_state_dict({"epoch": 1, "batch": 1})  # 6 steps of 5 an epoch
        batches += list(islice(loader, 2))

    def reestimate(one):
        for inputs, _ in batches:
            one.net(inputs)

    ends = finals[1], finals[0]
    expected = along(Net(), *ends, lambda one: evaluate(one.net), 4, "reestimate", reestimate)
    assert first["reestimate"]["losses"] == pytest.approx(expected.losses, rel=1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
