"""Training on a distilled set, validation and test on real data."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lottery_lightning.data.datamodule import Split, TensorDataModule
from lottery_lightning.data.distilled_set import DistilledSet


class DistilledDataModule(TensorDataModule):
    """Trains on the decoded images of a distilled set; validates and tests on those splits of real data.

    The validation images are those that `data` holds out of its real training set by its own `split_seed`; this
    module's has no effect. Training batches are augmented by draws of (data_seed, level, epoch, batch), as elsewhere.
    `data` is only read: splits that it has read already are taken, else they are read anew and the real training images
    let go.

    Args:
        path: file of the `DistilledSet`.
        data: the real data, of the same preprocessing.
        augmentation: strategy of `SiameseAugmentation`; None for the set's own, "" for none.
        **kwargs: see `TensorDataModule`.

    Raises:
        ValueError: (when data are first needed) the file is missing, torn or no distilled set, or does not go with
            `data`; in one line with the mend.
    """

    def __init__(
        self, path: str | Path, data: TensorDataModule, augmentation: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.data, self.strategy = Path(path), data, augmentation
        self.preprocessing = data.preprocessing

    @cached_property
    def distilled(self) -> DistilledSet:
        """The set in the file, read once."""
        return DistilledSet.load(self.path)

    @property
    def stored(self) -> int:
        """Number of stored images; `factor`^2 as many are trained on."""
        return len(self.distilled.images)

    def prepare_data(self) -> None:
        """Let `data` download what is missing."""
        self.data.prepare_data()

    def load(self) -> Mapping[str, Split]:
        distilled, real = self.distilled, self.data.splits or self.data.load()
        images, labels = real["train"]
        try:
            distilled.check(images, int(labels.max()) + 1, self.data.preprocessing)
            self._check_split(distilled)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        strategy = distilled.augmentation if self.strategy is None else self.strategy
        if strategy:
            from lottery_lightning.data.augment import SiameseAugmentation

            self.augmentation = SiameseAugmentation(strategy)
        train = distilled.decoded()
        network, method = distilled.network or "an unknown network", distilled.method or "an unknown method"
        rank_zero_info(
            f"{self.path.name}: {len(train[1])} images ({self.stored} stored) distilled for {network} by {method}"
        )
        return {"train": train, "val": real["val"], "test": real["test"]}

    def _check_split(self, distilled: DistilledSet) -> None:
        """Refuse a set whose images may have been chosen of, or matched to, this split's validation images."""
        data = self.data
        own = {"data": type(data).__name__, "split_seed": data.split_seed, "val_size": getattr(data, "val_size", None)}
        for key, value in own.items():
            if (there := distilled.provenance.get(key, value)) != value:
                raise ValueError(
                    f"the set was made of real data with {key} {there!r} and these have {value!r}, so that validation "
                    "images may be in it: give the same"
                )
