"""What is pruned, and by which rule: score x scope x rates, with the selection of prunable parameters."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lottery_callbacks.functional.masks import Masks, keep_highest
from lottery_callbacks.functional.scopes import SCOPES
from lottery_callbacks.functional.scores import SCORES, Score
from lottery_callbacks.messages import describe, one_of

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Pruning:
    """One rule of pruning, used at every level.

    Args:
        score: ranks weights, the highest are kept: "magnitude", "random", or a function
            (weights by name, generator) -> scores by name.
        scope: "layerwise" prunes each tensor by itself, "global" ranks all together, "erk" gives each layer its
            Erdos-Renyi-Kernel share of the global count.
        rates: parameter name or pattern -> a rate of its own in [0, 1), instead of the callback's; the last match
            wins. The paper's half rate for the output layer is `{"*output.weight": 0.1}`.
        exclude: names or patterns of parameters that stay dense.
        include: names or patterns of parameters that are pruned although the default leaves them out.

    Prunable by default: trainable weight tensors of two or more dimensions. Left out: biases, norm layers,
    embeddings and frozen parameters. Tied parameters count once.

    Raises:
        ValueError: an unknown score or scope, a rate outside [0, 1), a pattern that matches nothing.
    """

    def __init__(
        self,
        score: str | Score = "magnitude",
        scope: str = "layerwise",
        rates: Mapping[str, float] | None = None,
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
    ) -> None:
        if isinstance(score, str) and score not in SCORES:
            raise ValueError(f"score={score!r} is not known: choose one of {', '.join(SCORES)}, or give a function")
        for name, rate in (rates or {}).items():
            if not 0 <= rate < 1:
                raise ValueError(f"the rate of {name!r} is {rate}: a rate lies in [0, 1), 0 leaves the layer dense")
        self.score = score
        self.scope: str = one_of("scope", scope, tuple(SCOPES))
        self.rates = dict(rates or {})
        self.exclude = tuple(exclude)
        self.include = tuple(include)

    def prunable(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that this rule prunes, in the module's own order."""
        return {name: p for name, p in module.named_parameters() if self.reason_to_leave(module, name, p) is None}

    def excluded(self, module: nn.Module) -> dict[str, str]:
        """Every other parameter, with the reason."""
        reasons = {name: self.reason_to_leave(module, name, p) for name, p in module.named_parameters()}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def reason_to_leave(self, module: nn.Module, name: str, parameter: nn.Parameter) -> str | None:
        """Why `name` stays dense; None where it is pruned."""
        if _matches(name, self.exclude):
            return "excluded"
        if _matches(name, self.include):
            return None
        owner, _, leaf = name.rpartition(".")
        owner_module = module.get_submodule(owner)
        if isinstance(owner_module, NORMS):
            return "norm layer"
        if isinstance(owner_module, nn.Embedding | nn.EmbeddingBag):
            return "embedding"
        if "bias" in leaf or parameter.ndim < 2 or "weight" not in leaf:
            return "bias" if "bias" in leaf else "no weight matrix"
        return None if parameter.requires_grad else "frozen"

    def check(self, module: nn.Module) -> None:
        """Compare every name and pattern with the module's parameters.

        Raises:
            ValueError: one of them matches nothing, or nothing is left to prune.
        """
        everything = [name for name, _ in module.named_parameters()]
        prunable = list(self.prunable(module))
        for what, patterns, kind, names in (
            ("exclude", self.exclude, "parameter", everything),
            ("include", self.include, "parameter", everything),
            ("rates", self.rates, "prunable layer", prunable),
        ):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(f"{what} names {pattern!r}, which is no {kind}: there are {describe(names)}")
        if self.rates and self.scope != "layerwise":
            raise ValueError(f"rates per layer need scope='layerwise'; with scope={self.scope!r} use `exclude`")
        if not prunable:
            raise ValueError("nothing to prune: no trainable weight matrix is left; name parameters in `include`")

    def rate_of(self, name: str, rate: float) -> float:
        """The rate of one parameter: the last match in `rates`, else the given one."""
        own = [value for pattern, value in self.rates.items() if fnmatchcase(name, pattern)]
        return own[-1] if own else rate

    def next_masks(
        self,
        weights: Mapping[str, Tensor],
        masks: Masks,
        rate: float,
        generator: torch.Generator,
        rounds: int = 1,
    ) -> Masks:
        """The masks after one pruning that removes as much as `rounds` levels would.

        `rounds=1` is one level of iterative pruning; `rounds=n` from dense masks is one-shot pruning to exactly
        the counts of level n.
        """
        score = SCORES[self.score] if isinstance(self.score, str) else self.score
        scores = score({name: weights[name] for name in masks}, generator)
        budget = SCOPES[self.scope](masks, {name: self.rate_of(name, rate) for name in masks}, rounds)
        new = keep_highest(scores, masks, budget)
        for names, keep in budget.items():
            assert sum(int(new[name].sum()) for name in names) == keep, names
        return new

    def __str__(self) -> str:
        score = self.score if isinstance(self.score, str) else getattr(self.score, "__name__", "custom")
        return f"{score}, {self.scope}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
