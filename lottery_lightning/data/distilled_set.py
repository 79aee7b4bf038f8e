"""Distilled sets: a few synthetic images to train on, with all that training on them must know, in one file."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_callbacks.ticket import write_atomically
from lottery_lightning.data.preprocessing import Preprocessing, Whitening

FORMAT = "distilled-set/1"
WORDS = ("augmentation", "network", "method", "factor", "provenance")


@dataclass(frozen=True, eq=False)
class DistilledSet:
    """Images to train on, and how.

    Attributes:
        images: (n, channels, height, width) float32, preprocessed, as stored.
        labels: (n,) int64, or (n, classes) float32 probabilities (soft labels).
        preprocessing: what the images, and real ones beside them, went through.
        augmentation: strategy of `SiameseAugmentation` that training on it uses; "" for none.
        network: what it was made for.
        method: how it was made.
        factor: each stored image decodes to factor^2 images, see `decode`.
        provenance: how it was found, as JSON primitives.

    Raises:
        ValueError: these do not fit one another, or a number is not finite.
    """

    images: Tensor
    labels: Tensor
    preprocessing: Preprocessing
    augmentation: str = ""
    network: str = ""
    method: str = ""
    factor: int = 1
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dim() != 4 or images.dtype != torch.float32 or len(images) == 0:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: give float32 (n, channels, h, w)")
        hard = labels.dim() == 1 and labels.dtype == torch.int64
        if len(labels) != len(images) or not (hard or (labels.dim() == 2 and labels.dtype == torch.float32)):
            raise ValueError(
                f"labels are {labels.dtype} {tuple(labels.shape)} for {len(images)} images: "
                "give int64 (n,) or float32 probabilities (n, classes)"
            )
        if bool((labels < 0).any()) or not (hard or torch.allclose(labels.sum(1), torch.ones(()).to(labels))):
            raise ValueError("labels must not be negative, and soft ones are probabilities that sum to 1")
        if not bool(images.isfinite().all()):
            raise ValueError("an image is not finite: its making diverged, lower its learning rate")
        _check_factor(images, self.factor)
        whitening = self.preprocessing.whitening
        sizes = {len(self.preprocessing.mean), len(self.preprocessing.deviation)}
        if sizes != {images.shape[1]} or (whitening and len(whitening.mean) != images[0].numel()):
            raise ValueError(f"the preprocessing is not one of images of {_size(images)}: give that of the real data")

    @property
    def classes(self) -> int:
        """Number of labels."""
        return self.labels.shape[1] if self.labels.dim() == 2 else int(self.labels.max()) + 1

    def decoded(self) -> tuple[Tensor, Tensor]:
        """The images and labels that training uses: `factor`^2 for each stored one, next to one another."""
        return decode(self.images, self.factor), self.labels.repeat_interleave(self.factor**2, 0)

    def check(self, images: Tensor, classes: int, preprocessing: Preprocessing | None) -> None:
        """Raise ValueError, in one line with the mend, where real data do not go with this set.

        Args:
            images: some of the real images, (_, channels, height, width).
            classes: number of their labels.
            preprocessing: what made them of pixels, `TensorDataModule.preprocessing`.
        """
        if images.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"distilled images are {_size(self.images)} and real ones {_size(images)}: "
                "give the data set that it was made of"
            )
        if classes != self.classes:
            raise ValueError(
                f"the distilled set has {self.classes} classes and the real data {classes}: "
                "give the data set that it was made of"
            )
        if preprocessing is None:
            raise ValueError("the real data's module states no `preprocessing`: set it to what its load() applies")
        if difference := self.preprocessing.difference(preprocessing):
            raise ValueError(
                f"the distilled images are preprocessed in another way than the real ones ({difference}): "
                "give the real data that of the set, as CIFAR10(whitening=FILE) does for a whitened one"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write atomically; equal sets give equal bytes."""
        tensors = {"images": self.images, "labels": self.labels}
        preprocessing = self.preprocessing
        if preprocessing.whitening:
            tensors |= {
                "whitening/mean": preprocessing.whitening.mean,
                "whitening/matrix": preprocessing.whitening.matrix,
            }
        header = {name: getattr(self, name) for name in WORDS}
        header |= {"format": FORMAT, "mean": preprocessing.mean, "deviation": preprocessing.deviation}
        try:
            text = json.dumps(header, sort_keys=True)
        except TypeError as error:
            raise ValueError(f"the provenance is not of JSON primitives ({error}): leave that out") from error
        data = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        return write_atomically(path, safetensors.torch.save(data, {"distilled": text}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DistilledSet":
        """Read a set; nothing in the file is executed.

        Raises:
            ValueError: the file is missing, torn, or no distilled set.
        """
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {}).get("distilled", "")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is missing or torn ({error}): restore it, or make the set again") from error
        try:
            header = json.loads(text)
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']}")
            whitening = None
            if "whitening/mean" in tensors:
                whitening = Whitening(tensors["whitening/mean"], tensors["whitening/matrix"])
            preprocessing = Preprocessing(tuple(header["mean"]), tuple(header["deviation"]), whitening)
            words = {name: header[name] for name in WORDS}
            return cls(tensors["images"], tensors["labels"], preprocessing, **words)
        except (ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split()) if text else "no header"
            raise ValueError(
                f"{path} is no distilled set of format {FORMAT} ({reason}): "
                "give a file that `train.py distill` or scripts/import_distilled.py wrote"
            ) from error


def decode(images: Tensor, factor: int) -> Tensor:
    """Each image cut into factor x factor tiles, each enlarged to the whole size (IDC, arXiv 2205.14959).

    Bilinear, corners not aligned. Differentiable; factor 1 gives `images` themselves. Tile (row, column) of image i is
    image factor^2 i + factor row + column of the result. The published code pads images whose size `factor` does not
    divide; here they are refused.

    Args:
        images: (n, channels, height, width).
        factor: tiles along each side.

    Returns:
        (factor^2 n, channels, height, width).

    Raises:
        ValueError: `factor` does not divide height and width.
    """
    _check_factor(images, factor)
    if factor == 1:
        return images
    n, channels, height, width = images.shape
    tiles = images.view(n, channels, factor, height // factor, factor, width // factor).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(-1, channels, height // factor, width // factor)
    return F.interpolate(tiles, (height, width), mode="bilinear", align_corners=False)


def _check_factor(images: Tensor, factor: int) -> None:
    if factor < 1 or any(side % factor for side in images.shape[2:]):
        raise ValueError(
            f"factor={factor} does not cut images of {_size(images)} into equal tiles: choose 1 or a divisor"
        )


def _size(images: Tensor) -> str:
    return " x ".join(map(str, images.shape[1:]))
