"""Training under a mask in any loop: hooks on optimizers, and the check at the end."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lottery_callbacks.functional.masks import as_bits, boolean, zero_pruned_
from lottery_callbacks.functional.messages import describe
from lottery_callbacks.functional.names import named_parameters

Parameters = nn.Module | Mapping[str, nn.Parameter]


def require_zeros(module: Parameters, masks: Mapping[str, Tensor]) -> None:
    """Check that each pruned weight is 0 in the module as it is now; call it at the end of a training.

    Parameters are looked up by name, so one that was replaced during the training is checked too.
    Cost: a pass over the pruned tensors, and one copy from the device.

    Args:
        module: the trained module, wrapped or not, or its parameters by name.
        masks: boolean tensors by canonical parameter name, True = kept.

    Raises:
        RuntimeError: a pruned weight is other than 0 (also NaN), or a masked parameter is absent or has another
            shape; one line that names it.
    """
    bad = pruned_weights_alive(module, masks)
    if bad:
        raise RuntimeError(
            f"pruned weights are not 0 at the end of the training: {describe(list(bad.values()))}; something wrote to "
            "them past the mask: an optimizer without hooks, a parameter replaced in training, or another pruner"
        )


def pruned_weights_alive(module: Parameters, masks: Mapping[str, Tensor]) -> dict[str, str]:
    """Which masked parameters hold pruned weights other than 0 (also NaN), or are not there; with what is wrong.

    -0.0 is 0. Arguments and cost are those of `require_zeros`.
    """
    parameters = _named(module)
    found: dict[str, str] = {}
    for name, mask in masks.items():
        here = parameters.get(name)
        if here is None or here.shape != mask.shape:
            shape = "absent" if here is None else tuple(here.shape)
            found[name] = f"{name} has a mask of shape {tuple(mask.shape)}, and is {shape} in the network"
    there = [name for name in masks if name not in found]
    counts = [_alive(parameters[name].detach(), masks[name]) for name in there]
    alive = torch.stack([count.to(counts[0].device) for count in counts]).tolist() if counts else []  # one copy
    for name, count in zip(there, alive, strict=True):
        if count:
            found[name] = f"{count} of {int((~masks[name]).sum())} pruned weights of {name} are not 0"
    return found


def _alive(weight: Tensor, mask: Tensor) -> Tensor:
    """Number of pruned weights other than 0; NaN counts."""
    return ((weight != 0) & ~mask.to(weight.device, torch.bool)).sum()


def train_under_masks(module: Parameters, masks: Mapping[str, Tensor], *optimizers: Optimizer) -> "UnderMasks":
    """Hold pruned weights at 0 while `optimizers` train `module`, in a loop of any kind.

    ```python
    with train_under_masks(network, ticket.masks, optimizer):
        ...  # the loop; clipping, accumulation and schedules as ever
    ```

    Pruned weights are zeroed now. From here their gradients are 0 as they are computed, thus before clipping, and
    weights and element-wise optimizer state are zeroed after each step. Kept weights take the steps that
    `ApplyTicket` gives them. At the end of the block the hooks are removed and `require_zeros` is called; without a
    block, call `remove` and `require_zeros`. Cost a step: a masked copy of each pruned gradient, and bitwise ands.

    Args:
        module: the module, wrapped or not, or its parameters by name.
        masks: boolean tensors by canonical parameter name, True = kept.
        optimizers: all that train masked parameters; the wrappers of Fabric and Accelerate too.

    Returns:
        The handle, a context manager with `remove()`.

    Raises:
        ValueError: names a mask that fits no parameter or is not boolean; no optimizer holds a masked parameter.
        RuntimeError: at the first backward pass or step, where a gradient is sparse, or the optimizer keeps state of
            another shape than its weights (Adafactor, LBFGS).
    """
    return UnderMasks(module, masks, *optimizers)


class UnderMasks:
    """What `train_under_masks` returns."""

    def __init__(self, module: Parameters, masks: Mapping[str, Tensor], *optimizers: Optimizer) -> None:
        parameters = _named(module)
        self.module, self.masks = module, {name: boolean(name, mask) for name, mask in masks.items()}
        if unfit := _unfit(parameters, self.masks):
            raise ValueError(f"no parameter has the mask's name and shape: {describe(unfit)}; give the module's own")
        self._optimizers = [_plain(optimizer) for optimizer in optimizers]
        trained = {p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        if self.masks and not any(parameters[name] in trained for name in self.masks):
            raise ValueError("the optimizers hold no masked parameter: give those that train this module")
        pruning = {name: mask for name, mask in self.masks.items() if not mask.all()}
        self._bits = {parameters[name]: as_bits(mask, parameters[name]) for name, mask in pruning.items()}
        self._handles: list[Any] = []
        for name, mask in pruning.items():
            if parameters[name].requires_grad:
                pruned = ~mask.to(parameters[name].device)
                self._handles.append(parameters[name].register_hook(_masking(name, pruned)))
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
            self._zero(optimizer)

    def _before_step(self, *_: Any) -> None:
        for parameter, bits in self._bits.items():  # gradients that no backward pass of now has made
            if parameter.grad is not None and not parameter.grad.is_sparse:
                zero_pruned_(parameter.grad, bits)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._zero(optimizer)

    def _zero(self, optimizer: Optimizer) -> None:
        for parameter, bits in self._bits.items():
            zero_pruned_(parameter, bits)
            for value in elementwise_state(optimizer, parameter):
                zero_pruned_(value, bits)

    def remove(self) -> None:
        """Remove the hooks; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "UnderMasks":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.remove()
        if kind is None:
            require_zeros(self.module, self.masks)


def elementwise_state(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """The optimizer's tensors of the parameter's own shape; scalars (step counts) are left out.

    Raises:
        RuntimeError: the state has any other shape.
    """
    values = optimizer.state[parameter].values() if parameter in optimizer.state else ()
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim]
    if any(value.shape != parameter.shape for value in tensors) or any(isinstance(value, list) for value in values):
        raise RuntimeError(not_elementwise(optimizer))
    return tensors


def not_elementwise(optimizer: Optimizer) -> str:
    """What is said of an optimizer whose state no mask can hold at zero."""
    return (
        f"{type(optimizer).__name__} keeps state of another shape than its weights, which no mask can hold at "
        "zero: train tickets with SGD, Adam, AdamW or another element-wise optimizer"
    )


def _masking(name: str, pruned: Tensor) -> Callable[[Tensor], Tensor]:
    def masked(gradient: Tensor) -> Tensor:
        if gradient.is_sparse:
            raise RuntimeError(f"{name} has sparse gradients, which a mask cannot hold at zero: give it sparse=False")
        return gradient.masked_fill(pruned, 0)

    return masked


def _named(module: Parameters) -> Mapping[str, nn.Parameter]:
    return named_parameters(module) if isinstance(module, nn.Module) else module


def _unfit(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> list[str]:
    return [name for name, mask in masks.items() if name not in parameters or parameters[name].shape != mask.shape]


def _plain(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, which the wrappers of Fabric and Accelerate keep as `optimizer`."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
