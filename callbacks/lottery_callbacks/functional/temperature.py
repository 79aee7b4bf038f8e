"""A temperature on the logits of a loss that somebody else's code computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LOGITS: dict[Callable[..., Any], str] = {
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    F.log_softmax: "log_softmax",
    torch.log_softmax: "log_softmax",
    torch.special.log_softmax: "log_softmax",
    torch.Tensor.log_softmax: "log_softmax",
}


class Tempered(TorchFunctionMode):
    """A block in which the loss functions on logits divide these by `temperature`.

    A `training_step` returns a loss and keeps its logits to itself, and no hook can know which layer's output they are.
    But nearly all classification losses go through `torch.nn.functional` `cross_entropy`,
    `binary_cross_entropy_with_logits` or (before `nll_loss`) `log_softmax`, as a function, a method or a module: each
    call of these is intercepted. What else is made of the logits stays as it is, and so do calls within TorchScript.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self._called: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if name := LOGITS.get(func):
            self._called.add(name)
            if args:
                args = (args[0] / self.temperature, *args[1:])
            else:
                kwargs["input"] = kwargs["input"] / self.temperature
        return func(*args, **kwargs)

    def check(self) -> None:
        """Require that the block has divided the logits of one kind of loss function.

        Raises:
            ValueError: it called none of them, or several kinds, of which one may lie within the network.
        """
        if len(self._called) != 1:
            uses = " and ".join(sorted(self._called)) or f"none of {', '.join(dict.fromkeys(LOGITS.values()))}"
            raise ValueError(
                f"temperature={self.temperature:g} divides the logits of one loss function, and training_step calls "
                f"{uses}: leave temperature out"
            )
