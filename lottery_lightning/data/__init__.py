"""Data: LightningDataModules that hold whole sets as tensors on the training device."""

from lottery_lightning.data.arrays import Arrays
from lottery_lightning.data.cifar10 import CIFAR10
from lottery_lightning.data.datamodule import TensorDataModule
from lottery_lightning.data.digits import Digits
from lottery_lightning.data.distilled import DistilledDataModule
from lottery_lightning.data.distilled_set import DistilledSet, decode
from lottery_lightning.data.ecg5000 import ECG5000
from lottery_lightning.data.loader import EpochOrder, ShuffledTensorLoader, TensorLoader
from lottery_lightning.data.mnist import MNIST, RotatedMNIST
from lottery_lightning.data.preprocessing import Preprocessing, Whitening
from lottery_lightning.data.whitening import zca

__all__ = [
    "CIFAR10",
    "ECG5000",
    "MNIST",
    "Arrays",
    "Digits",
    "DistilledDataModule",
    "DistilledSet",
    "EpochOrder",
    "Preprocessing",
    "RotatedMNIST",
    "ShuffledTensorLoader",
    "TensorDataModule",
    "TensorLoader",
    "Whitening",
    "decode",
    "zca",
]
