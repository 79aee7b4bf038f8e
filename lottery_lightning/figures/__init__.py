"""Figures from finished runs; each function gives the bytes of a PNG."""

from lottery_lightning.figures.comparison import comparison_figure
from lottery_lightning.figures.connectivity import connectivity_figure
from lottery_lightning.figures.curvature import curvature_figure
from lottery_lightning.figures.distilled_pruning import distilled_lines_figure, distilled_pruning_figure
from lottery_lightning.figures.edge_popup import edge_popup_figure
from lottery_lightning.figures.heavy_tails import heavy_tails_figure
from lottery_lightning.figures.instability import instability_figure
from lottery_lightning.figures.landscape import landscape_figure, relief_figure
from lottery_lightning.figures.lottery import kept_map, lottery_figure, mask_figure
from lottery_lightning.figures.strong_tickets import strong_ticket_figure
from lottery_lightning.figures.subset_sum import network_figure, subset_sum_figure

__all__ = [
    "comparison_figure",
    "connectivity_figure",
    "curvature_figure",
    "distilled_lines_figure",
    "distilled_pruning_figure",
    "edge_popup_figure",
    "heavy_tails_figure",
    "instability_figure",
    "kept_map",
    "landscape_figure",
    "lottery_figure",
    "mask_figure",
    "network_figure",
    "relief_figure",
    "strong_ticket_figure",
    "subset_sum_figure",
]
