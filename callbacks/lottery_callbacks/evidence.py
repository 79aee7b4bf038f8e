"""Collecting, during a fit, what scores look at: recent batches, the loss on them, synaptic flow, movement."""

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lottery_callbacks import random_state
from lottery_callbacks.functional.scores import Evidence, Tensors
from lottery_callbacks.masked_training import MaskedTraining
from lottery_callbacks.names import named_parameters
from lottery_callbacks.pruning import Pruning
from lottery_callbacks.rewinding import to_cpu


class PruningCallback(MaskedTraining):
    """Base of the callbacks that prune by a rule: collects the evidence that its score needs, and no more.

    Scores of the loss see the last `pruning.batches` training batches, through the module's own `training_step`
    with its logging off. Weights, buffers, metrics, flags, gradients and the random state are left as they were; what
    else a `training_step` of one's own counts sees those batches once more.

    Kept in checkpoints: those batches, or the movement of the weights. Movement begins at 0 in each fit.
    """

    def __init__(self, pruning: Pruning | None) -> None:
        super().__init__()
        self.pruning = pruning or Pruning()
        self._batches: deque[Any] = deque(maxlen=self.pruning.batches)
        self._movement: Tensors = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._batches.clear()
            self._movement = {}

    def evidence(self, trainer: L.Trainer, module: L.LightningModule, generator: torch.Generator) -> Evidence:
        """What a score may look at now, in a running fit; `self.masks` names the weights."""
        own = named_parameters(module)
        weights = {name: own[name] for name in self.masks}
        moved = {name: self._movement.get(name, torch.zeros_like(w)) for name, w in weights.items()}
        return Evidence(
            weights,
            generator,
            losses=lambda: self._losses(trainer, module),
            flow=lambda: synaptic_flow(module, weights, self._recent()[0]),
            movement=moved if self.pruning.needs == "movement" else None,
            average=lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean"),
        )

    def _recent(self) -> list[Any]:
        if not self._batches:
            raise ValueError(f"score {self.pruning} needs a training batch, and this fit has trained none")
        return list(self._batches)

    def _losses(self, trainer: L.Trainer, module: L.LightningModule) -> Iterator[Tensor]:
        if not module.automatic_optimization:
            raise ValueError(
                f"score {self.pruning} needs the loss of training_step, and {type(module).__name__} optimizes "
                "manually: choose magnitude, movement or random"
            )
        counted = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        for index, batch in enumerate(self._recent()):
            with undisturbed(module):
                with torch.enable_grad(), trainer.precision_plugin.train_step_context():
                    output = module.training_step(batch, index) if counted else module.training_step(batch)
                loss = output["loss"] if isinstance(output, Mapping) else output
                if not isinstance(loss, Tensor):
                    raise ValueError(f"score {self.pruning} needs a loss, and training_step returned {output!r}")
                yield loss  # differentiated inside: buffers that are put back before would spoil its graph

    # ---- collecting

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.pruning.needs == "batches":
            self._batches.append(batch)

    def apply_masks(self, trainer: L.Trainer, module: nn.Module) -> None:
        super().apply_masks(trainer, module)
        if self.pruning.needs == "movement":
            own, saved = named_parameters(module), self._resumed.get("movement", {})
            self._movement = {n: saved[n].to(own[n]) if saved else torch.zeros_like(own[n]) for n in self.masks}
        for batch in self._resumed.get("batches", ()):
            self._batches.append(trainer.strategy.batch_to_device(batch))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.pruning.needs == "movement" and not pl_module.automatic_optimization:
            self._handles += [
                o.register_step_pre_hook(lambda o, *_: self._move(pl_module, o)) for o in trainer.optimizers
            ]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.pruning.needs == "movement" and pl_module.automatic_optimization:
            self._move(pl_module, optimizer)

    @torch.no_grad()
    def _move(self, module: nn.Module, optimizer: Optimizer) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        own = named_parameters(module)
        for name, total in self._movement.items():
            parameter = own[name]
            if id(parameter) in stepped and parameter.grad is not None:
                total.addcmul_(parameter.grad, parameter, value=-1)

    def state_dict(self) -> dict[str, Any]:
        collected: dict[str, Any] = {}
        if self._batches:
            collected["batches"] = to_cpu(list(self._batches))
        if self._movement:
            collected["movement"] = to_cpu(self._movement)
        return super().state_dict() | collected


@contextmanager
def undisturbed(module: L.LightningModule) -> Iterator[None]:
    """A block in which `training_step` logs nothing; buffers, metrics and the random state are as before after it."""
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    metrics = {part: copy.deepcopy(vars(part)) for part in module.modules() if isinstance(part, Metric)}
    module.log = module.log_dict = lambda *_, **__: None  # on the object: its class keeps its own
    try:
        with random_state.forked():
            yield
    finally:
        del module.log, module.log_dict
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for metric, state in metrics.items():
            vars(metric).update(state)


def synaptic_flow(module: nn.Module, weights: Mapping[str, Tensor], batch: Any) -> Tensors:
    """dR/d|w| in float64, R = sum of `module(ones)` with all parameters made absolute.

    `ones` has the shape of one example of the batch's first float tensor. Batch norm is evaluated at mean 0 and
    variance 1, so that R stays a product of absolute weights; no signal passes layer or group norms.
    """
    if type(module).forward in (nn.Module.forward, L.LightningModule.forward):
        raise ValueError(f"synflow needs the outputs, and {type(module).__name__} has no forward: choose another score")
    example = next((part for part in _tensors(batch) if part.is_floating_point()), None)
    if example is None:
        raise ValueError("synflow needs an input of floats, and the batch has none: choose another score")
    own = {name: parameter.detach().abs().double() for name, parameter in module.named_parameters()}
    neutral = {"running_mean": 0.0, "running_var": 1.0}
    for name, buffer in module.named_buffers():
        value = neutral.get(name.rpartition(".")[2])
        own[name] = buffer if value is None else torch.full_like(buffer, value, dtype=torch.float64)
    actual = {id(parameter): name for name, parameter in module.named_parameters()}
    inputs = {name: own[actual[id(weight)]].requires_grad_() for name, weight in weights.items()}
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        with torch.enable_grad(), torch.autocast(example.device.type, enabled=False), random_state.forked():
            ones = torch.ones_like(example[:1], dtype=torch.float64)
            outputs = torch.func.functional_call(module, own, (ones,))
            total = torch.stack([part.sum() for part in _tensors(outputs)]).sum()
            found = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True)
    finally:
        for part in training:
            part.training = True
    return dict(zip(inputs, found, strict=True))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
