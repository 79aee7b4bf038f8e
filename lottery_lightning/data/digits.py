"""scikit-learn's bundled handwritten digits: real images, no network."""

from collections.abc import Mapping

import torch

from lottery_lightning.data.datamodule import Split, TensorDataModule, hold_out
from lottery_lightning.data.preprocessing import Preprocessing


class Digits(TensorDataModule):
    """1,797 digits of 8 x 8 pixels in 10 classes (UCI, Alpaydin & Kaynak 1998): 1,197 train, 200 val, 400 test.

    Images are (1, 8, 8), pixels scaled from 0..16 to [-1, 1]. Arguments: see `TensorDataModule`.
    """

    preprocessing = Preprocessing((0.5,), (0.5,))

    def load(self) -> Mapping[str, Split]:
        from sklearn.datasets import load_digits

        pixels, target = load_digits(return_X_y=True)
        images = self.preprocess(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16)
        labels = torch.tensor(target, dtype=torch.int64)
        rest, test = hold_out(images, labels, 400, seed=0)  # the same test set whatever split_seed is
        train, val = hold_out(*rest, 200, self.split_seed)
        return {"train": train, "val": val, "test": test}
