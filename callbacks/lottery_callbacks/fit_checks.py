"""What a fit is refused for: before its first step, at its checkpoints and at its end."""

from collections.abc import Collection, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lottery_callbacks.fit_steps import counts_steps
from lottery_callbacks.functional.optimizer_hooks import pruned_weights_alive
from lottery_callbacks.messages import describe
from lottery_callbacks.names import named_parameters

# ---- before the first step


def refuse_finders(trainer: L.Trainer, callback: L.Callback) -> None:
    """Refuse callbacks that train within the fit, for a learning rate or batch size; to be called in `setup`.

    Their steps would count for `callback`, and the checkpoint that they restore is not one to resume from. Lightning's
    `Tuner` ends the fit before any other callback begins, and is not refused.

    Raises:
        ValueError: names the finder, and what to do.
    """
    for finder in _of_kind(trainer, (LearningRateFinder, BatchSizeFinder)):
        if not getattr(finder, "_early_exit", False):
            search = "lr_find" if isinstance(finder, LearningRateFinder) else "scale_batch_size"
            raise ValueError(
                f"{type(finder).__name__} trains within the fit of {type(callback).__name__}: leave it out, and call "
                f"Tuner(trainer).{search}(...) before the fit"
            )


def refuse_diverged(trainer: L.Trainer, module: nn.Module) -> None:
    """Refuse to resume a fit whose trained parameters are not finite; to be called after a checkpoint is loaded.

    Raises:
        ValueError: names the parameters and the checkpoint.
    """
    trained = {name: parameter for name, parameter in named_parameters(module).items() if parameter.requires_grad}
    bad = [name for name, parameter in trained.items() if not _finite(parameter)]
    if bad:
        raise ValueError(
            f"{trainer.ckpt_path} holds NaN or infinity in {describe(bad)}: the run had diverged there; resume an "
            "earlier checkpoint, or remove it and train again at a lower learning rate"
        )


def _finite(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, UninitializedParameter) or parameter.element_size() == 1:  # of 8 bits: torch cannot say
        return True
    return bool(torch.isfinite(parameter.detach()).all())


# ---- at checkpoints


def progress(trainer: L.Trainer) -> dict[str, Any]:
    """What Lightning's checkpoints leave out of a fit's progress, as tensors and primitives.

    `stopped`: whether the fit was told to stop for good, as EarlyStopping does; a Timer stops it until there is more
    time. `metrics`: the last ones that were logged, which EarlyStopping reads at the end of an epoch.
    """
    remaining = [timer.time_remaining() for timer in _of_kind(trainer, (Timer,))]
    timed_out = any(seconds is not None and seconds <= 0 for seconds in remaining)
    logged = trainer.callback_metrics.items()  # a module may put numbers of its own there
    metrics = {
        name: torch.as_tensor(v).detach().cpu().clone() for name, v in logged if isinstance(v, Tensor | float | int)
    }
    return {"stopped": trainer.should_stop and not timed_out, "metrics": metrics}


def go_on(trainer: L.Trainer, state: Mapping[str, Any]) -> None:
    """Put a resumed fit where `progress` was: one that had stopped ends at once; to be called in `on_fit_start`."""
    trainer.callback_metrics.update(state.get("metrics", {}))
    if state.get("stopped"):
        trainer.should_stop = True
        rank_zero_info(f"{trainer.ckpt_path}: the fit had been stopped there; it is finished without further training")


def require_sparse(
    trainer: L.Trainer, module: nn.Module, masks: Mapping[str, Tensor], held: Mapping[str, nn.Parameter]
) -> None:
    """Check that each pruned weight is 0 in the module as it is now.

    Args:
        trainer: of the running fit.
        module: its parameters are looked up by name.
        masks: those of the fit.
        held: the parameters that the fit has masked, by name.

    Raises:
        RuntimeError: names the parameter, the probable cause and what to do.
    """
    if bad := pruned_weights_alive(module, masks):
        what = next(iter(bad.values()))
        raise RuntimeError(f"{what}; {_cause(trainer, module, bad.keys(), held)}")


def _cause(trainer: L.Trainer, module: nn.Module, bad: Collection[str], held: Mapping[str, nn.Parameter]) -> str:
    own = named_parameters(module)
    stepped = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    pruners, averages = (
        [type(callback).__name__ for callback in _of_kind(trainer, kinds)]
        for kinds in ((ModelPruning,), (WeightAveraging, StochasticWeightAveraging))
    )
    if pruners or any(f"{name}_orig" in own for name in bad):
        return f"{describe(pruners) or 'torch.nn.utils.prune'} prunes the same network: leave one of the two out"
    if any(name in held and own.get(name) is not held[name] for name in bad):
        return "it was replaced during the fit, where no step was masked: write into the parameter with copy_()"
    if not stepped:  # Lightning puts a mock in its place
        return "configure_optimizers returned no optimizer, so that no step was masked: return the one that trains it"
    if averages:
        return f"{describe(averages)} averages it with weights of another mask: leave it out"
    if any(name in own and id(own[name]) not in stepped for name in bad):
        return "no optimizer of the Trainer has it, so that no step was masked: return its own in configure_optimizers"
    return (
        "something wrote to it outside the optimizer's step (an average, a projection, an initialisation): leave that "
        "out, or multiply by the mask after it"
    )


# ---- at the end


def place(trainer: L.Trainer) -> list[int]:
    """How far the fit is: optimizer steps, and batches."""
    return [trainer.global_step, trainer.fit_loop.total_batch_idx + 1]


def require_training(trainer: L.Trainer, began: list[int]) -> None:
    """Check that the fit has gone beyond the `place` where it began.

    A module that optimizes by hand may have optimizers that the Trainer does not count: there a batch is enough.

    Raises:
        ValueError: says that nothing was trained, and why.
    """
    step, batch = place(trainer)
    smoke_test = getattr(trainer, "fast_dev_run", False)  # writes nothing, and a level may begin at its end
    if smoke_test or step > began[0] or (batch > began[1] and not counts_steps(trainer)):
        return
    loop = trainer.fit_loop
    if trainer.limit_train_batches == 0:
        why = "limit_train_batches is 0"
    elif trainer.num_training_batches == 0:
        why = "the training loader has no batch: look at the length of its data set, its batch size and drop_last"
    elif loop.max_epochs == 0 or 0 <= loop.max_steps <= step:
        why = f"the fit begins at step {step}, with max_steps={loop.max_steps} and max_epochs={loop.max_epochs}"
    else:
        why = "no batch led to an optimizer step: look at the training loader, and at what training_step returns"
    raise ValueError(f"nothing was trained, and nothing is written: {why}")


def refuse_pruners(trainer: L.Trainer, callback: L.Callback) -> None:
    """Refuse Lightning's `ModelPruning`, which prunes the same network under masks of its own; to be called in `setup`.

    Raises:
        ValueError: names it, and what to do.
    """
    if pruners := _of_kind(trainer, (ModelPruning,)):
        raise ValueError(
            f"{type(pruners[0]).__name__} prunes the same network as {type(callback).__name__}, so that no density "
            "would be the network's: leave one of the two out"
        )


def _of_kind(trainer: L.Trainer, kinds: tuple[type, ...]) -> list[Any]:
    callbacks: list[L.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return [callback for callback in callbacks if isinstance(callback, kinds)]
