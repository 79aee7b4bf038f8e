"""The sets of the distill experiment: images chosen of the real ones, or made of them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lottery_lightning import __version__
from lottery_lightning.data import DistilledSet, Preprocessing, TensorDataModule, decode
from lottery_lightning.data.augment import SiameseAugmentation
from lottery_lightning.distillation import Distiller, Matching, RealBatches, features
from lottery_lightning.distillation.selection import select
from lottery_lightning.experiments.distill_making import Making, Watched, fit
from lottery_lightning.experiments.finished import weights_of
from lottery_lightning.experiments.runs import Run, Training, stable_seed
from lottery_lightning.experiments.setting import Setting
from lottery_lightning.experiments.store import write_json

CHUNK = 500  # images embedded at a time


@dataclass(frozen=True)
class Images:
    """What images the sets have.

    Args:
        per_class: stored images of each class, in every set.
        factor: of the distilled set: each of its images decodes to factor^2, see `lottery_lightning.data.decode`.
        start: it begins as "random" real images (with a factor, factor^2 of them, reduced, in each) or as "noise".
        augmentation: strategy of `SiameseAugmentation`, of making the set and of training on any.
    """

    per_class: int = 10
    factor: int = 1
    start: Literal["random", "noise"] = "random"
    augmentation: str = "color_crop_cutout_flip_scale_rotate"

    def __post_init__(self) -> None:
        if self.per_class < 1 or self.factor < 1:
            raise ValueError(f"images: per_class={self.per_class}, factor={self.factor}: give 1 at least")
        if self.start not in ("random", "noise"):
            raise ValueError(f"images.start={self.start!r} is not known: choose random or noise")
        SiameseAugmentation(self.augmentation)


@dataclass(frozen=True)
class Sets:
    """Writes the sets of an experiment: the file, and beside it, as `.cost.json`, what finding it took.

    That is `seconds`, and `points`: how many real images went through a network, as often as they did. For herding and
    k-means the embedding, which they share, and the training of the network that embeds count too, for each in full.

    Args:
        data: the real data, its splits read; sets are of the training split.
        preprocessing: theirs.
        images: what images sets have.
        network: the network that sets are made for.
    """

    data: TensorDataModule
    preprocessing: Preprocessing
    images: Images
    network: nn.Module

    @property
    def real(self) -> tuple[Tensor, Tensor]:
        """The training split, on the CPU."""
        images, labels = self.data.splits["train"]
        return images.cpu(), labels.cpu()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Classes, stored images of each set, decoded ones of the distilled set."""
        classes = int(self.data.splits["train"][1].max()) + 1
        return classes, classes * self.images.per_class, classes * self.images.per_class * self.images.factor**2

    def check(self, needs_features: bool) -> None:
        """Refuse what `begin` and, where features are needed, `embed` would, before anything is trained.

        Raises:
            ValueError: a class has too few images, the factor does not divide their size, or the network has no
                features.
        """
        self.begin(0)
        if needs_features:
            features(copy.deepcopy(self.network), self.real[0][:2])

    def choose(self, name: str, seed: int, path: Path, embedded: Tensor | None, cost: Mapping[str, Any]) -> None:
        """Write a set of real images.

        Args:
            name: of `SELECTIONS`.
            seed: of the trial.
            path: of the file.
            embedded: features (n, d) of the training split; None for "random".
            cost: what these took.
        """
        began = perf_counter()
        images, labels = self.real
        chosen = select(name, labels, self.images.per_class, _draws(seed), embedded)
        found = {"seed": seed, "indices": chosen.tolist(), "real_points": cost["points"]} | self._provenance
        given = images[chosen], labels[chosen], self.preprocessing, self.images.augmentation, self._made_for, name
        write_json(cost_of(path), {**cost, "seconds": cost["seconds"] + perf_counter() - began})
        DistilledSet(*given, provenance=found).save(path)

    def embed(self, model: L.LightningModule, network: str, training: Training, finished: Run) -> Tensor:
        """The features (n, d) of the training images, not augmented, by the last weights of a finished run.

        Args:
            model: of that run; its weights stay as they are.
            network: its submodule whose features are meant.
            training: how it trained: features are computed on its device and in its precision.
            finished: the run.
        """
        setting = Setting(copy.deepcopy(model), self.data, training, 0, 0)
        setting.model.load_state_dict(weights_of(finished.run_dir / "final.ckpt"))
        part = setting.model.get_submodule(network).eval()
        chunks = self.data.splits["train"][0].split(CHUNK)
        return torch.cat([setting.on_images(lambda images: features(part, images), some).cpu() for some in chunks])

    def make(self, method: Matching, making: Making, seed: int, path: Path, watched: Watched) -> None:
        """Write the distilled set; a torn making goes on from its checkpoint, and leaves its `RESUME` folder.

        Args:
            method: what is matched.
            making: how long.
            seed: of the trial.
            path: of the file.
            watched: where and how it is shown.
        """
        drawn = stable_seed(seed, "making")
        given = self.images.factor, self.images.augmentation, drawn
        distiller = Distiller(copy.deepcopy(method), self.network, *self.begin(seed), *given)
        batches = RealBatches(*self.data.splits["train"], method.real_batch, drawn, making.max_steps)
        cost = fit(distiller, batches, self.preprocessing, making, watched)
        write_json(cost_of(path), cost)
        found = {"start": self.images.start, "seed": seed} | self._provenance
        distiller.distilled_set(self.preprocessing, self._made_for, found).save(path)

    def begin(self, seed: int) -> tuple[Tensor, Tensor]:
        """The images that making begins with, and their labels, class by class, on the CPU."""
        (images, labels), factor, real = self.real, self.images.factor, self.images.start == "random"
        decode(images[:1], factor)  # refuses a factor that does not divide their size
        chosen = select("random", labels, self.images.per_class * (factor**2 if real else 1), _draws(seed))
        if real:
            return tiled(images[chosen], factor), labels[chosen][:: factor**2]
        return torch.randn(len(chosen), *images.shape[1:], generator=_draws(seed)), labels[chosen]

    @property
    def _made_for(self) -> str:
        weights = sum(weights.numel() for weights in self.network.parameters())
        return f"{type(self.network).__name__} of {weights:,} parameters"

    @property
    def _provenance(self) -> dict[str, Any]:
        versions = {"lottery-lightning": __version__, "torch": torch.__version__}
        return {
            "data": type(self.data).__name__,
            "split_seed": self.data.split_seed,
            "val_size": getattr(self.data, "val_size", None),
        } | versions


def tiled(images: Tensor, factor: int) -> Tensor:
    """Every factor^2 images (n, channels, height, width), reduced by area, in one, as `decode` takes them apart."""
    if factor == 1:
        return images
    _, channels, height, width = images.shape
    small = interpolate(images, (height // factor, width // factor), mode="area")
    small = small.view(-1, factor, factor, channels, height // factor, width // factor)
    return small.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


def cost_of(path: Path) -> Path:
    """Where the cost of a set is kept."""
    return path.with_suffix(".cost.json")


def _draws(seed: int) -> torch.Generator:
    """What images are chosen or begun by: the same for each set of a trial."""
    return torch.Generator().manual_seed(stable_seed(seed, "images"))
