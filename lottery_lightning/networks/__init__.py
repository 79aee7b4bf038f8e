"""Networks: plain `nn.Module`s whose last layer is `output`; they know nothing of pruning."""

from lottery_lightning.networks.dense import Dense
from lottery_lightning.networks.lenet5 import LeNet5

__all__ = ["Dense", "LeNet5"]
