"""Making distilled sets: a few synthetic images that networks train on in place of many real ones."""

from lottery_lightning.distillation.distiller import Distiller
from lottery_lightning.distillation.distribution_matching import DistributionMatching
from lottery_lightning.distillation.features import features
from lottery_lightning.distillation.gradient_matching import GradientMatching
from lottery_lightning.distillation.matching import Matching
from lottery_lightning.distillation.real_batches import RealBatches

__all__ = ["Distiller", "DistributionMatching", "GradientMatching", "Matching", "RealBatches", "features"]
