"""How far a finished network can be compressed, and what is left of its accuracy."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import Tensor

from lottery_callbacks.functional.compressibility import By, Compressed, compressed, hidden_weights
from lottery_callbacks.functional.interpolation import load
from lottery_callbacks.functional.narrowing import narrowed
from lottery_callbacks.functional.tail_index import centred, hill, log_moment
from lottery_lightning.experiments.setting import Setting

Row = dict[str, Any]
SHORT = {"column": "column", "magnitude": "magnitude", "singular_value": "singular"}


def compression_of(
    setting: Setting, budget: float, ratios: Sequence[float], output: bool, first_convolution: bool
) -> Row:
    """What a network, as it stands in `setting.model`, loses at a budget of squared error and at several ratios.

    Args:
        setting: the network and its test data.
        budget: squared relative error of each layer; see `functional.compressibility.compressed`.
        ratios: parts of columns and of single weights removed of each layer, for `curves`.
        output: whether the last layer is compressed too.
        first_convolution: whether the first convolution is.

    Returns:
        `test_acc`; for "column", "magnitude" and "singular" `_ratio`, `_error` and `_acc` at the budget; `width`, the
        columns of the first compressed layer; `tail_index` of its weights, by blocks, with its interval, and
        `hill_of_norms`, of its columns; see `functional.tail_index`;
        `parameters` and `narrowed`, of the whole network before and after its pruned columns are cut out (None where
        it cannot be traced); `curves`.
    """
    model = setting.model
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    parameters = dict(model.named_parameters())
    weights = _chosen(parameters, output, first_convolution)

    def accuracy(found: Compressed) -> float:
        load(model, found.state(state))
        return 1 - setting.on_test(model).error

    first = next(iter(weights.values())).detach().flatten(1)
    tail = log_moment(centred(first))
    row: Row = {"test_acc": 1 - setting.on_test(model).error, "width": len(first), "tail_index": tail.alpha}
    row |= {"tail_index_low": tail.low, "tail_index_high": tail.high, "hill_of_norms": hill(first.norm(dim=1)).alpha}
    curves: list[Row] = []
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    for by in get_args(By):
        at_budget = compressed(kept, by, budget=budget)
        short = SHORT[by]
        row |= {f"{short}_ratio": at_budget.pruning_ratio, f"{short}_error": at_budget.error}
        row[f"{short}_acc"] = accuracy(at_budget)
        for ratio in ratios if by != "singular_value" else ():  # a decomposition each
            found = compressed(kept, by, ratio=ratio)
            point = {"ratio": ratio, "pruning_ratio": found.pruning_ratio, "error": found.error}
            curves.append({"by": short} | point | {"test_acc": accuracy(found)})
    load(model, state)
    masks = compressed(kept, "column", budget=budget).masks
    return row | _cut_out(setting, masks) | {"curves": curves}


def _chosen(parameters: Mapping[str, Tensor], output: bool, first_convolution: bool) -> dict[str, Tensor]:
    chosen = hidden_weights(parameters, first_convolution)
    last = [name for name, weight in parameters.items() if weight.ndim >= 2][-1:]
    chosen |= {name: parameters[name] for name in last if output}
    if not chosen:
        raise ValueError("no layer is left to compress: the network has one weight matrix; set compression.output")
    return chosen


def _cut_out(setting: Setting, masks: Mapping[str, Tensor]) -> Row:
    model = copy.deepcopy(setting.model)
    before = sum(parameter.numel() for parameter in model.parameters())
    images = next(iter(setting.test_batches))[0][:2]
    try:
        return {"parameters": before, "narrowed": narrowed(model, masks, images).after}
    except ValueError:  # a network that names its widths, or cannot be traced
        return {"parameters": before, "narrowed": None}
