"""The Python that the READMEs show runs, on small numbers."""

import re
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from torch.nn.utils.prune import l1_unstructured
from torch.utils.data import DataLoader, TensorDataset

from lottery_callbacks import Ticket
from lottery_lightning.data import Digits
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier

ROOT = Path(__file__).parents[1]
SMALL = {
    r"50_000": "6",
    r"max_epochs=\d+": "max_epochs=2",
    r"levels\(\d+\)": "levels(2)",
    r"level_\d\d": "level_02",
    r'"500it"': '"5it"',
    r'"\*head\*"': '"*output*"',
    r'"auto", devices': '"cpu", devices',
    r"callbacks=\[": "enable_progress_bar=False, callbacks=[",
}


class Module(ImageClassifier):
    def __init__(self) -> None:
        super().__init__(Dense([64, 20, 10]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["README.md", "callbacks/README.md"])
def test_the_python_of_a_readme_runs(name, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    module, data = Module(), Digits()
    assert isinstance(module, LightningModule)
    scope = {"model": module, "my_module": module, "network": Dense([64, 20, 10]), "datamodule": data, "my_data": data}
    pruned = Dense([64, 20, 10])
    l1_unstructured(pruned.output, "weight", 0.5)
    torch.save(pruned.state_dict(), "pruned.pt")
    scope |= {
        "images": torch.randn(2, 1, 8, 8),
        "labels": torch.tensor([3, 7]),
        "loader": DataLoader(TensorDataset(torch.randn(6, 1, 8, 8), torch.arange(6)), batch_size=2),
        "path": "runs/mine/tickets/level_02.safetensors",
        "Trainer": Trainer,
    }
    for block in blocks:
        if "import transformers" in block:  # tests/callbacks/test_other_loops.py
            continue
        for pattern, small in SMALL.items():
            block = re.sub(pattern, small, block)
        exec(compile(block, name, "exec"), scope)
    folder = "lenet" if name == "README.md" else "mine"
    tickets = sorted(Path("runs", folder, "tickets").iterdir())
    assert [Ticket.load(path).level for path in tickets] == [0, 1, 2, 3]
    if name != "README.md":
        weight = scope["network"].hidden[0].weight
        mask = Ticket.load(tickets[2]).masks["network.hidden.0.weight"]
        assert torch.equal(weight != 0, mask)
