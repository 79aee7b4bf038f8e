"""How far a finished network can be compressed, and what is left of its accuracy."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from lottery_callbacks import Pruning
from lottery_callbacks.functional.compressibility import By, Compressed, compressed, hidden_weights
from lottery_callbacks.functional.in_place import load
from lottery_callbacks.functional.narrowing import narrowed
from lottery_callbacks.functional.tail_index import Estimate, centred, hill, log_moment
from lottery_lightning.experiments.setting import Setting

Row = dict[str, Any]
SHORT = {"column": "column", "magnitude": "magnitude", "singular_value": "singular"}
AT_BUDGET = tuple(f"{by}_{key}" for by in SHORT.values() for key in ("ratio", "error", "acc"))


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
        it cannot be traced); `curves`. Of a network that has diverged all figures of compression are NaN, and there are
        no curves.
    """
    model = setting.model
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    parameters = dict(model.named_parameters())
    weights = compressible(model, output, first_convolution)

    def accuracy(found: Compressed) -> float:
        load(model, found.state(state))
        return 1 - setting.on_test(model).error

    first = next(iter(weights.values())).detach().flatten(1)
    tail, norms = _estimated(log_moment, centred, first), _estimated(hill, lambda rows: rows.norm(dim=1), first)
    row: Row = {"test_acc": 1 - setting.on_test(model).error, "width": len(first), "tail_index": tail.alpha}
    row |= {"tail_index_low": tail.low, "tail_index_high": tail.high, "hill_of_norms": norms.alpha}
    if not all(weight.isfinite().all() for weight in weights.values()):
        size = sum(parameter.numel() for parameter in parameters.values())
        return row | dict.fromkeys(AT_BUDGET, math.nan) | {"parameters": size, "narrowed": None, "curves": []}
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


def compressible(model: nn.Module, output: bool, first_convolution: bool) -> dict[str, Tensor]:
    """The weights that are compressed: those that noise is added to by default, and the last layer if asked.

    Raises:
        ValueError: there are none.
    """
    prunable = Pruning().prunable(model)
    chosen = hidden_weights(prunable, first_convolution)
    chosen |= {name: prunable[name] for name in list(prunable)[-1:] if output}
    if not chosen:
        raise ValueError("no layer is left to compress: the network has one weight matrix; set compression.output")
    return chosen


def _estimated(estimator: Callable[[Tensor], Estimate], of: Callable[[Tensor], Tensor], weight: Tensor) -> Estimate:
    """NaN where the weights are too few or not finite."""
    try:
        return estimator(of(weight))
    except ValueError:
        return Estimate(math.nan, math.nan, math.nan, 0)


def _cut_out(setting: Setting, masks: Mapping[str, Tensor]) -> Row:
    model = copy.deepcopy(setting.model)
    before = sum(parameter.numel() for parameter in model.parameters())
    images = next(iter(setting.test_batches))[0][:2]
    try:
        return {"parameters": before, "narrowed": narrowed(model, masks, images).after}
    except ValueError:  # a network that names its widths, or cannot be traced
        return {"parameters": before, "narrowed": None}
