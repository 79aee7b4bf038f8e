"""Training under a mask: what keeps pruned weights at exactly zero, and what a resumed fit needs for it."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks

from lottery_callbacks import random_state
from lottery_callbacks.fit_checks import (
    go_on,
    place,
    progress,
    refuse_diverged,
    refuse_finders,
    refuse_pruners,
    require_sparse,
    require_training,
)
from lottery_callbacks.fit_steps import makes_visits
from lottery_callbacks.functional import masks as M
from lottery_callbacks.functional.optimizer_hooks import elementwise_state, not_elementwise
from lottery_callbacks.loader_order import LoaderOrder, observe
from lottery_callbacks.module_state import require_capturable
from lottery_callbacks.names import named_parameters
from lottery_callbacks.optimizer_state import parameter_names
from lottery_callbacks.rewinding import resume_by_name
from lottery_callbacks.sharding import refuse_sharded
from lottery_callbacks.spawned import SpawnSafe

# Their step takes a weight of 0 with gradient 0 and state 0 to 0; tests/callbacks/test_keeps_zeros.py.
KEEP_ZEROS = {
    optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop, optim.Adagrad,
    optim.Adadelta, optim.ASGD, optim.Rprop,
}  # fmt: skip


class MaskedTraining(SpawnSafe):
    """Base of the callbacks that train under `self.masks` (boolean, by parameter name, True = kept).

    `fit_masks` are those of the present fit or the last one, also when `masks` have gone on to the next level.

    A subclass sets the masks and calls `resumes` and then `apply_masks` in its `on_fit_start`. From there pruned
    weights, their gradients and their optimizer state are exactly 0 at every step: gradients are masked before
    clipping, weights after the optimizer's step; optimizer state is zeroed once and stays zero in SGD, Adam and
    their kin, because only zeros reach it (`ScoreTraining` differs: there the pruned go on being scored). The module's
    `state_dict` keys never change.

    Kept in checkpoints: the masks, the random state of each process and the order of the running epoch, so that a
    resumed fit goes on bit for bit, with the next batch of that epoch (`loader_order` says for which loaders); and
    whether the fit had been stopped, by EarlyStopping or others: a resumed one then ends at once. Sharded strategies
    (FSDP, DeepSpeed) are refused. Several processes compare their masks whenever these are applied: one digest is
    gathered.
    Cost a step: two bitwise ands over the pruned tensors; in a visit of several steps one, since there the weights are
    masked once a visit if the optimizer cannot move them (`keeps_zeros`). At each checkpoint and at the end of the fit
    the module is looked through for pruned weights that are not 0.

    Raises:
        ValueError: before the first step, a callback that trains within the fit (`LearningRateFinder`,
            `BatchSizeFinder`), or a checkpoint of a run that had diverged; at the end, a fit that has trained no step.
        RuntimeError: at a checkpoint or at the end, a pruned weight is not 0: something wrote to it past the masks.
        RuntimeError: a process holds other masks than the first one; raised on all of them.
        RuntimeError: the optimizer keeps state of another shape than its weights (Adafactor, LBFGS), which
            cannot be masked entry by entry.
    """

    found = ("masks", "fit_masks")

    def __init__(self) -> None:
        self.level = 0
        self.masks: M.Masks = {}
        self.fit_masks: M.Masks = {}
        self._bits: dict[nn.Parameter, Tensor] = {}
        self._held: dict[str, nn.Parameter] = {}
        self._began = [0, 0]  # the place where this fit began, also one that was resumed
        self._handles: list[Any] = []
        self._checked: set[Optimizer] = set()
        self._resumed: dict[str, Any] = {}
        self._checkpoint: dict[str, Any] = {}
        self._once_a_visit = False
        self._order: LoaderOrder | None = None
        self._said: set[str] = set()  # warnings of loaders, once for all fits

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._resumed, self._checkpoint = {}, {}  # a checkpoint's state, if any, is loaded after this
        if stage == "fit":
            refuse_sharded(trainer, "train tickets")
            refuse_finders(trainer, self)
            refuse_pruners(trainer, self)
            self.fit_masks, self._began = {}, [0, 0]
            self._order = observe(trainer)
            self._order.said = self._said
            callbacks: list[L.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
            setters = [type(callback).__name__ for callback in callbacks if isinstance(callback, MaskedTraining)]
            if len(setters) > 1:
                raise ValueError(f"{' and '.join(setters)} both set masks: give a Trainer one of them")
            set_level(trainer, self.level)  # now: schedules may ask for the data before on_fit_start

    def resumes(self, trainer: L.Trainer) -> bool:
        """Whether this fit goes on from a checkpoint; if so the random state is set to the checkpoint's.

        Raises:
            ValueError: the checkpoint holds no mask, or another one than `self.masks`; or the Trainer is used twice.
        """
        require_capturable(trainer.lightning_module)
        state = self._resumed
        if not state and not trainer.ckpt_path:
            if trainer.global_step:
                raise ValueError("this Trainer has trained already: make a new Trainer for each level")
            return False
        if not state:
            raise ValueError(
                f"{trainer.ckpt_path} holds no mask: it was not trained by {type(self).__name__}; "
                "resume a checkpoint of this ticket's own run, or start without ckpt_path"
            )
        if M.digest(state["masks"]) != M.digest(self.masks):
            raise ValueError(
                f"{trainer.ckpt_path} holds another mask than the ticket: resume it with the ticket that it trains"
            )
        refuse_diverged(trainer, trainer.lightning_module)
        self._began = state.get("began", [0, 0])
        go_on(trainer, state)
        observe(trainer).resume(of_this_process(trainer, state["random_states"]))
        return True

    def apply_masks(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Begin a fit under `self.masks`."""
        if not self._resumed:
            self._began = place(trainer)
        self.match_optimizers(trainer, module)
        self.change_masks(trainer, module, self.masks)

    def match_optimizers(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Let a resumed fit restore optimizer state by name; call after `resumes`, as `apply_masks` does."""
        resume_by_name(trainer, module, self._checkpoint)
        self._checkpoint = {}

    def change_masks(self, trainer: L.Trainer, module: nn.Module, masks: M.Masks) -> None:
        """Train under `masks` from now on: zero the pruned weights, and keep each mask's bits beside its parameter.

        Raises:
            RuntimeError: the processes hold different masks.
        """
        require_agreement(trainer, masks)
        self.masks = self.fit_masks = masks
        self._hold(module)
        self._zero(trainer.optimizers)

    def _hold(self, module: nn.Module) -> None:
        parameters = named_parameters(module)
        self._held = {name: parameters[name] for name, mask in self.masks.items() if not mask.all()}
        self._bits = {parameter: M.as_bits(self.masks[name], parameter) for name, parameter in self._held.items()}

    def _zero(self, optimizers: list[Optimizer]) -> None:
        for parameter, bits in self._bits.items():
            M.zero_pruned_(parameter, bits)
            for optimizer in optimizers:
                for value in elementwise_state(optimizer, parameter):
                    M.zero_pruned_(value, bits)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, optim.LBFGS | optim.Adafactor):  # others are known by their state, after a step
                raise RuntimeError(not_elementwise(optimizer))
        self._hold(pl_module)  # the module's own on_fit_start may have replaced parameters
        self._zero(trainer.optimizers)  # Lightning restores optimizer state after on_fit_start
        self._once_a_visit = makes_visits(trainer)
        self._handles = [o.register_step_post_hook(self._after_step) for o in trainer.optimizers]
        if not pl_module.automatic_optimization:  # a step of the bare optimizer passes by on_before_optimizer_step
            self._handles += [o.register_step_pre_hook(self._mask_gradients) for o in trainer.optimizers]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._once_a_visit = False  # in a visit this is called only where others hear of each step, and may write
        self._mask_gradients()

    def _mask_gradients(self, *_: Any) -> None:
        for parameter, bits in self._bits.items():
            if parameter.grad is not None:
                M.zero_pruned_(parameter.grad, bits)

    def visit_ends(self, per_epoch: int, last: float) -> Iterable[int] | None:
        """None of its own; see `fit_steps`."""
        return ()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._once_a_visit:
            self._zero_weights()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in self._checked:  # its state exists since its first step, in the dense level too
            self._checked.add(optimizer)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    elementwise_state(optimizer, parameter)
        if not (self._once_a_visit and keeps_zeros(optimizer)):
            self._zero_weights()

    def _zero_weights(self) -> None:
        for parameter, bits in self._bits.items():
            M.zero_pruned_(parameter, bits)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what is no trained ticket; a subclass calls this before it makes one."""
        require_training(trainer, self._began)
        require_sparse(trainer, pl_module, self.fit_masks, self._held)
        self._held = {}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()
        self._held = {}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._order = None

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._bits, self._checked = [], {}, set()

    def state_dict(self) -> dict[str, Any]:
        state = self._order.state_dict() if self._order else random_state.collect()
        return {
            "masks": dict(self.fit_masks),
            "random_states": of_all_processes(state),
            "began": list(self._began),
        }

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_parameters"] = parameter_names(trainer.optimizers, pl_module)
        checkpoint["callbacks"][self.state_key] |= progress(trainer)
        if trainer.state.fn == "fit" and trainer.state.status == "running":  # not where an error ends the fit
            require_sparse(trainer, pl_module, self.fit_masks, self._held)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._checkpoint = checkpoint  # Lightning restores the optimizers from it later

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict


def require_agreement(trainer: L.Trainer, masks: M.Masks) -> None:
    """Compare the masks of all processes; to be called by all of them.

    Raises:
        RuntimeError: on every process, where one holds other masks than the first.
    """
    if trainer.world_size < 2:
        return
    own = torch.tensor(list(bytes.fromhex(M.digest(masks))), device=trainer.strategy.root_device)
    first, *others = trainer.strategy.all_gather(own).tolist()
    apart = [str(rank) for rank, other in enumerate(others, start=1) if other != first]
    if apart:
        raise RuntimeError(
            f"the masks on rank {', '.join(apart)} differ from those on rank 0: give every rank the same ticket and "
            "seed, and a score that is the same on all ranks (average what depends on a rank's own data)"
        )


def of_all_processes(state: Any) -> list[Any]:
    """The state of each process by rank; Lightning asks all of them for a checkpoint."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def of_this_process(trainer: L.Trainer, states: list[Any]) -> Any:
    """This process's state among those of `of_all_processes`; the first where there were more or fewer of them."""
    return states[trainer.global_rank if len(states) == trainer.world_size else 0]


def log_densities(trainer: L.Trainer, masks: M.Masks) -> None:
    """Give every logger `prune/density`, `prune/kept` and `prune/density/<parameter>` at the present step."""
    kept = M.kept(masks)
    values = {f"prune/density/{name}": kept[name] / mask.numel() for name, mask in masks.items()}
    values |= {"prune/density": M.density(masks), "prune/kept": float(sum(kept.values()))}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def set_level(trainer: L.Trainer, level: int) -> None:
    """Tell the data module which level this is, so that each has its own order; like a sampler's `set_epoch`."""
    setter = getattr(getattr(trainer, "datamodule", None), "set_level", None)
    if callable(setter):
        setter(level)
    elif level:
        rank_zero_info("the data has no set_level(level): its order is its own affair; seed it before each level")


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether its step leaves weights exactly 0 that are 0, with gradient and state 0: no mask is needed after it.

    So are the element-wise optimizers of `torch.optim` where no hook of others follows them and their `eps` is no 0
    (0 / 0). A weight decay of AdamW beyond 1 / lr leaves -0.0, which is 0 for everything but a comparison of bits.
    """
    eps = min(group.get("eps", 1) for group in optimizer.param_groups)
    hooks = len(optimizer._optimizer_step_post_hooks) <= 1 and not _global_optimizer_post_hooks
    return type(optimizer) in KEEP_ZEROS and hooks and eps > 0
