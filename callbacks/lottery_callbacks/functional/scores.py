"""Scores: functions that rank weights; the highest are kept. A new score is one function and one entry below."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Score = Callable[[Mapping[str, Tensor], torch.Generator], dict[str, Tensor]]


def magnitude(weights: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """|w|, the score of iterative magnitude pruning (Frankle & Carbin, arXiv 1803.03635). Draws nothing."""
    return {name: weight.detach().abs() for name, weight in weights.items()}


def random(weights: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Uniform in [0, 1), independent of the weights: the floor that a score must beat."""
    return {
        name: torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
        for name, weight in weights.items()
    }


SCORES: dict[str, Score] = {"magnitude": magnitude, "random": random}
