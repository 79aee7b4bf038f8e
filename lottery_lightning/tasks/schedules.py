"""Learning rate schedules of the papers that torch does not have."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupMultiStepLR(LRScheduler):
    """Linear warmup from 0, then drops (arXiv 1803.03635, section 4; arXiv 1912.05671, table 1).

    At step t = 0, 1, ... the rate is lr * min(1, t / warmup) * gamma ** (number of milestones <= t), for each
    parameter group with its own lr; so the first step of a warmup changes no weight. The rate is computed from t
    anew: nothing accumulates, and a resumed schedule goes on bit for bit. Its state is numbers and lists.

    Args:
        optimizer: whose rates are set.
        milestones: ascending steps from which on the rate is another `gamma` times lower.
        warmup: steps until the full rate; 0 begins with it.
        gamma: the factor of a drop.
        last_epoch: the step to go on from; -1 begins.

    Raises:
        ValueError: milestones do not ascend, or warmup is negative.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        warmup: int = 0,
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        self.milestones, self.warmup, self.gamma = list(milestones), warmup, gamma
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            raise ValueError(f"milestones={self.milestones} must ascend, each of them once")
        if warmup < 0:
            raise ValueError(f"warmup={warmup} is negative: give the steps of the warmup, 0 for none")
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of step `last_epoch`, one a parameter group."""
        factor = self.gamma ** bisect_right(self.milestones, self.last_epoch)
        if self.last_epoch < self.warmup:
            factor *= self.last_epoch / self.warmup
        return [lr * factor for lr in self.base_lrs]
