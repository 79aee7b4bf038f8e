"""Training scores of weights in the place of the weights: who holds what, and when."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.scores import Tensors
from lottery_callbacks.masked_training import MaskedTraining
from lottery_callbacks.messages import describe


class ScoreTraining(MaskedTraining, ABC):
    """Base of the callbacks whose optimizer trains a score of each weight, while the weights stay `fixed`.

    The parameter itself holds W * h, h the mask of the present scores, at all times but one: from
    `on_before_optimizer_step` to the end of that step it holds the scores, and its gradient is that of the scores. So
    the module's own optimizer acts on the scores as if they were its parameters, and everybody else sees the plain
    pruned network. Unlike under the other callbacks that set masks, what is pruned goes on being scored, and may
    return. Gradients of what is neither scored nor in `_trained` are removed: nothing else moves, by weight decay and
    momentum neither. Values are copied, never the tensors exchanged.

    A subclass sets `fixed`, `scores`, `masks`, `_names` and `_trained` in its `on_fit_start` and calls `bake`. Kept in
    checkpoints, beside what `MaskedTraining` keeps: `fixed`, `scores` and `step`.

    Lightning evaluates the closure, with forward and backward pass, inside the optimizer's step, and calls
    `on_before_optimizer_step` there. A GradScaler steps later, without a closure, or not at all; and a bare optimizer
    may be stepped by hand, of which no callback hears. So the scores take their place where gradients are known and
    the step is sure: in `on_before_optimizer_step`, or, where no closure is to come, when the step begins.

    Raises:
        ValueError: no optimizer has a scored weight, or several have.
        RuntimeError: the optimizer evaluates its closure several times a step (LBFGS), or one that Lightning did not
            see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fixed: Tensors = {}
        self.scores: Tensors = {}
        self.step = 0  # optimizer steps made in this fit, also by hand
        self._names: dict[nn.Parameter, str] = {}  # of those scored
        self._trained: set[nn.Parameter] = set()  # as they are
        self._turned: set[Optimizer] = set()  # whose gradients are those of the scores
        self._open: dict[Optimizer, list[nn.Parameter]] = {}  # whose step is under way: those that hold scores
        self._depth: Counter[Optimizer] = Counter()  # of nested calls of step

    @abstractmethod
    def turn_(self, gradient: Tensor, name: str) -> None:
        """Make the gradient of the masked weight that of its score, in place."""

    @abstractmethod
    def stepped(self, trainer: L.Trainer, parameters: list[nn.Parameter]) -> None:
        """The scores of these have been trained: choose masks, and `bake` what they change."""

    @torch.no_grad()
    def bake(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let the parameters hold W * h, with +0.0 where h = 0."""
        self.fit_masks = self.masks
        for parameter in parameters:
            name = self._names[parameter]
            parameter.copy_(self.fixed[name])
            M.zero_pruned_(parameter, M.as_bits(self.masks[name], parameter))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizers = trainer.optimizers
        if lbfgs := [optimizer for optimizer in optimizers if isinstance(optimizer, torch.optim.LBFGS)]:
            raise RuntimeError(_evaluates_again(lbfgs[0]))
        optimized = Counter(parameter for optimizer in optimizers for parameter in _parameters(optimizer))
        if idle := [name for parameter, name in self._names.items() if not optimized[parameter]]:
            raise ValueError(f"no optimizer has {describe(idle)}, whose scores would never change: exclude it")
        if shared := [name for parameter, name in self._names.items() if optimized[parameter] > 1]:
            raise ValueError(f"several optimizers have {describe(shared)}: give each weight to one")
        if self._trained - optimized.keys():
            raise ValueError("no optimizer has some of the norms that are to be trained: give it all of them")
        for optimizer in optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(lambda own, *_: self._end_step(trainer, own)),
            ]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if optimizer in self._open:
            raise RuntimeError(_evaluates_again(optimizer))
        self._turn_gradients(optimizer)
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            self._show_scores(optimizer)
        else:
            self._turned.add(optimizer)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth[optimizer] += 1  # a subclass's step may call its parent's, and each of them calls hooks
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None and optimizer not in self._open:
            if optimizer not in self._turned:
                self._turn_gradients(optimizer)
            self._turned.discard(optimizer)
            self._show_scores(optimizer)

    @torch.no_grad()
    def _turn_gradients(self, optimizer: Optimizer) -> None:
        for parameter in _parameters(optimizer):
            if parameter.grad is None:
                continue
            if name := self._names.get(parameter):
                self.turn_(parameter.grad, name)
            elif parameter not in self._trained:
                parameter.grad = None

    @torch.no_grad()
    def _show_scores(self, optimizer: Optimizer) -> None:
        """Only where there is a gradient: the others the optimizer leaves alone."""
        own = [p for p in _parameters(optimizer) if p.grad is not None and p in self._names]
        self._open[optimizer] = own
        for parameter in own:
            parameter.copy_(self.scores[self._names[parameter]])

    @torch.no_grad()
    def _end_step(self, trainer: L.Trainer, optimizer: Optimizer) -> None:
        self._depth[optimizer] -= 1
        if self._depth[optimizer]:
            return
        if optimizer not in self._open:
            raise RuntimeError(
                f"{type(optimizer).__name__} was given a closure past Lightning: step the optimizers of "
                "self.optimizers(), or without a closure"
            )
        for parameter in self._open[optimizer]:
            self.scores[self._names[parameter]].copy_(parameter)
        self.step += 1
        self.stepped(trainer, self._open[optimizer])
        del self._open[optimizer]

    def _release(self) -> None:
        for parameters in self._open.values():  # of a step that was torn
            self.bake(parameters)
        super()._release()
        self._names, self._trained, self._open = {}, set(), {}
        self._turned.clear()
        self._depth.clear()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"fixed": dict(self.fixed), "scores": dict(self.scores), "step": self.step}


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _evaluates_again(optimizer: Optimizer) -> str:
    return (
        f"{type(optimizer).__name__} evaluates its closure several times a step, and the network holds scores after "
        "the first: search with SGD, Adam or another that evaluates it once"
    )
