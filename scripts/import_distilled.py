"""Import a whitened distilled set of CIFAR-10 from an .npz, with its ZCA matrix computed anew from the real images.

    python scripts/import_distilled.py cifar10_10ipc.npz cifar10_10ipc.safetensors --data data

SOURCE holds `images` (n, 3, 32, 32) float, whitened already, and integer `labels` (n,). Published sets by trajectory
matching (arXiv 2203.11932) come without their matrix, and real images must go through it. Their published code makes
it of the pixels, in [0, 1] and not normalised, of all 50,000 training images, with eps = 0.1; so does this, by
`lottery_lightning.data.zca`. The 5,000 of them that this project holds out for validation took part in making the set
itself, so its matrix leaves them in as well. The table compares the distilled images with real ones so whitened:
distilled images may have more contrast (those of the public set of 10 images a class have 2.1 times the deviation), in
the same proportion in every channel; other proportions or correlations mean another preprocessing. It takes a minute of
one CPU.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lottery_lightning.data import CIFAR10, DistilledSet, Preprocessing, zca
from lottery_lightning.data.cifar10 import NORMALISED

PIXELS = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10, see CIFAR10's data_dir")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--normalised", action="store_true", help="whiten normalised images instead of pixels")
    parser.add_argument("--augmentation", default="color_crop_cutout_flip_scale_rotate")
    parser.add_argument("--network", default="ConvNet(depth=3, width=128)")
    parser.add_argument("--method", default="trajectory matching (imported)")
    given = parser.parse_args(argv)
    images, labels = read(given.source)
    data = CIFAR10(given.data, download=False)
    data.preprocessing = NORMALISED if given.normalised else PIXELS
    splits = data.load()
    real, held = torch.cat([splits[name][0] for name in ("train", "val")]), splits["val"][0]
    preprocessing = replace(data.preprocessing, whitening=zca(real, given.eps))
    kind = "normalised images" if given.normalised else "pixels in [0, 1]"
    distilled = DistilledSet(
        images,
        labels,
        preprocessing,
        augmentation=given.augmentation,
        network=given.network,
        method=given.method,
        provenance={
            "source": given.source.name,
            "data": "CIFAR10",
            "whitening": f"recomputed: ZCA, eps {given.eps:g}, of the {kind} of all {len(real)} training images",
            "validation": "the images held out for validation took part in making the set; the test images did not",
        },
    )
    # What real images go through, from pixels on: the clamp of `pixels` changes none of them.
    print(table({"distilled": images, "real": preprocessing(data.preprocessing.pixels(held))}))
    print(f"wrote {distilled.save(given.out)}: {len(images)} images, whitening {distilled.provenance['whitening']}")


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Images and labels of an .npz.

    Raises:
        ValueError: it is missing, torn or of another form.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = torch.from_numpy(file["images"]).float(), torch.from_numpy(file["labels"]).long()
        if images.shape != (len(labels), 3, 32, 32):
            raise ValueError(f"images {tuple(images.shape)}, labels {tuple(labels.shape)}")
    except Exception as error:  # OSError, BadZipFile, KeyError, ValueError, EOFError, TypeError
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is no distilled CIFAR-10 ({reason}): give an .npz with images and labels") from error
    return images, labels


def table(sets: dict[str, Tensor]) -> str:
    """Statistics of sets of images (n, channels, height, width), a line each, as Markdown."""
    lines = ["| images | n | mean | sd | sd by channel | neighbours' correlation | min | max |", "|---" * 8 + "|"]
    for name, images in sets.items():
        channels = ", ".join(f"{float(sd):.3f}" for sd in images.std((0, 2, 3)))
        numbers = f"{images.mean():.3f} | {images.std():.3f} | {channels} | {neighbours(images):.3f}"
        lines.append(f"| {name} | {len(images)} | {numbers} | {images.min():.2f} | {images.max():.2f} |")
    return "\n".join(lines)


def neighbours(images: Tensor) -> Tensor:
    """Correlation of horizontally adjacent pixels of a channel, over all images."""
    pairs = torch.stack([images[..., :-1].flatten(), images[..., 1:].flatten()])
    return torch.corrcoef(pairs)[0, 1]


if __name__ == "__main__":
    main()
