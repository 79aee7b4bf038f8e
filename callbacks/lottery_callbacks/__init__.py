"""Lightning callbacks that find, train and watch lottery tickets, each usable alone in any project.

Names are imported when they are first used (PEP 562): `from lottery_callbacks import Ticket` and
`lottery_callbacks.functional` need torch and safetensors, the callbacks Lightning.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Now: imported later, the module of this name would take the function's place.
from lottery_callbacks.strong_network import StrongNetwork, strong_network

if TYPE_CHECKING:
    from lottery_callbacks.apply_ticket import ApplyTicket
    from lottery_callbacks.checkpoints import ResumeCheckpoint, newest_checkpoint
    from lottery_callbacks.curvature_monitor import CurvatureMonitor, CurvatureSummary
    from lottery_callbacks.edge_popup import EdgePopup
    from lottery_callbacks.export import export_onnx
    from lottery_callbacks.gradual_pruning import GradualPruning
    from lottery_callbacks.heavy_tailed_noise import HeavyTailedNoise
    from lottery_callbacks.iterative_magnitude_pruning import IterativeMagnitudePruning, Level
    from lottery_callbacks.linear_mode_connectivity import LinearModeConnectivity
    from lottery_callbacks.nm_pruning import NMPruning
    from lottery_callbacks.pruning import Pruning
    from lottery_callbacks.rewinding import RewindPoint
    from lottery_callbacks.sparsity_monitor import SparsityMonitor
    from lottery_callbacks.strong_file import load_strong_ticket, save_strong_ticket
    from lottery_callbacks.subset_sum_ticket import SubsetSumTicket
    from lottery_callbacks.tail_index_monitor import TailIndexMonitor
    from lottery_callbacks.ticket import Ticket
    from lottery_callbacks.validate_every import ValidateEvery
    from lottery_callbacks.validation_curve import ValidationCurve

__all__ = [
    "ApplyTicket",
    "CurvatureMonitor",
    "CurvatureSummary",
    "EdgePopup",
    "GradualPruning",
    "HeavyTailedNoise",
    "IterativeMagnitudePruning",
    "Level",
    "LinearModeConnectivity",
    "NMPruning",
    "Pruning",
    "ResumeCheckpoint",
    "RewindPoint",
    "SparsityMonitor",
    "StrongNetwork",
    "SubsetSumTicket",
    "TailIndexMonitor",
    "Ticket",
    "ValidateEvery",
    "ValidationCurve",
    "export_onnx",
    "load_strong_ticket",
    "newest_checkpoint",
    "save_strong_ticket",
    "strong_network",
]

_HOMES = {
    "ApplyTicket": "apply_ticket",
    "ResumeCheckpoint": "checkpoints",
    "newest_checkpoint": "checkpoints",
    "CurvatureMonitor": "curvature_monitor",
    "CurvatureSummary": "curvature_monitor",
    "EdgePopup": "edge_popup",
    "export_onnx": "export",
    "GradualPruning": "gradual_pruning",
    "HeavyTailedNoise": "heavy_tailed_noise",
    "IterativeMagnitudePruning": "iterative_magnitude_pruning",
    "Level": "iterative_magnitude_pruning",
    "LinearModeConnectivity": "linear_mode_connectivity",
    "NMPruning": "nm_pruning",
    "Pruning": "pruning",
    "RewindPoint": "rewinding",
    "SparsityMonitor": "sparsity_monitor",
    "load_strong_ticket": "strong_file",
    "save_strong_ticket": "strong_file",
    "SubsetSumTicket": "subset_sum_ticket",
    "TailIndexMonitor": "tail_index_monitor",
    "Ticket": "ticket",
    "ValidateEvery": "validate_every",
    "ValidationCurve": "validation_curve",
}


def __getattr__(name: str) -> Any:
    if home := _HOMES.get(name):
        value = getattr(import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")  # `lottery_callbacks.ticket` after `import lottery_callbacks`
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "lightning.pytorch.cli" in sys.modules:  # LightningCLI finds a callback by its short name once it is imported
    for _name in _HOMES:
        __getattr__(_name)
