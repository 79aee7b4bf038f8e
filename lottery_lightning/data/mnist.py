"""MNIST with the lottery ticket paper's split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_lightning.data.datamodule import Split, TensorDataModule, hold_out
from lottery_lightning.data.preprocessing import Preprocessing


class MNIST(TensorDataModule):
    """60,000 + 10,000 digits of 28 x 28 pixels: 55,000 train and 5,000 validation (arXiv 1803.03635), 10,000 test.

    Images are (1, 28, 28), scaled to [0, 1] and, unless told not to, normalised by mean 0.1307 and standard deviation
    0.3081.

    Args:
        data_dir: folder whose `MNIST/raw` holds the official files; they are downloaded there where absent.
        download: False never touches the network.
        val_size: training examples held out for validation.
        normalise: False leaves the pixels in [0, 1].
        **kwargs: see `TensorDataModule`.
    """

    def __init__(
        self,
        data_dir: str | Path = "data",
        download: bool = True,
        val_size: int = 5000,
        normalise: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.data_dir, self.download, self.val_size = Path(data_dir), download, val_size
        self.preprocessing = Preprocessing((0.1307,), (0.3081,)) if normalise else Preprocessing((0.0,), (1.0,))

    def prepare_data(self) -> None:
        """Download what is missing."""
        if self.splits:  # read already: Lightning asks again before each fit and test
            return
        from torchvision import datasets

        try:
            for train in (True, False):
                datasets.MNIST(self.data_dir, train, download=self.download)
        except Exception as error:  # torchvision raises RuntimeError, URLError, EOFError, zlib.error ...
            raise RuntimeError(self._mend(error)) from error

    def load(self) -> Mapping[str, Split]:
        from torchvision import datasets

        sets: dict[bool, Split] = {}
        try:
            for train in (True, False):
                data = datasets.MNIST(self.data_dir, train)
                images = self.preprocess(self.change(data.data.unsqueeze(1).float() / 255, train))
                if len(images) != len(data.targets):
                    raise ValueError(f"{len(images)} images and {len(data.targets)} labels")
                sets[train] = (images, data.targets.to(torch.int64))
        except Exception as error:
            raise RuntimeError(self._mend(error)) from error
        train_set, val = hold_out(*sets[True], self.val_size, self.split_seed)
        return {"train": train_set, "val": val, "test": sets[False]}

    def change(self, images: Tensor, train: bool) -> Tensor:
        """What a variant of the set makes of all training or test images, (n, 1, 28, 28) in [0, 1]."""
        return images

    def _mend(self, error: Exception) -> str:
        raw = self.data_dir / "MNIST" / "raw"
        reason = " ".join(str(error).split())[:120]
        return (
            f"MNIST cannot be read in {raw} ({reason}): put the four official *-ubyte files there whole, "
            "delete torn ones, or go online to download them"
        )


class RotatedMNIST(MNIST):
    """MNIST with each digit turned by an angle of its own, uniform over the circle, bilinear; the same every time.

    Larochelle et al. (2007) made such a set with 12,000 training images; this one keeps all of MNIST and its split.
    Normalisation and arguments are those of `MNIST`.
    """

    def change(self, images: Tensor, train: bool) -> Tensor:
        """All images turned; the angles depend on `train` alone."""
        angles = 2 * torch.pi * torch.rand(len(images), generator=torch.Generator().manual_seed(int(train)))
        return torch.cat([rotated(*part) for part in zip(images.split(1000), angles.split(1000), strict=True)])


def rotated(images: Tensor, angles: Tensor) -> Tensor:
    """Square images (n, channels, size, size) turned about their centres by `angles` (n,) in radians, bilinear."""
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
