"""Figures from finished runs; each function gives the bytes of a PNG."""

from lottery_lightning.figures.lottery import kept_map, lottery_figure, mask_figure
from lottery_lightning.figures.strong_tickets import strong_ticket_figure
from lottery_lightning.figures.subset_sum import network_figure, subset_sum_figure

__all__ = ["kept_map", "lottery_figure", "mask_figure", "network_figure", "strong_ticket_figure", "subset_sum_figure"]
