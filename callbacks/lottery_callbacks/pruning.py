"""What is pruned, and by which rule: score x scope x rates, with the selection of prunable parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import get_args

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lottery_callbacks.custom_scores import checked, needed
from lottery_callbacks.functional import slices
from lottery_callbacks.functional.masks import Masks, keep_highest, kept, ones
from lottery_callbacks.functional.scopes import SCOPES, Budget, Counts
from lottery_callbacks.functional.score_options import score_options as checked_options
from lottery_callbacks.functional.scores import SCORES, Evidence, Score, Tensors
from lottery_callbacks.messages import describe, one_of
from lottery_callbacks.names import named_parameters
from lottery_callbacks.plan import plan_of, with_reasons
from lottery_callbacks.prunable import (
    Place,
    cannot_be_pruned,
    left_by_default,
    places,
    require_unpruned,
    require_values,
)

REAL = ("grasp", "synflow", "movement")  # scores that rank real weights alone


class Pruning:
    """One rule of pruning, used at every level.

    Args:
        score: ranks weights, the highest are kept: "magnitude", "random", "gradient", "snip", "grasp", "synflow",
            "movement", or a function `Evidence` -> scores by name (see `functional.scores`).
        scope: "layerwise" prunes each tensor by itself, "global" ranks all together, "erk" gives each layer its
            Erdos-Renyi-Kernel share of the global count.
        rates: parameter name or pattern -> a rate of its own in [0, 1), instead of the callback's; the last match
            wins. The paper's half rate for the output layer is `{"*output.weight": 0.1}`.
        exclude: names or patterns of parameters that stay dense.
        include: names or patterns of parameters that are pruned although the default leaves them out.
        batches: how many of the last training batches a score of the loss sees.
        score_options: what the score computes otherwise than by default, as `{"mode": "evaluation"}`: `mode`
            ("training" or "evaluation") of "gradient", "snip" and "grasp", `temperature` (1.0) of "grasp",
            `statistics` ("neutral" or "running") of "synflow", and a function's own keyword parameters. Each default
            has its reason in `functional.scores`; the others are what the authors' code computes.
        counts: how a fraction of n weights becomes a number: "rounded" (None), "truncated" or "ceiling"; see
            `functional.scopes`.

    What is pruned, where the first row that fits counts; the plan that every callback prints gives the reasons:

    | parameter                                                                             | pruned | reason          |
    |---------------------------------------------------------------------------------------|--------|-----------------|
    | named in `exclude`                                                                    | no     | excluded        |
    | gain of weight_norm                                                                   | never  | gain            |
    | under orthogonal, whose zeros are none of the weight                                  | never  | orthogonal      |
    | empty, integer, 8-bit, sparse or nested; a wrapper of tensors (DTensor)               | never  | its type        |
    | named in `include`                                                                    | yes    |                 |
    | of a norm layer: torch's, or a class whose name ends with Norm, Norm1d, 2d or 3d      | no     | norm layer      |
    | of an embedding: torch's, or a class whose name ends with Embedding(s)                | no     | embedding       |
    | its name contains "bias"                                                              | no     | bias            |
    | its name has a word that is pos or position(al), begins with emb or ends with embed,  | no     | embedding       |
    | or its last word is token(s) or prompt(s)                                             |        |                 |
    | neither a weight of torch's Linear, Bilinear, convolutions, recurrent layers and      | no     | no weight       |
    | attention or transformers' Conv1D, nor a `weight` of two dimensions, and has not two  |        | matrix          |
    | dimensions greater than 1: scalars, vectors, also of shape (C, 1, 1)                  |        |                 |
    | under a parametrization that is not weight_norm or spectral_norm                      | no     | parametrized by |
    | not trainable                                                                         | no     | frozen          |
    | any other: matrices of any name, directions of weight_norm, originals of spectral_norm| yes    |                 |

    A direction keeps one weight at least in each slice that is divided by its norm, so that none becomes 0 / 0. Tied
    parameters count once, under their first name; a matrix that an output layer shares with an embedding is an
    embedding, whichever comes first, and `include` prunes both ends. Names are those of the plain network, without the
    `_orig_mod.` of `torch.compile`. Weights that `torch.nn.utils.prune` masks, and those of lazy modules that have no
    shape yet, are refused by name.

    Raises:
        ValueError: an unknown score, option or scope, a rate outside [0, 1), a pattern that matches nothing.
    """

    def __init__(
        self,
        score: str | Score = "magnitude",
        scope: str = "layerwise",
        rates: Mapping[str, float] | None = None,
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
        batches: int = 1,
        score_options: Mapping[str, bool | float | str] | None = None,
        counts: Counts | None = None,
    ) -> None:
        if isinstance(score, str) and score not in SCORES:
            raise ValueError(f"score={score!r} is not known: choose one of {', '.join(SCORES)}, or give a function")
        if not callable(score) and not isinstance(score, str):
            raise ValueError(f"score={score!r} is neither a name nor a function: choose one of {', '.join(SCORES)}")
        for name, rate in (rates or {}).items():
            if not 0 <= rate < 1:
                raise ValueError(f"the rate of {name!r} is {rate}: a rate lies in [0, 1), 0 leaves the layer dense")
        self.score = score
        self.score_options = checked_options(self._score, score_options or {})
        self.counts: str = one_of("counts", counts or "rounded", get_args(Counts))
        self.scope: str = one_of("scope", scope, tuple(SCOPES))
        self.rates = dict(rates or {})
        self.exclude = (
            (exclude,) if isinstance(exclude, str) else tuple(exclude)
        )  # a lone pattern is no list of letters
        self.include = (include,) if isinstance(include, str) else tuple(include)
        if batches < 1:
            raise ValueError(f"batches={batches}: a score of the loss sees one batch at least")
        self.batches = batches

    @property
    def needs(self) -> str | None:
        """What a fit collects for the score: "batches", "movement", or None."""
        return needed(self._score)

    @property
    def _score(self) -> Score:
        return SCORES[self.score] if isinstance(self.score, str) else self.score

    def prunable(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that this rule prunes, in the module's own order."""
        own = named_parameters(module)
        return {name: own[name] for name, reason in self._reasons(module).items() if reason is None}

    def excluded(self, module: nn.Module) -> dict[str, str]:
        """Every other parameter, with the reason."""
        return {name: reason for name, reason in self._reasons(module).items() if reason is not None}

    def reason_to_leave(self, module: nn.Module, name: str, parameter: nn.Parameter) -> str | None:
        """Why `name` stays dense; None where it is pruned."""
        return self._reason(name, parameter, places(module)[parameter])

    def _reasons(self, module: nn.Module) -> dict[str, str | None]:
        held = places(module)
        return {name: self._reason(name, own, held[own]) for name, own in named_parameters(module).items()}

    def _reason(self, name: str, parameter: nn.Parameter, held: Sequence[Place]) -> str | None:
        if _matches(name, self.exclude):
            return "excluded"
        if never := cannot_be_pruned(parameter, held):
            return never
        return None if _matches(name, self.include) else left_by_default(name, parameter, held)

    def plan(self, module: nn.Module, left: Mapping[str, str] | None = None, by: str = "") -> str:
        """What is pruned and what is left out, with the reasons, in two lines for people to read.

        Args:
            module: the network.
            left: prunable parameters that stay dense all the same, with the reasons.
            by: the rule of a callback that has another than score and scope.
        """
        left = left or {}
        pruned = {name: f"{p.numel():,}" for name, p in self.prunable(module).items() if name not in left}
        return plan_of(f"pruned ({by or self})", pruned, {**self.excluded(module), **left})

    def initial_masks(self, module: nn.Module) -> Masks:
        """The dense masks of what this rule prunes, on the CPU.

        Raises:
            ValueError: `torch.nn.utils.prune` masks one of these weights already.
        """
        prunable = self.prunable(module)
        require_unpruned(module, prunable)
        return {name: mask.cpu() for name, mask in ones(prunable).items()}

    def check(self, module: nn.Module) -> None:
        """Compare every name and pattern with the module's parameters.

        Raises:
            ValueError: one of them matches nothing, or what cannot be pruned; nothing is left to prune; a parameter has
                no shape yet.
        """
        require_values(module)
        own, excluded = named_parameters(module), self.excluded(module)
        everything = list(own)
        prunable = [name for name in everything if name not in excluded]
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
        for name, reason in excluded.items():
            if reason != "excluded" and _matches(name, self.include):
                raise ValueError(f"include names {name}, which cannot be pruned ({reason}): exclude it")
        if not prunable:
            raise ValueError(
                "nothing to prune: no trainable weight matrix is left; name parameters in `include`: there are "
                f"{describe(with_reasons(excluded))}"
            )
        if self.score in REAL and (numbers := [name for name in prunable if own[name].is_complex()]):
            raise ValueError(f"score {self.score} ranks real weights, and {describe(numbers)} is complex: exclude it")

    def rate_of(self, name: str, rate: float) -> float:
        """The rate of one parameter: the last match in `rates`, else the given one."""
        own = [value for pattern, value in self.rates.items() if fnmatchcase(name, pattern)]
        return own[-1] if own else rate

    def next_masks(self, evidence: Evidence, masks: Masks, rate: float, rounds: int = 1) -> Masks:
        """The masks after one pruning that removes as much as `rounds` levels would.

        `rounds=1` is one level of iterative pruning; `rounds=n` from dense masks is one-shot pruning to exactly
        the counts of level n. A layer that loses all weights, or would at the next level, is named in a warning.
        """
        scores = self.scores(evidence, masks)
        rates = {name: self.rate_of(name, rate) for name in masks}
        new = self.select(evidence, scores, masks, SCOPES[self.scope](masks, rates, rounds, self.counts))
        later = keep_highest(scores, new, SCOPES[self.scope](new, rates, 1, self.counts))
        warn_of_collapse(masks, new, later)
        return new

    def select(self, evidence: Evidence, scores: Tensors, masks: Masks, budget: Budget) -> Masks:
        """New masks of the highest scores within the budget; one weight at least in each of `evidence.slices`."""
        if not evidence.slices:
            return keep_highest(scores, masks, budget)
        least = slices.at_least(budget, masks, evidence.slices)
        if more := sum(least.values()) - sum(budget.values()):
            rank_zero_warn(
                f"{more:,} weights more are kept than asked, one in each slice that is divided by its norm, of "
                f"{describe(list(evidence.slices))}: prune these at a lower rate, or exclude them"
            )
        return keep_highest(slices.protect(scores, masks, evidence.slices), masks, least)

    def scores(self, evidence: Evidence, masks: Masks) -> Tensors:
        """The score of every weight that has a mask, beside that mask."""
        seen = replace(evidence, weights={name: evidence.weights[name] for name in masks})
        versions = {name: weight._version for name, weight in seen.weights.items()}
        scores = self._score(seen, **self.score_options)
        written = [name for name, weight in seen.weights.items() if weight._version != versions[name]]
        if written and not isinstance(self.score, str):
            raise ValueError(f"score {self} wrote into the weights of {describe(written)}: let it work on copies")
        if not isinstance(self.score, str):
            scores = checked(self.score, scores, masks)
        if numbers := [name for name in masks if scores[name].is_complex()]:
            raise ValueError(f"scores of {describe(numbers)} are complex, and have no order: return their abs()")
        return {name: scores[name].to(mask.device) for name, mask in masks.items()}

    def __str__(self) -> str:
        score = self.score if isinstance(self.score, str) else getattr(self.score, "__name__", "custom")
        options = ", ".join(f"{name}={value}" for name, value in self.score_options.items())
        counts = "" if self.counts == "rounded" else f", {self.counts}"
        return f"{score}({options}), {self.scope}{counts}" if options else f"{score}, {self.scope}{counts}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def warn_of_collapse(masks: Masks, new: Masks, later: Masks) -> None:
    """Name each layer that is not empty in `masks` and is in `new`, or would be in `later`, the pruning after that."""
    before, now, then = kept(masks), kept(new), kept(later)
    for name in masks:
        if before[name] > 0 and (now[name] == 0 or then[name] == 0):
            when = "now" if now[name] == 0 else f"at the next pruning, and {now[name]:,} of {masks[name].numel():,} now"
            rank_zero_warn(
                f"layer {name} is about to collapse: it keeps 0 weights {when}; exclude it, prune it layerwise, or at "
                "a lower rate"
            )
