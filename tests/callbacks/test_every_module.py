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
# Classes that may be refused, by name; every other one must pass. REDRAWN have no
# reset_parameters, so that they can be rewound alone.
REFUSED = [name for name in ALL if name.startswith("Lazy") or name.endswith((", complex", ", sparse"))]
REDRAWN = ["ParameterDict", "ParameterList", "Linear, scripted"]


def slowly(name):
    """Twins of the classes of two dimensions are left to `make test-all`."""
    twin = name.endswith(("1d", "3d")) or (name.startswith("Lazy") and name != "LazyLinear")
    return pytest.param(name, marks=pytest.mark.slow if twin else [])


pytestmark = pytest.mark.filterwarnings("ignore")


def making(name):
    return partial(Between, *ALL[name])


def test_the_table_has_every_class_of_torch():
    classes = {name for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    assert classes - NO_MODULES == TABLE.keys(), "give new classes an entry in module_table.py"


@pytest.mark.parametrize("name", map(slowly, STATEFUL))
def test_a_module_with_state_is_pruned_rewound_redrawn_and_kept_or_refused(tmp_path, name):
    make = making(name)
    fit(seeded(0, make))  # what does not train without a callback is no matter of theirs
    culprits = partial(names_in, make())
    tickets, refused = [], []
    for rewind in ("0it", "1it"):
        refused.append(
            outcome(lambda rewind=rewind: tickets.append(lottery(make, tmp_path / rewind, rewind)), culprits)
        )
    refused += [outcome(lambda callback=callback: within(make, callback()), culprits) for callback in WITHIN.values()]
    assert name in REFUSED or not any(refused), refused
    if tickets:
        refusal = outcome(partial(reinitialised, make, tickets[0]), culprits)
        assert not refusal if name not in REDRAWN else "reset_parameters()" in refusal


@pytest.mark.parametrize("score", ["magnitude", "random", "gradient", "snip", "grasp", "synflow"])
def test_scores_of_every_module_or_a_refusal(score):
    refused = {}
    for name in ALL:
        module = seeded(0, making(name))
        batch = torch.randn(4, 8)
        if name.startswith("Lazy"):
            module(batch)
        run = partial(score_of, module, score, lambda m=module, b=batch: m(b), batch)
        refused[name] = outcome(run, lambda: [score, "scores of", "differentiate the loss"])
        assert Pruning().prunable(module).keys() >= {"stem.weight", "head.weight"}
    real = [name for name, text in refused.items() if text and not name.endswith(", complex")]
    if score not in ("grasp", "synflow"):  # one differentiates twice, the other asks for positive flow in float64
        assert not real
    assert "Conv2d" not in real
    assert "LSTM" not in real or score == "synflow"
