"""Routes to tickets that are compared with one another: lotteries on real data or on distilled sets."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lottery_callbacks.functional.steps import Step
from lottery_lightning.data import DistilledDataModule, DistilledSet, TensorDataModule
from lottery_lightning.experiments.distill_sets import cost_of
from lottery_lightning.experiments.lottery import Rule
from lottery_lightning.experiments.runs import Training
from lottery_lightning.experiments.store import read_json, write_json

RANDOM = "layerwise_random"
OWN = ("dense", RANDOM, "random", "retrained")  # what the experiment itself calls, or called, so


@dataclass(frozen=True)
class Route:
    """One way to find tickets: a lottery on a distilled set, or on real data.

    Args:
        distilled: file of a `DistilledSet` that its levels train on; None for the real data.
        batch_size: of the distilled images; None for that of the real ones.
        augmentation: of the distilled images, see `DistilledDataModule`.
        training: how its levels train; None for as on real data.
        model: the same network with another optimizer or schedule; None for those of the real data.
        rule: how they are pruned. `retrain: prunable_weights` is the partial rewind of the published code.
    """

    distilled: Path | None = None
    batch_size: int | None = None
    augmentation: str | None = None
    training: Training | None = None
    model: L.LightningModule | None = None
    rule: Rule = Rule()

    def __post_init__(self) -> None:
        if self.distilled is None and (self.batch_size, self.augmentation) != (None, None):
            raise ValueError("a route has batch_size or augmentation, which are of distilled images, and names no set")

    def data(self, real: TensorDataModule) -> TensorDataModule:
        """What its levels train on; its orders are drawn as those of `real` are."""
        if self.distilled is None:
            return real
        return DistilledDataModule(
            self.distilled,
            real,
            self.augmentation,
            batch_size=real.batch_size if self.batch_size is None else self.batch_size,
            eval_batch_size=real.eval_batch_size,
            data_seed=real.data_seed,
            data_order=real.data_order,
        )


def check_routes(routes: Mapping[str, Route]) -> str:
    """The step that all of them rewind to.

    Raises:
        ValueError: names that cannot be told apart or name no folder, or routes whose tickets cannot be compared.
    """
    folders = {re.sub(r"[^\w.-]+", "_", name) for name in routes}
    if not routes or len(folders | set(OWN)) < len(routes) + len(OWN):
        raise ValueError(
            f"routes: give one at least, of names that differ in a letter and are none of {', '.join(OWN)}"
        )
    if bad := [name for name in routes if not re.fullmatch(r"\w[\w ,-]*", name)]:
        raise ValueError(f"routes: {bad[0]!r} is the name of a folder: take letters, digits, spaces, commas, - and _")
    rules = {name: route.rule for name, route in routes.items()}
    for what in ("rate", "rewind"):
        if len(values := {str(getattr(rule, what)) for rule in rules.values()}) > 1:
            raise ValueError(f"routes have {what} {' and '.join(sorted(values))}: tickets are compared at one of them")
    for name, rule in rules.items():
        if rule.retrain not in ("weights", "prunable_weights"):
            raise ValueError(f"routes.{name} has retrain {rule.retrain}: copies start from step k, choose weights")
        if Step.parse(rule.rewind).count and routes[name].distilled:
            raise ValueError(f"routes.{name} rewinds to {rule.rewind}, which is no step of real data: rewind to 0it")
    return next(iter(rules.values())).rewind


def keep_identity(path: Path, folder: Path) -> None:
    """Write down in the route's folder which set it trains on, and what making that consumed, as far as is told.

    Raises:
        ValueError: the folder was begun with another set.
    """
    kept, digest = read_json(folder / "set.json"), sha256(path.read_bytes()).hexdigest()
    if kept and kept["sha256"] != digest:
        raise ValueError(
            f"{path} is another set than the one that {folder} began with: choose another run_dir, or restore it"
        )
    if not kept:
        making = read_json(cost_of(path)) or {}
        spent = {f"making_{key}": making.get(key) for key in ("points", "seconds")}
        write_json(folder / "set.json", {"sha256": digest, "factor": DistilledSet.load(path).factor} | spent)


def set_of(folder: Path) -> dict[str, Any]:
    """The `factor` of the route's set and what making it consumed: nothing, of a route on real data."""
    nothing = {"factor": 1, "making_points": 0, "making_seconds": 0.0}
    return read_json(folder / "set.json") or nothing
