"""N:M pruning inside one fit."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as L
import torch

from lottery_callbacks.fit_steps import iterations
from lottery_callbacks.functional.nm import indivisible, keep_n_of_m
from lottery_callbacks.functional.steps import Step
from lottery_callbacks.messages import describe
from lottery_callbacks.names import named_parameters
from lottery_callbacks.plan import with_reasons
from lottery_callbacks.prunable import input_dim, places, slices_of
from lottery_callbacks.pruning import Pruning
from lottery_callbacks.pruning_within_fit import PruningWithinFit, provenance


class NMPruning(PruningWithinFit):
    """Keeps the N highest scores of every M consecutive weights along the input, once, and trains on.

    2:4 is the pattern that NVIDIA's sparse tensor cores take (Mishra et al., arXiv 2104.08378, whose recipe is this
    with magnitude on a trained network): after the fit, `torch.sparse.to_sparse_semi_structured(layer.weight)`
    stores a half or bfloat16 Linear weight on the GPU at half the size. Convolutions get the pattern along their
    input channels (see `functional.nm`).

    The input dimension is the layer's own: 1 of torch's Linear, Bilinear (its first input), convolutions, recurrent
    layers and attention; 0 of transposed convolutions and of transformers' Conv1D, as in GPT-2, which store (in, out).
    A weight of any other layer stays dense, unless `input_dims` says which dimension it is; so does one whose input
    dimension is no multiple of M. The plan names them, and they count as prunable in densities.

    Args:
        n: weights kept in a group, below m.
        m: weights in a group.
        at: the step to prune at, "0it" (before the first optimizer step), "500it", "2ep".
        pruning: score and exclusions; by default magnitude. Rates and scopes other than "layerwise" are refused.
        seed: of scores that draw.
        input_dims: parameter name or pattern -> the dimension of its weight that runs over the inputs, as in
            `{"*.W": 0}`, before the layer's own; the last match wins.

    Reset and kept: see `PruningWithinFit`. Cost: one score and one sort of groups of M.

    Raises:
        ValueError: a bad argument, a step behind the run's end, or no weight with whole groups.
    """

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        at: str = "0it",
        pruning: Pruning | None = None,
        seed: int = 0,
        input_dims: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(pruning, seed)
        if not 1 <= n < m:
            raise ValueError(f"{n}:{m} is no pattern: keep n of m weights, with 1 <= n < m")
        if self.pruning.scope != "layerwise":
            raise ValueError(
                f"scope={self.pruning.scope!r} has no meaning for {n}:{m}: each group keeps n; leave it out"
            )
        if self.pruning.counts != "rounded":
            raise ValueError(
                f"counts={self.pruning.counts!r} has no meaning for {n}:{m}: each group keeps n; leave it out"
            )
        self.n, self.m = n, m
        self.at = Step.parse(at)
        self.input_dims = dict(input_dims or {})

    @property
    def rule(self) -> dict[str, Any]:
        return provenance(self.pruning) | {
            "pattern": f"{self.n}:{self.m}",
            "at": str(self.at),
            "seed": self.seed,
            "input_dims": self.input_dims or None,
        }

    def plan(self, module: L.LightningModule) -> str:
        """What is pruned and what is left out, with the reasons, for people to read; in a running fit.

        Raises:
            ValueError: nothing is left to prune, or `input_dims` does not fit the module.
        """
        dims, slices = self._input_dims(module), slices_of(module, self.masks)
        left = {name: "input dimension unknown: declare it in input_dims" for name in self.masks if name not in dims}
        for name in indivisible({name: self.masks[name] for name in dims}, self.m, dims):
            left[name] = f"input of {self.masks[name].shape[dims[name]]}, no multiple of {self.m}"
        left |= {name: "weight_norm along its input" for name in dims if slices.get(name) == dims[name]}
        if left.keys() == self.masks.keys():
            raise ValueError(f"nothing to prune to {self.n}:{self.m}: there are {describe(with_reasons(left))}")
        return self.pruning.plan(module, left, by=f"{self.n}:{self.m}, {self.pruning}")

    def _input_dims(self, module: L.LightningModule) -> dict[str, int]:
        """The input dimensions that are declared or known, of the weights in `self.masks`.

        Raises:
            ValueError: a declaration that matches no weight, or a dimension that one has not.
        """
        own, held = named_parameters(module), places(module)
        dims = {name: input_dim(held[own[name]]) for name in self.masks}
        for pattern, dim in self.input_dims.items():
            matching = [name for name in self.masks if fnmatchcase(name, pattern)]
            if not matching:
                there = describe(list(self.masks))
                raise ValueError(f"input_dims names {pattern!r}, which is no prunable weight: there are {there}")
            for name in matching:
                if not -own[name].ndim <= dim < own[name].ndim:
                    raise ValueError(f"input_dims gives {name} dimension {dim}, and its shape is {(*own[name].shape,)}")
                dims[name] = dim % own[name].ndim
        return {name: dim for name, dim in dims.items() if dim is not None}

    def steps(self, per_epoch: int) -> list[int]:
        return [iterations(self.at, per_epoch)]

    def update(self, trainer: L.Trainer, module: L.LightningModule, step: int, generator: torch.Generator) -> None:
        """Prune to the pattern."""
        scores = self.pruning.scores(self.evidence(trainer, module, generator), self.masks)
        dims, slices = self._input_dims(module), slices_of(module, self.masks)
        masks = {name: self.masks[name] for name, dim in dims.items() if slices.get(name) != dim}
        self.change_masks(trainer, module, self.masks | keep_n_of_m(scores, masks, self.n, self.m, dims))
