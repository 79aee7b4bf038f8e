"""Networks: plain `nn.Module`s whose last layer is `output`; they know nothing of pruning."""

from lottery_lightning.networks.conv import Conv
from lottery_lightning.networks.convnet import ConvNet
from lottery_lightning.networks.dense import Dense
from lottery_lightning.networks.equivariant import GroupCNN
from lottery_lightning.networks.lenet5 import LeNet5
from lottery_lightning.networks.mean_field import MeanField
from lottery_lightning.networks.redundant import RedundantDense
from lottery_lightning.networks.resnet import ResNet, ResNet10, ResNet18, ResNet20
from lottery_lightning.networks.vgg import VGG, VGG16, VGG19, VGG11Wide

__all__ = [
    "VGG",
    "VGG16",
    "VGG19",
    "Conv",
    "ConvNet",
    "Dense",
    "GroupCNN",
    "LeNet5",
    "MeanField",
    "RedundantDense",
    "ResNet",
    "ResNet10",
    "ResNet18",
    "ResNet20",
    "VGG11Wide",
]
