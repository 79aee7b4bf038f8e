"""Edge-popup: a strong ticket found by gradient, inside one fit."""

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lottery_callbacks.fit_steps import counts_steps, iterations, last_step, steps_per_epoch
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional import popup
from lottery_callbacks.functional.schedules import cubic
from lottery_callbacks.functional.scores import Tensors
from lottery_callbacks.functional.steps import Step
from lottery_callbacks.masked_training import log_densities, require_agreement
from lottery_callbacks.messages import describe, one_of
from lottery_callbacks.names import named_parameters, owners
from lottery_callbacks.plan import with_reasons
from lottery_callbacks.prunable import is_norm, places, require_values
from lottery_callbacks.pruning import Pruning
from lottery_callbacks.rewinding import RewindPoint, to_cpu
from lottery_callbacks.score_training import ScoreTraining
from lottery_callbacks.ticket import Ticket

TOKENS = ("bias_k", "bias_v")  # of attention: called biases, and none


class EdgePopup(ScoreTraining):
    """Searches a random network for a good mask, and trains no weight (Ramanujan et al., arXiv 1911.13299).

    ```python
    popup = EdgePopup(sparsity=0.5, path="runs/strong.safetensors")
    L.Trainer(max_epochs=20, callbacks=[popup]).fit(module, data)
    popup.ticket.apply_(fresh)  # the same outputs
    ```

    Every weight matrix W is drawn anew and fixed; each weight has a score s. The network computes with W * h, where
    h = 1 for the highest |s| of the scope, and the module's own optimizer, with its groups, momentum, weight decay and
    schedules, trains s by straight-through: dL/ds = dL/d(W * h) * W * sign(s). Biases of these layers are set to 0, as
    the paper has none, unless excluded or under weights="module". Everything else stays as it was initialised, norms
    as `norms` says; running statistics follow the data. `gradient_clip_val` clips the gradients of the scores; a module
    that clips by hand clips those of W * h, and should zero its gradients after each step.

    No layer is changed. The parameter holds W * h at all times, so that forward, validation, checkpoints and other
    callbacks see the plain pruned network, and s from `on_before_optimizer_step` to the end of that step alone (see
    `ScoreTraining`).

    After the fit the module is the pruned network; `masks`, `scores`, the fixed weights `fixed` and `ticket` (the mask,
    with W as the rewind point and all else as it ended) are on the CPU. Loggers get the densities at the start, every
    `Trainer.log_every_n_steps` optimizer steps and at the end.

    Reset at the start of a fit: all of that. Kept in checkpoints: masks, W, s, the steps done, the arguments and the
    random state of each process, so that a killed fit goes on to the same bits. Memory: twice the weights.
    Cost a step: one selection (`functional.popup.kth_highest`) and a dozen passes over the weights.

    Args:
        sparsity: fraction of the weights removed, in [0, 1): of n, n - round(sparsity * n) are kept, one at least.
        scope: "layerwise" counts in each layer; "layerwise_truncated" keeps n - int(sparsity * n) of each, as the
            published code does, from whose training ours differs from step 0 where the two counts differ; "global"
            ranks all together, so that a step of one of several optimizers changes all weights; "threshold" keeps
            s > 0, with scores that begin with this sparsity in each layer: how many are kept is then learned. The last
            two may empty a layer, which is named at the end.
        weights: W is "kaiming_normal", "signed_constant", either one "scaled_" by the density, or "module", as it was
            initialised; see `functional.popup.random_weights`.
        scores: s begins as "kaiming_uniform" or as the "magnitude" of W.
        norms: "frozen" keeps scale and shift of norm layers as initialised; the optimizer trains "trained" ones.
        end: the sparsity rises from 0 to its final value at this step, "500it" or "2ep", by `schedules.cubic`; None
            for all of it at once.
        exclude: names or patterns of parameters that stay dense, and as they were initialised.
        seed: of W and s; the global random state is left alone.
        path: where the ticket is saved at the end of the fit.

    Raises:
        ValueError: a bad argument; nothing to score; parametrized layers; a weight in no optimizer or in several; a
            schedule beyond the run; a checkpoint of other arguments or weights; a Trainer that averages weights, sets
            other masks, or looks for a learning rate or batch size at the start of the fit; scores that diverge.
        RuntimeError: the optimizer evaluates its closure several times a step (LBFGS); processes hold other masks.
    """

    found = ("masks", "fit_masks", "scores", "fixed", "ticket", "step")

    def __init__(
        self,
        sparsity: float = 0.5,
        scope: popup.Scope = "layerwise",
        weights: popup.Weights = "signed_constant",
        scores: popup.Scores = "kaiming_uniform",
        norms: Literal["frozen", "trained"] = "frozen",
        end: str | None = None,
        exclude: Sequence[str] = (),
        seed: int = 0,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity} is outside [0, 1): it is the fraction of weights removed")
        sparsity, seed = float(sparsity), int(seed)  # also numpy's, which checkpoints and tickets could not hold
        self.sparsity = sparsity
        self.scope = one_of("scope", scope, get_args(popup.Scope))
        self.norms = one_of("norms", norms, ("frozen", "trained"))
        self.draws = (
            one_of("weights", weights, get_args(popup.Weights)),
            one_of("scores", scores, get_args(popup.Scores)),
        )
        if scores == "magnitude" and weights.endswith("constant"):
            raise ValueError(f"weights={weights!r} have one magnitude: take scores='kaiming_uniform'")
        if end is not None and scope == "threshold":
            raise ValueError(f"end={end!r} has no meaning where scope='threshold' learns the sparsity: leave it out")
        self.end = None if end is None else Step.parse(end)
        self.pruning = Pruning(exclude=exclude)
        self.seed = seed
        self.path = path
        self.rule: dict[str, Any] = {
            "sparsity": sparsity, "scope": scope, "weights": weights, "scores": scores, "norms": norms,
            "end": None if self.end is None else str(self.end), "exclude": list(self.pruning.exclude), "seed": seed,
        }  # fmt: skip
        self.ticket: Ticket | None = None
        self._end = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        callbacks: list[L.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        for callback in callbacks if stage == "fit" else ():
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ValueError("an average over changing masks is no strong ticket: leave averaging of weights out")

    @torch.no_grad()
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _require_plain(pl_module)
        parameters = self.pruning.prunable(pl_module)
        if not parameters:
            there = describe(with_reasons(self.pruning.excluded(pl_module)))
            raise ValueError(f"nothing to score: no trainable weight matrix is left; exclude fewer: there are {there}")
        self.pruning.check(pl_module)
        if numbers := [name for name, parameter in parameters.items() if parameter.is_complex()]:
            raise ValueError(f"{describe(numbers)} is complex, and its scores would have no order: exclude it")
        rank_zero_info(self.pruning.plan(pl_module, by=f"edge-popup, {self.scope}"))
        self._names = {parameter: name for name, parameter in parameters.items()}
        norms = [p for p in pl_module.parameters() if any(map(is_norm, owners(pl_module, p)))]
        self._trained = set(norms) if self.norms == "trained" else set()
        self._end = self.end.count if self.end else 0  # before the first step it matters only whether it is 0
        self.step, self.ticket = 0, None
        if saved := self._resumed:
            self._take(saved, trainer, parameters)
        if not self.resumes(trainer):
            self._draw(parameters)
            self.masks = self._select(list(parameters))
            if self.draws[0] != "module":
                self._zero_biases(pl_module, list(parameters.values()))
        self.match_optimizers(trainer, pl_module)
        self.bake(list(parameters.values()))
        require_agreement(trainer, self.masks)

    def _take(self, saved: dict[str, Any], trainer: L.Trainer, parameters: dict[str, nn.Parameter]) -> None:
        for key, own in self.rule.items():
            if saved["rule"].get(key) != own:
                raise ValueError(
                    f"{trainer.ckpt_path} was searched by another rule: {key} is {saved['rule'].get(key)!r} there and "
                    f"{own!r} now; resume it by its own rule"
                )
        if saved["fixed"].keys() != parameters.keys():
            there, here = describe(list(saved["fixed"])), describe(list(parameters))
            raise ValueError(
                f"{trainer.ckpt_path} scored {there}, not {here}: resume it with the module that it trained"
            )
        self.fixed, self.scores = _like(parameters, saved["fixed"]), _like(parameters, saved["scores"])
        self.masks = {name: mask.to(parameters[name].device) for name, mask in saved["masks"].items()}
        self.step = saved["step"]

    def _zero_biases(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        """Of the scored layers, where they are trainable and not excluded."""
        holders = {part for parameter in parameters for part in owners(module, parameter)}
        leaves = [leaf_and_own for part in holders for leaf_and_own in part._parameters.items()]
        held = {own for leaf, own in leaves if "bias" in leaf and leaf not in TOKENS}
        for name, parameter in named_parameters(module).items():
            free = parameter.requires_grad and self.pruning.reason_to_leave(module, name, parameter) == "bias"
            if parameter in held and free:
                parameter.zero_()

    def _draw(self, parameters: dict[str, nn.Parameter]) -> None:
        """W and s of a new fit."""
        weights, scores = {}, {}
        for name, parameter in parameters.items():
            weights[name] = parameter
            if self.draws[0] != "module":
                shape = parameter.shape
                weights[name] = popup.random_weights(name, shape, self.draws[0], 1 - self.sparsity, self.seed)
            scores[name] = popup.initial_scores(name, weights[name], self.draws[1], self.seed)
            if self.scope == "threshold":
                scores[name] = popup.shifted(scores[name], self.sparsity)
        self.fixed, self.scores = _like(parameters, weights), _like(parameters, scores)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        per_epoch = steps_per_epoch(trainer)
        self._end, last = iterations(self.end, per_epoch) if self.end else 0, last_step(trainer, per_epoch)
        if last < self._end and counts_steps(trainer) and not _smoke_test(trainer):
            raise ValueError(
                f"end={self.end} is step {self._end}, and the run's last step is {last}: end earlier or train longer"
            )
        log_densities(trainer, self.masks)

    def turn_(self, gradient: Tensor, name: str) -> None:
        popup.straight_through_(gradient, self.fixed[name], self.scores[name], signed=self.scope == "threshold")

    def stepped(self, trainer: L.Trainer, parameters: list[nn.Parameter]) -> None:
        self._choose(list(self._names) if self.scope == "global" else parameters)
        every = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.loggers and every and self.step % every == 0:
            log_densities(trainer, self.masks)

    def _choose(self, parameters: Sequence[nn.Parameter]) -> None:
        self.masks = self.masks | self._select([self._names[parameter] for parameter in parameters])
        self.bake(parameters)

    def _select(self, names: Sequence[str]) -> M.Masks:
        """The masks of the present scores at the present step."""
        scores = {name: self.scores[name] for name in names}
        if self.scope == "threshold" or not scores:
            return popup.positive(scores)
        sizes = {name: score.numel() for name, score in scores.items()}
        sparsity = cubic(self.step, 0, self._end, self.sparsity)
        return popup.highest(scores, popup.budget(sizes, sparsity, self.scope))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._choose(list(self._names))  # also what an optimizer stepped before the end of the schedule alone
        log_densities(trainer, self.masks)
        if empty := [name for name, kept in M.kept(self.masks).items() if not kept]:
            rank_zero_warn(f"{describe(empty)} keeps no weight: search with scope='layerwise', or at a lower sparsity")
        if self.step < self._end and not _smoke_test(trainer):
            rank_zero_warn(
                f"the run ended after {self.step} steps, before end={self.end}: density is {M.density(self.masks):.4g}"
            )
        super().on_train_end(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the ticket, and save it."""
        super().on_fit_end(trainer, pl_module)
        require_agreement(trainer, self.masks)
        self.masks, self.scores, self.fixed = to_cpu(self.masks), to_cpu(self.scores), to_cpu(self.fixed)
        self.fit_masks = self.masks
        provenance = {"level": 1, "method": "edge-popup", "torch": torch.__version__} | self.rule
        ended = RewindPoint.of(pl_module)
        rewind = RewindPoint(0, ended.tensors | self.fixed, ended.training)
        self.ticket = Ticket(self.masks, rewind, provenance)
        if self.path is not None and trainer.is_global_zero and not _smoke_test(trainer):
            self.ticket.save(self.path)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rule": self.rule}


def _require_plain(module: nn.Module) -> None:
    """Refuse layers whose weight is no parameter of its name, which would be left out in silence."""
    for name, part in module.named_modules():
        if is_parametrized(part):
            raise ValueError(f"{name} has parametrizations: make them permanent (remove_parametrizations)")
    held, own = places(module), named_parameters(module)
    for name, under in [(name, place.under) for name, parameter in own.items() for place in held[parameter]]:
        if under:
            remove = "prune.remove" if under == "prune" else f"remove_{under}"
            raise ValueError(f"{name} is under {under} of torch.nn.utils: make it permanent ({remove})")
    require_values(module)


def _like(parameters: dict[str, nn.Parameter], tensors: Tensors) -> Tensors:
    """Copies of the tensors of the parameters' dtype, device and layout."""
    return {name: torch.empty_like(p, requires_grad=False).copy_(tensors[name]) for name, p in parameters.items()}


def _smoke_test(trainer: L.Trainer) -> bool:
    """Under `fast_dev_run` nothing is written."""
    return bool(getattr(trainer, "fast_dev_run", False))
