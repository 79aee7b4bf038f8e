"""Tasks: LightningModules around any `nn.Module`, and schedules for them."""

from lottery_lightning.tasks.image_classification import ImageClassifier
from lottery_lightning.tasks.schedules import WarmupMultiStepLR

__all__ = ["ImageClassifier", "WarmupMultiStepLR"]
