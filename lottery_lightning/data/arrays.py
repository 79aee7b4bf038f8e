"""Plain arrays from one .npz file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lottery_lightning.data.datamodule import Split, TensorDataModule, hold_out


class Arrays(TensorDataModule):
    """Any set in an `.npz` with `x_train, y_train, x_test, y_test`, and `x_val, y_val` or a part held out.

    `x` are float arrays (examples, ...), used as they are, or uint8, divided by 255; `y` are integer labels.

    Args:
        path: the `.npz` file.
        val_fraction: of the training examples, held out where the file has no `x_val`.
        **kwargs: see `TensorDataModule`.
    """

    def __init__(self, path: str | Path, val_fraction: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path, self.val_fraction = Path(path), val_fraction

    def load(self) -> Mapping[str, Split]:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except Exception as error:  # OSError, BadZipFile, ValueError, EOFError
            raise RuntimeError(f"{self.path} is missing or torn ({error}): give a whole .npz file") from error
        validation = {"x_val", "y_val"}  # both or none
        needed = {"x_train", "y_train", "x_test", "y_test"} | (validation if validation & arrays.keys() else set())
        if missing := needed - arrays.keys():
            raise ValueError(f"{self.path} has no {', '.join(sorted(missing))}: save them with numpy.savez")
        splits = {name: self._split(arrays, name) for name in ("train", "val", "test") if f"x_{name}" in arrays}
        if "val" not in splits:
            held = round(self.val_fraction * len(splits["train"][1]))
            splits["train"], splits["val"] = hold_out(*splits["train"], held, self.split_seed)
        return splits

    def _split(self, arrays: dict[str, np.ndarray], name: str) -> Split:
        x, y = arrays[f"x_{name}"], arrays[f"y_{name}"]
        if len(x) != len(y):
            raise ValueError(f"{self.path}: x_{name} has {len(x)} examples and y_{name} {len(y)}: they must be equal")
        images = torch.from_numpy(x).float() / (255 if x.dtype == np.uint8 else 1)
        return images, torch.from_numpy(y.astype(np.int64))
