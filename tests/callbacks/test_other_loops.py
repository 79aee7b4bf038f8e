"""The uses of `train_under_masks` that `callbacks/README.md` shows: a plain loop, Fabric, Hugging Face's Trainer."""

import re
from pathlib import Path

import pytest
import torch
from stranger import bits, quiet, raw, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lottery_callbacks import ApplyTicket, RewindPoint, Ticket
from lottery_callbacks.functional.optimizer_hooks import train_under_masks
from lottery_callbacks.names import named_parameters
from lottery_callbacks.rewinding import snapshot

README = Path(__file__).parents[2] / "callbacks/README.md"


def block(containing):
    (found,) = [
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if containing in code
    ]
    return found


def run(code, scope):
    exec(compile(code, str(README), "exec"), scope)
    return scope


def network(seed=0):
    return seeded(seed, lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)))


def examples(count=28):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, generator=generator), torch.tensor(i % 3)) for i in range(count)]


@pytest.fixture
def scope(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in named_parameters(network()).items() if p.ndim == 2}
    ticket = Ticket(masks, RewindPoint(0, snapshot(network())))
    ticket.as_submodule("network").save("runs/mine/tickets/level_05.safetensors")
    return {"network": network(1), "loader": DataLoader(examples(), batch_size=7)}


def test_the_plain_loop_and_fabric_train_the_ticket_with_exact_zeros(scope):
    for containing, change in (("AdamW(ticket.apply_", ("", "")), ("import Fabric", ('"auto"', '"cpu"'))):
        run(block(containing).replace(*change), scope)
        masks = scope["ticket"].masks
        assert {n: int((p != 0).sum()) for n, p in named_parameters(scope["network"]).items() if n in masks} == {
            name: int(mask.sum()) for name, mask in masks.items()
        }
        assert bits(scope["network"]) != bits(scope["ticket"].apply_(network()))  # trained
        for name, mask in masks.items():
            assert not any(raw(scope["network"].get_parameter(name)[~mask]))


def test_a_plain_loop_gives_the_bits_of_apply_ticket_under_clipping(tmp_path, scope):
    import lightning.pytorch as L

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network(3)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    ticket = Ticket.load("runs/mine/tickets/level_05.safetensors")
    module = Module()
    trainer = quiet(tmp_path, [ApplyTicket(ticket)], max_epochs=2, gradient_clip_val=0.1)
    trainer.fit(module, scope["loader"])
    ours = ticket.for_submodule("network").apply_(network(4))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01)
    with train_under_masks(ours, ticket.for_submodule("network").masks, optimizer):
        for _ in range(2):
            for images, labels in scope["loader"]:
                optimizer.zero_grad()
                F.cross_entropy(ours(images), labels).backward()
                nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
                optimizer.step()
    assert bits(ours) == bits(module.network)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_trainer_of_hugging_face_trains_under_masks(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, **special,
        )  # fmt: skip
        model = seeded(0, lambda: transformers.BertForMaskedLM(config))
    else:
        config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, **special)
        model = seeded(0, lambda: transformers.GPT2LMHeadModel(config))
    matrices = {n: p for n, p in named_parameters(model).items() if p.ndim == 2 and "emb" not in n and "wte" not in n}
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in matrices.items()}
    before = {name: p.detach().clone() for name, p in matrices.items()}
    rows = torch.randint(3, 20, (24, 8))
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_train_epochs=1, gradient_accumulation_steps=2,
        weight_decay=0.1, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    scope = {"masks": masks, "language_model": model, "arguments": arguments}
    scope |= {"texts": [{"input_ids": row, "labels": row} for row in rows]}
    run(block("import transformers"), scope)
    assert len(masks) >= 8
    for name, mask in masks.items():
        trained = model.get_parameter(name)
        assert torch.equal(trained != 0, mask)
        assert not torch.equal(trained[mask], before[name][mask])

    class Breaks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.get_parameter(next(iter(masks))).data.fill_(1.0)

    trainer = transformers.Trainer(
        model, arguments, train_dataset=scope["texts"], callbacks=[scope["TrainUnderMasks"](), Breaks()]
    )
    with pytest.raises(RuntimeError, match=r"^pruned weights are not 0 at the end of the training: "):
        trainer.train()
