"""Experiments: plans of runs from one config. Finished runs are skipped on a rerun."""

from lottery_lightning.experiments.distill import Distill
from lottery_lightning.experiments.distill_making import Making
from lottery_lightning.experiments.distill_sets import Images
from lottery_lightning.experiments.distilled_pruning import DistilledPruning, Route
from lottery_lightning.experiments.edge_popup import EdgePopupSearch, Search
from lottery_lightning.experiments.geometry import Geometry
from lottery_lightning.experiments.geometry_measures import Spectra, Views
from lottery_lightning.experiments.heavy_tails import Compression, HeavyTails, Noise
from lottery_lightning.experiments.instability import Instability, Lines
from lottery_lightning.experiments.lottery import Lottery, Rule
from lottery_lightning.experiments.runs import Training
from lottery_lightning.experiments.strong_tickets import StrongTickets
from lottery_lightning.experiments.subset_sum import SubsetSum
from lottery_lightning.experiments.subset_sum_network import SubsetSumNetwork

__all__ = [
    "Compression",
    "Distill",
    "DistilledPruning",
    "EdgePopupSearch",
    "Geometry",
    "HeavyTails",
    "Images",
    "Instability",
    "Lines",
    "Lottery",
    "Making",
    "Noise",
    "Route",
    "Rule",
    "Search",
    "Spectra",
    "StrongTickets",
    "SubsetSum",
    "SubsetSumNetwork",
    "Training",
    "Views",
]
