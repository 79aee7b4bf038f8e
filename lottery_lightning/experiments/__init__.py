"""Experiments: plans of runs from one config. Finished runs are skipped on a rerun."""

from lottery_lightning.experiments.lottery import Lottery, Rule
from lottery_lightning.experiments.runs import Training

__all__ = ["Lottery", "Rule", "Training"]
