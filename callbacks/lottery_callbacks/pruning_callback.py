"""The base of the callbacks that prune: it collects, during a fit, what their score looks at."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection  # comes with lightning
from torch import Tensor, nn
from torch.optim import Optimizer

from lottery_callbacks.custom_scores import Unmarked, require_marker
from lottery_callbacks.functional.modes import evaluating
from lottery_callbacks.functional.scores import AS_TRAINED, Evidence, Tensors
from lottery_callbacks.functional.synaptic_flow import synaptic_flow
from lottery_callbacks.functional.temperature import Tempered
from lottery_callbacks.masked_training import MaskedTraining, of_all_processes, of_this_process
from lottery_callbacks.messages import describe
from lottery_callbacks.names import named_parameters
from lottery_callbacks.prunable import slices_of
from lottery_callbacks.pruning import Pruning
from lottery_callbacks.rewinding import to_cpu
from lottery_callbacks.undisturbed import undisturbed


class PruningCallback(MaskedTraining):
    """Base of the callbacks that prune by a rule: collects the evidence that its score needs, and no more.

    Scores of the loss see copies of the last `pruning.batches` training batches of each process, through the module's
    own `training_step` (see `undisturbed`); a batch for which it returns None counts for nothing. Under fp16 the loss
    is scaled as in training. Where the score's options ask for another loss than is trained, that of the fit's first
    batch is computed before its step, so that what it cannot be computed of is refused there.

    Kept in checkpoints: those batches, where they are tensors and primitives in dicts, lists and tuples (of any other
    kind a resumed fit sees those after it alone), or the movement of the weights, which begins at 0 in each fit.
    """

    def __init__(self, pruning: Pruning | None) -> None:
        super().__init__()
        self.pruning = pruning or Pruning()
        self._batches: deque[Any] = deque(maxlen=self.pruning.batches)
        self._movement: Tensors = {}
        self._tried = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._batches.clear()
            self._movement = {}
            self._tried = not self._asked

    @property
    def _asked(self) -> dict[str, Any]:
        """The options of the loss, of a score of ours; what a custom one makes of its own is not known before."""
        ours = AS_TRAINED if isinstance(self.pruning.score, str) else ()
        return {name: value for name, value in self.pruning.score_options.items() if name in ours}

    def evidence(self, trainer: L.Trainer, module: L.LightningModule, generator: torch.Generator) -> Evidence:
        """What a score may look at now, in a running fit; `self.masks` names the weights."""
        own = named_parameters(module)
        weights = {name: own[name] for name in self.masks}
        scaler = _scaler(trainer)
        return Evidence(
            weights,
            generator,
            losses=lambda **options: self._losses(trainer, module, **options),
            scale=scaler.get_scale() if scaler else 1.0,
            flow=lambda **options: synaptic_flow(module, weights, self._recent()[0], **options),
            movement=dict(self._movement) if self.pruning.needs == "movement" else None,
            average=lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean"),
            slices=slices_of(module, weights),
        )

    def _recent(self) -> list[Any]:
        if self.pruning.needs != "batches" and callable(self.pruning.score):
            raise Unmarked(self.pruning.score, "batches")
        if not self._batches:
            raise ValueError(f"score {self.pruning} needs a training batch, and this fit has trained none")
        return list(self._batches)

    def _losses(
        self, trainer: L.Trainer, module: L.LightningModule, mode: str = "training", temperature: float = 1.0
    ) -> Iterator[Tensor]:
        if not module.automatic_optimization:
            raise ValueError(
                f"score {self.pruning} needs the loss of training_step, and {type(module).__name__} optimizes "
                "manually: choose magnitude, movement or random"
            )
        counted = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        scaler = _scaler(trainer)
        for index, batch in enumerate(_copied(self._recent())):  # a training_step may change its batch
            with undisturbed(module), _set_to(mode, module):  # also the backward pass: checkpointing runs parts again
                logits = Tempered(temperature)
                with (
                    torch.enable_grad(),
                    trainer.precision_plugin.train_step_context(),
                    nullcontext() if temperature == 1 else logits,
                    nullcontext() if mode == "training" else self._naming(module),
                ):
                    output = module.training_step(batch, index) if counted else module.training_step(batch)
                loss = output["loss"] if isinstance(output, Mapping) else output
                if loss is None:
                    continue
                if not isinstance(loss, Tensor):
                    raise ValueError(f"score {self.pruning} needs a loss, and training_step returned {output!r}")
                if temperature != 1:
                    logits.check()
                # differentiated inside: buffers that are put back before would spoil its graph
                yield scaler.scale(loss) if scaler else loss

    @contextmanager
    def _naming(self, module: nn.Module) -> Iterator[None]:
        """Some networks have no loss in eval mode, as detectors."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"score {self.pruning} needs the loss in eval mode, and {type(module).__name__}.training_step fails "
                f"there ({' '.join(str(error).split())[:120]}): leave mode='evaluation' out"
            ) from error

    # ---- collecting

    def visit_ends(self, per_epoch: int, last: float) -> Iterable[int] | None:
        """None where the score looks at batches; see `fit_steps`."""
        return None if self.pruning.needs == "batches" else super().visit_ends(per_epoch, last)

    def apply_masks(self, trainer: L.Trainer, module: nn.Module) -> None:
        super().apply_masks(trainer, module)
        own, needed = named_parameters(module), self.pruning.needs
        if callable(self.pruning.score):
            require_marker(self.pruning.score, {n: own[n] for n in self.masks}, self.pruning.score_options)
        frozen = [name for name in self.masks if not own[name].requires_grad]
        if needed and frozen:
            raise ValueError(f"score {self.pruning} needs gradients, and {describe(frozen)} is frozen: exclude it")
        if needed == "movement":
            saved = self._resumed.get("movement", {})
            zeros = {name: torch.zeros_like(own[name], dtype=torch.float32) for name in self.masks}
            self._movement = {name: saved[name].to(zero) if saved else zero for name, zero in zeros.items()}
        if saved := self._resumed.get("batches"):
            batches = of_this_process(trainer, saved)
            self._batches.extend(move_data_to_device(batches, trainer.strategy.root_device))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.pruning.needs == "batches":
            self._batches.append(_copied(batch))
        if not self._tried:
            self._tried = sum(1 for _ in self._losses(trainer, pl_module, **self._asked)) > 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.pruning.needs == "movement" and not pl_module.automatic_optimization:
            self._handles += [
                o.register_step_pre_hook(lambda o, *_: self._move(trainer, pl_module, o)) for o in trainer.optimizers
            ]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.pruning.needs == "movement" and pl_module.automatic_optimization:
            self._move(trainer, pl_module, optimizer)

    @torch.no_grad()
    def _move(self, trainer: L.Trainer, module: nn.Module, optimizer: Optimizer) -> None:
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scale = 1.0
        if scaler := _scaler(trainer):
            if not all(bool(p.grad.isfinite().all()) for p in stepped):
                return  # the scaler skips this step
            if getattr(optimizer, "_step_supports_amp_scaling", False):  # a fused one unscales within its step
                scale = scaler.get_scale()
        own, among = named_parameters(module), {id(p) for p in stepped}
        for name, total in self._movement.items():
            if id(own[name]) in among:
                gradient = own[name].grad.to_dense()  # pyright: ignore[reportOptionalMemberAccess]
                total.addcmul_(gradient.float(), own[name].float(), value=-1 / scale)

    def state_dict(self) -> dict[str, Any]:
        collected: dict[str, Any] = {}
        if self.pruning.needs == "batches":
            batches = list(self._batches)
            collected["batches"] = of_all_processes(to_cpu(batches) if _primitive(batches) else [])
        if self.pruning.needs == "movement":
            collected["movement"] = to_cpu(self._movement)
        return super().state_dict() | collected


@contextmanager
def _set_to(mode: str, module: nn.Module) -> Iterator[None]:
    """A block in this mode. In eval mode cuDNN cannot differentiate recurrent layers, and is left out."""
    if mode == "training":
        yield
        return
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    with evaluating(module), torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
        yield


def _scaler(trainer: L.Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _copied(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, Tensor.clone)


def _primitive(value: Any) -> bool:
    """Whether `torch.load(weights_only=True)` reads it again."""
    if type(value) is dict:
        return all(map(_primitive, value.values()))
    if type(value) in (list, tuple):
        return all(map(_primitive, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)
