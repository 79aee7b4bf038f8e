"""Small models of Hugging Face's transformers, with random weights, go through what modules of torch.nn do."""

from functools import partial

import lightning.pytorch as L
import pytest
import torch
from module_walk import WITHIN, fit, lottery, names_in, outcome, reinitialised, score_of, within
from stranger import seeded
from torch.utils.data import DataLoader

from lottery_callbacks import Pruning
from lottery_callbacks.names import named_parameters

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def bert():
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, **SMALL)
    return transformers.BertForMaskedLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **SMALL)
    )


def tokens():
    return [{"input_ids": row, "labels": row} for row in torch.arange(96).view(16, 6) * 7 % 20]


def images():
    pixels = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(pixels)]


MODELS = {"bert": (bert, tokens), "gpt2": (gpt2, tokens), "vit": (vit, images)}


class Task(L.LightningModule):
    """Returns the loss out of the model's own output."""

    def __init__(self, make):
        super().__init__()
        self.model = make()

    def forward(self, batch):
        return self.model(**batch).loss

    def training_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def given(kind):
    make, rows = MODELS[kind]
    return partial(Task, make), lambda: DataLoader(rows(), 4, shuffle=True)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rewind", ["0it", "1it"])
def test_a_transformer_is_pruned_rewound_and_kept(tmp_path, kind, rewind):
    make, data = given(kind)
    ticket = lottery(make, tmp_path, rewind, data)
    module = make()
    assert ticket.masks.keys() == Pruning().prunable(module).keys()
    assert len(ticket.masks) >= 4
    embeddings = [part.weight for part in module.modules() if isinstance(part, torch.nn.Embedding)]
    own = named_parameters(module)
    assert not any(own[name] is embedding for name in ticket.masks for embedding in embeddings)
    if kind == "gpt2":  # its head is tied to the embedding of words, and so is dense
        assert module.model.lm_head.weight is module.model.transformer.wte.weight


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_what_of_a_transformer_has_no_draw_is_named(tmp_path, kind):
    make, data = given(kind)
    ticket = lottery(make, tmp_path, "0it", data)
    refusal = outcome(lambda: reinitialised(make, ticket, data), partial(names_in, make()))
    undrawn = {"gpt2": "attn.c_attn.weight", "vit": "cls_token"}
    assert refusal.startswith("cannot reinitialise model.")
    assert undrawn[kind] in refusal
    assert "give the module that owns it reset_parameters()" in refusal


def test_a_transformer_of_layers_with_draws_is_redrawn_also_where_it_ties_them(tmp_path):
    make, data = given("bert")
    model = make().model
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    reinitialised(make, lottery(make, tmp_path, "0it", data), data)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", WITHIN)
def test_a_transformer_is_pruned_within_a_fit(kind, how):
    make, data = given(kind)
    assert not outcome(lambda: within(make, WITHIN[how](), data), partial(names_in, make()))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("score", ["gradient", "snip", "grasp"])
def test_scores_of_the_loss_rank_a_transformer(kind, score):
    make, data = given(kind)
    module, batch = seeded(0, make), next(iter(data()))
    score_of(module, score, lambda: module(batch), batch)


@pytest.mark.parametrize("kind", MODELS)
def test_synaptic_flow_of_a_transformer_is_refused_in_one_line(kind):
    make, data = given(kind)
    module, batch = seeded(0, make), next(iter(data()))
    assert "synflow" in outcome(lambda: score_of(module, "synflow", lambda: module(batch), batch), lambda: ["synflow"])


@pytest.mark.parametrize("kind", MODELS)
def test_the_fit_without_a_callback_trains_the_same_names(kind):
    make, data = given(kind)
    fit(module := make(), data=data)
    assert all(own.grad is not None for name, own in named_parameters(module).items() if "pooler" not in name)
