"""CIFAR-10 with the lottery ticket paper's split."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lottery_lightning.data.augment import crop_and_flip
from lottery_lightning.data.datamodule import Split, TensorDataModule, hold_out
from lottery_lightning.data.distilled_set import DistilledSet
from lottery_lightning.data.preprocessing import CHUNK, Preprocessing

NORMALISED = Preprocessing((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
MEAN, DEVIATION = torch.tensor(NORMALISED.mean), torch.tensor(NORMALISED.deviation)


class CIFAR10(TensorDataModule):
    """60,000 colour images of 32 x 32 pixels: 45,000 train and 5,000 validation (arXiv 1803.03635), 10,000 test.

    Images are (3, 32, 32), scaled to [0, 1] and normalised by the channels' mean and standard deviation, or, with
    `whitening`, preprocessed as a distilled set was: normalised by that set's numbers and whitened by its matrix.

    Args:
        data_dir: folder with `cifar10.npz` (`x_train, y_train, x_test, y_test`; x uint8 of (n, 32, 32, 3)), which is
            read where it is; else torchvision's files are, and are downloaded there where absent.
        download: False never touches the network.
        val_size: training examples held out for validation.
        augment: crop training images at random out of a border of 4 black pixels, and mirror half of them. Whitened
            images, in which no one value is black, get a border of zeros: the mean image.
        whitening: file of a whitened `DistilledSet` whose preprocessing takes the place of this module's own.
        **kwargs: see `TensorDataModule`.
    """

    def __init__(
        self,
        data_dir: str | Path = "data",
        download: bool = True,
        val_size: int = 5000,
        augment: bool = False,
        whitening: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.data_dir, self.download, self.val_size = Path(data_dir), download, val_size
        self.preprocessing = NORMALISED if whitening is None else _whitened(whitening)
        if augment:
            self.augmentation = partial(crop_and_flip, fill=-MEAN / DEVIATION if whitening is None else torch.zeros(3))

    @property
    def file(self) -> Path:
        """The one file that is read instead of torchvision's."""
        return self.data_dir / "cifar10.npz"

    def prepare_data(self) -> None:
        """Download what is missing."""
        if self.splits or self.file.exists():
            return
        from torchvision import datasets

        try:
            datasets.CIFAR10(self.data_dir, download=self.download)
        except Exception as error:  # torchvision raises RuntimeError, URLError, EOFError, zlib.error ...
            raise RuntimeError(self._mend(error)) from error

    def load(self) -> Mapping[str, Split]:
        try:
            arrays = self._from_file() if self.file.exists() else self._from_torchvision()
            train, test = (_split(*arrays[name], self.preprocess) for name in ("train", "test"))
        except Exception as error:
            raise RuntimeError(self._mend(error)) from error
        rest, val = hold_out(*train, self.val_size, self.split_seed)
        return {"train": rest, "val": val, "test": test}

    def _from_file(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        with np.load(self.file, allow_pickle=False) as file:
            return {name: (file[f"x_{name}"], file[f"y_{name}"]) for name in ("train", "test")}

    def _from_torchvision(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        from torchvision import datasets

        sets = {name: datasets.CIFAR10(self.data_dir, train=name == "train") for name in ("train", "test")}
        return {name: (part.data, np.asarray(part.targets)) for name, part in sets.items()}

    def _mend(self, error: Exception) -> str:
        return (
            f"CIFAR-10 cannot be read in {self.data_dir} ({' '.join(str(error).split())[:120]}): put cifar10.npz or "
            "torchvision's cifar-10-batches-py there whole, delete torn files, or go online to download them"
        )


def _split(pixels: np.ndarray, labels: np.ndarray, preprocess: Callable[[Tensor], Tensor]) -> Split:
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (32, 32, 3) or labels.shape != pixels.shape[:1]:
        raise ValueError(f"images are {pixels.dtype} {pixels.shape}, labels {labels.shape}")
    images = torch.empty(len(pixels), 3, 32, 32)
    for done, raw in zip(images.split(CHUNK), torch.from_numpy(pixels).split(CHUNK), strict=True):
        done.copy_(preprocess(raw.permute(0, 3, 1, 2).float() / 255))
    return images, torch.from_numpy(labels.astype(np.int64))


def _whitened(path: str | Path) -> Preprocessing:
    preprocessing = DistilledSet.load(path).preprocessing
    if preprocessing.whitening is None or preprocessing.whitening.mean.numel() != 3 * 32 * 32:
        raise ValueError(f"{path} holds no whitening of CIFAR-10: leave whitening out, or give a whitened set of it")
    return preprocessing
