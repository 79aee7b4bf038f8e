"""ECG5000: heartbeats of the UCR archive, by its training part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lottery_lightning.data.datamodule import Split, TensorDataModule, hold_out


class ECG5000(TensorDataModule):
    """500 heartbeats of 140 points, of which 300 train, 100 are held out for validation and 100 for the test.

    Series are (140,), each of mean 0 and deviation 1, as they are in the archive. Deviation from what is published on
    this set: the archive's test part of 4,500 heartbeats is not read; the test here is a part of its training part.

    Args:
        data_dir: folder with `ecg5000_train.npz`: `x` float (500, 140), `y` integers in 0..4, 0 the normal beats.
        val_size: heartbeats held out for validation.
        test_size: heartbeats held out for the test.
        binary: whether labels are 0, normal, and 1, any other (as in arXiv 2306.08125), instead of five classes.
        **kwargs: see `TensorDataModule`.
    """

    def __init__(
        self,
        data_dir: str | Path = "data",
        val_size: int = 100,
        test_size: int = 100,
        binary: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.data_dir, self.val_size, self.test_size, self.binary = Path(data_dir), val_size, test_size, binary

    def load(self) -> Mapping[str, Split]:
        path = self.data_dir / "ecg5000_train.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                series, labels = torch.from_numpy(file["x"]).float(), torch.from_numpy(file["y"].astype(np.int64))
        except Exception as error:  # OSError, KeyError, BadZipFile, ValueError
            raise RuntimeError(f"{path} is missing or torn ({error}): give a whole .npz file with x and y") from error
        if self.binary:
            labels = (labels > 0).long()
        rest, test = hold_out(series, labels, self.test_size, self.split_seed)
        train, val = hold_out(*rest, self.val_size, self.split_seed)
        return {"train": train, "val": val, "test": test}
