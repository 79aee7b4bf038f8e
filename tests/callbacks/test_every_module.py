"""Every class of torch.nn, and some of its forms, goes through all that the callbacks do, or is refused clearly."""

from functools import partial

import pytest
import torch
from module_table import FURTHER, NO_MODULES, TABLE
from module_walk import WITHIN, Between, fit, lottery, names_in, outcome, reinitialised, score_of, within
from stranger import seeded
from torch import nn

from lottery_callbacks import Pruning

ALL = TABLE | FURTHER
EMPTY = [name for name, (make, _) in TABLE.items() if not list(make().state_dict())]
STATEFUL = [name for name in ALL if name not in EMPTY]
FAST = ["LSTM", "MultiheadAttention", "LazyLinear", "Embedding, sparse", "Linear, complex", "ParameterList"]

pytestmark = pytest.mark.filterwarnings("ignore")


def making(name):
    return partial(Between, *ALL[name])


def test_the_table_has_every_class_of_torch():
    classes = {name for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    assert classes - NO_MODULES == TABLE.keys(), "give new classes an entry in module_table.py"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in STATEFUL])
def test_a_module_with_state_is_pruned_rewound_redrawn_and_kept_or_refused(tmp_path, name):
    make = making(name)
    fit(seeded(0, make))  # what does not train without a callback is no matter of theirs
    culprits = partial(names_in, make())
    tickets = []
    for rewind in ("0it", "1it"):
        outcome(lambda rewind=rewind: tickets.append(lottery(make, tmp_path / rewind, rewind)), culprits)
    if tickets:
        outcome(partial(reinitialised, make, tickets[0]), culprits)
    for callback in WITHIN.values():
        outcome(lambda callback=callback: within(make, callback()), culprits)


@pytest.mark.parametrize("score", ["magnitude", "random", "gradient", "snip", "grasp", "synflow"])
def test_scores_of_every_module_or_a_refusal(score):
    for name in ALL:
        module = seeded(0, making(name))
        batch = torch.randn(4, 8)
        if name.startswith("Lazy"):
            module(batch)
        outcome(partial(score_of, module, score, lambda m=module, b=batch: m(b), batch), lambda: [score, "scores of", "differentiate the loss"])
        assert Pruning().prunable(module).keys() >= {"stem.weight", "head.weight"}
