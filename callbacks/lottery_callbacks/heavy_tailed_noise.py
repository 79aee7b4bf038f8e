"""Heavy-tailed SGD: alpha-stable noise on the weights after each optimizer step."""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lottery_callbacks.fit_checks import refuse_diverged, refuse_finders
from lottery_callbacks.functional.alpha_stable import Kind, factors
from lottery_callbacks.functional.noise_stream import NoiseStream
from lottery_callbacks.functional.stable_table import StableTable
from lottery_callbacks.masked_training import MaskedTraining
from lottery_callbacks.messages import describe, one_of
from lottery_callbacks.names import named_parameters
from lottery_callbacks.pruning import Pruning
from lottery_callbacks.score_training import ScoreTraining
from lottery_callbacks.sharding import refuse_sharded
from lottery_callbacks.spawned import SpawnSafe


class HeavyTailedNoise(SpawnSafe):
    """Adds scale * lr^(1 / alpha) * X to weights after each optimizer step, X alpha-stable (arXiv 2306.08125).

    Each number of X has the characteristic function exp(-|t|^alpha); lr is the rate of the weight's parameter group in
    that very step. The paper's three kinds of noise, where dimension 0 of a weight counts neurons (filters):

    - "neuron": one number for all weights of a neuron;
    - "weight": independent numbers;
    - "rotation": sub-Gaussian, one heavy-tailed length for all weights of a neuron and a Gaussian direction.

    Deviations from the published code, whose types 1, 2 and 3 are "neuron", "weight" and "rotation": X is N(0, 2) at
    alpha = 2 in all kinds (there type 1 is N(0, 1) on dense layers, N(0, 2) on filters and an error on kernels, type 2
    is N(0, 2), type 3 is NaN); "rotation" has the scale of the others, not 2^(-1/2) of it; noise is scaled by the rate
    of each step, not by the base rate, and on a CPU too; it is seeded. The paper trains by plain SGD, where this is
    Euler's step of an equation driven by a stable process. With momentum, Adam and others the same noise is added: it
    does not enter the optimizer's state, and what the optimizer divides by does not divide it. No theorem speaks of
    these.

    Noise is on trained weights of two dimensions or more, but on no norm, bias or embedding, nor on the output layer,
    which is the last of them in the module's order; a line says which have it and why others have not. A weight without
    a gradient in a step has no noise in it, and a step that a GradScaler skips has none. Noise comes before all other
    hooks of the step, so that pruned weights stay 0 under the callbacks that set masks.

    Each weight has a generator on its device, seeded by `seed`, a ticket's level and its name, so that all processes
    draw the same, on devices of one kind; no other random state is touched. Kept in checkpoints: these generators; a
    resumed fit goes on to the same bits. Reset at the start of a fit: the noise.

    Cost a step: one addition over those weights, and the draws. Those of a small weight are made for many steps at
    once; "weight" and "rotation" keep as much memory as the weights. Nothing waits for a GPU.

    Args:
        alpha: the stability index, in (0, 2]; the lower, the heavier the tails.
        scale: the paper's sigma, 0 or more.
        kind: "neuron", "weight" or "rotation".
        exclude: names or patterns of parameters that get no noise.
        include: names or patterns of parameters that get noise although the default leaves them out.
        first_convolution: whether the first convolution gets noise; the published code leaves it out.
        kernels: of convolutions, "neuron" and "rotation" draw one number a kernel (out, in) instead of one a filter;
            so does the published code unless told otherwise.
        seed: of the noise.

    Raises:
        ValueError: a bad argument; a pattern that matches nothing, or no weight left; an optimizer without `lr`; a
            callback that trains scores (EdgePopup), or trains within the fit (LearningRateFinder, BatchSizeFinder); a
            strategy that shards weights; a checkpoint of other noise, or of a run that had diverged.
        RuntimeError: at the end, a parameter was replaced during the fit.
    """

    found = ("layers",)

    def __init__(
        self,
        alpha: float,
        scale: float,
        kind: Kind = "neuron",
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
        first_convolution: bool = True,
        kernels: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < alpha <= 2:
            raise ValueError(f"alpha={alpha} is outside (0, 2]: 2 is Gaussian, the paper has 1.75 to 1.9")
        if not 0 <= scale < float("inf"):
            raise ValueError(f"scale={scale} is no scale of noise: give 0 or more, as in 0.003")
        self.alpha, self.scale, self.seed = alpha, scale, seed
        self.kind: Kind = one_of("kind", kind, ("neuron", "weight", "rotation"))
        self.rule = Pruning(exclude=exclude, include=include)  # it leaves out what is no weight matrix
        self.first_convolution, self.kernels = first_convolution, kernels
        self.layers: list[str] = []
        self._streams: dict[nn.Parameter, list[NoiseStream]] = {}
        self._resumed: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._depth: Counter[Optimizer] = Counter()  # of nested calls of step: a subclass's may call its parent's
        self._said = ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._resumed = {}  # a checkpoint's state, if any, is loaded after this
        if stage != "fit":
            return
        refuse_sharded(trainer, "add noise")
        refuse_finders(trainer, self)
        for callback in _callbacks(trainer):
            if isinstance(callback, ScoreTraining):
                raise ValueError(f"{type(callback).__name__} trains scores of weights that stay: leave the noise out")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the layers and begin their noise, or go on with it: optimizers are restored, and no step is made."""
        if self._resumed:
            refuse_diverged(trainer, pl_module)
        elif trainer.ckpt_path:
            step = trainer.global_step
            rank_zero_warn(f"{trainer.ckpt_path} was trained without noise, which begins after step {step}")
        groups = [(optimizer, group) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for optimizer, group in groups:
            if "lr" not in group:
                raise ValueError(
                    f"{type(optimizer).__name__} has no lr in its parameter groups, which scales the noise"
                )
        trained = {parameter for _, group in groups for parameter in group["params"]}
        parameters, reasons = named_parameters(pl_module), self.left_out(pl_module, trained)
        self.layers = [name for name in parameters if name not in reasons]
        self._say(reasons)
        level = next((c.level for c in _callbacks(trainer) if isinstance(c, MaskedTraining)), 0)
        self._streams = {
            parameters[name]: self._begin(parameters[name], f"{self.seed} {level} {name}") for name in self.layers
        }
        if self._resumed:
            self._resume(trainer)
        self._release()
        for optimizer in trainer.optimizers:
            after, hooks = optimizer.register_step_post_hook(self._after_step), optimizer._optimizer_step_post_hooks
            cast(OrderedDict[int, Any], hooks).move_to_end(after.id, last=False)  # masks, and others' hooks, come after
            self._handles += [after, optimizer.register_step_pre_hook(self._before_step)]

    def left_out(self, module: nn.Module, trained: set[nn.Parameter]) -> dict[str, str]:
        """The parameters that get no noise where these are trained, with the reason.

        Raises:
            ValueError: a pattern matches nothing, or nothing is left.
        """
        parameters = named_parameters(module)
        for what, patterns in (("exclude", self.rule.exclude), ("include", self.rule.include)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in parameters):
                    there = describe(list(parameters))
                    raise ValueError(f"{what} names {pattern!r}, which is no parameter: there are {there}")
        reasons = {name: self.rule.reason_to_leave(module, name, parameter) for name, parameter in parameters.items()}
        reasons = {n: reason if parameters[n] in trained else reason or "not trained" for n, reason in reasons.items()}
        layers = [
            name for name, reason in reasons.items() if reason in (None, "excluded") and parameters[name].ndim > 1
        ]
        convolutions = [name for name in layers if parameters[name].ndim > 2]
        left = {name: "output layer" for name in layers[-1:]}
        if not self.first_convolution:
            left |= {name: "first convolution" for name in convolutions[:1]}
        included = {name for name in left for pattern in self.rule.include if fnmatchcase(name, pattern)}
        reasons |= {n: reason for n, reason in left.items() if reasons[n] is None and n not in included}
        if all(reasons.values()):
            raise ValueError(f"no weight is left for noise, of {describe(list(parameters))}: name some in include")
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def _begin(self, parameter: Tensor, seed: str) -> list[NoiseStream]:
        draw = _table(self.alpha, parameter.device).draw if self.kind == "weight" else None
        parts = factors(self.kind, self.alpha, tuple(parameter.shape), self.kernels, draw)
        return [NoiseStream(one, size, parameter.device, f"{seed} {part}") for part, (size, one) in enumerate(parts)]

    def _resume(self, trainer: L.Trainer) -> None:
        for key, own in self._rule.items():
            if self._resumed["rule"].get(key) != own:
                raise ValueError(
                    f"{trainer.ckpt_path} was trained with other noise: {key} is {self._resumed['rule'].get(key)!r} "
                    f"there and {own!r} now; resume it with its own"
                )
        for name, streams in zip(self.layers, self._streams.values(), strict=True):
            saved = zip(streams, self._resumed["streams"][name], strict=True)
            if not all([stream.load(state, f"after step {trainer.global_step}") for stream, state in saved]):
                rank_zero_warn(f"noise on {name} was drawn on another kind of device: it goes on with other draws")

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth[optimizer] += 1

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth[optimizer] -= 1
        if self._depth[optimizer]:
            return
        skips: Tensor | None = getattr(optimizer, "found_inf", None)  # of a GradScaler whose optimizer skips by itself
        for group in optimizer.param_groups:
            factor = self.scale * group["lr"] ** (1 / self.alpha)
            if skips is not None:
                factor = factor * (skips == 0)
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in self._streams:
                    first, *others = (stream.next() for stream in self._streams[parameter])
                    for other in others:
                        first.mul_(other)
                    if isinstance(factor, Tensor):
                        parameter.add_(first * factor)
                    else:
                        parameter.add_(first, alpha=factor)

    @property
    def _rule(self) -> dict[str, Any]:
        names = ("alpha", "scale", "kind", "kernels", "seed")
        return {name: getattr(self, name) for name in names} | {"layers": list(self.layers)}

    def _say(self, reasons: dict[str, str]) -> None:
        """Once, and again where a later fit differs."""
        what = {"neuron": "one a neuron", "weight": "one a weight", "rotation": "rotationally invariant"}[self.kind]
        without = describe([f"{name} ({reason})" for name, reason in reasons.items()]) or "nothing else"
        line = (
            f"noise ({what}, alpha {self.alpha:g}, scale {self.scale:g}) on {', '.join(self.layers)}; not on {without}"
        )
        if line != self._said:
            rank_zero_info(line)
        self._said = line

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()
        own, noisy = named_parameters(pl_module), zip(self.layers, self._streams, strict=True)
        gone = [name for name, parameter in noisy if own.get(name) is not parameter]
        if gone:
            raise RuntimeError(
                f"{describe(gone)} was replaced during the fit, and had no noise from there on: write into the "
                "parameter with copy_()"
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._depth.clear()

    def state_dict(self) -> dict[str, Any]:
        states = [[stream.state_dict() for stream in streams] for streams in self._streams.values()]
        return {"rule": self._rule, "streams": dict(zip(self.layers, states, strict=bool(states)))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict


@lru_cache(maxsize=4)
def _table(alpha: float, device: torch.device) -> StableTable:
    return StableTable(alpha, device)


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
