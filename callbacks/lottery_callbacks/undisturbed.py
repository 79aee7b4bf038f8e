"""Running a `training_step` once more without leaving a trace in the fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics import Metric  # comes with lightning

from lottery_callbacks import random_state
from lottery_callbacks.module_state import writable


@contextmanager
def undisturbed(module: L.LightningModule) -> Iterator[None]:
    """A block in which `self.log` and `self.log_dict` are silent and everything can be differentiated twice.

    After it buffers, torchmetrics' states and the global random state are as before. Compiled parts run eagerly
    and attention by its plain formula, since neither's fast kernels have second derivatives. What else a
    `training_step` of one's own counts or appends to is not put back.
    """
    owned = [(part, dict(part._buffers)) for part in module.modules()]  # a step may assign new tensors
    values = {buffer: buffer.clone() for buffer in module.buffers() if writable(buffer)}  # no step changes the others
    metrics = [(part, _state(part)) for part in module.modules() if isinstance(part, Metric)]
    module.log = module.log_dict = lambda *_, **__: None  # on the object: its class keeps its own
    try:
        with random_state.forked(), torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        del module.log, module.log_dict
        for part, buffers in owned:
            part._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)
        for metric, state in metrics:
            vars(metric).update(state)


def _state(metric: Metric) -> dict[str, Any]:
    names = (*metric._defaults, "_update_count", "_computed", "_forward_cache")
    state = {name: getattr(metric, name) for name in names}
    return {n: v.clone() if isinstance(v, Tensor) else list(v) if isinstance(v, list) else v for n, v in state.items()}
