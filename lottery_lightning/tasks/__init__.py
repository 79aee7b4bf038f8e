"""Tasks: LightningModules around any `nn.Module`."""

from lottery_lightning.tasks.image_classification import ImageClassifier

__all__ = ["ImageClassifier"]
