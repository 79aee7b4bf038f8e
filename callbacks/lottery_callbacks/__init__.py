"""Lightning callbacks that find, train and watch lottery tickets, each usable alone in any project."""

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
from lottery_callbacks.strong_network import StrongNetwork, strong_network
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
