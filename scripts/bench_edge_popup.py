"""What a step of edge-popup costs beside a step of training the same network densely.

    python scripts/bench_edge_popup.py
    python scripts/bench_edge_popup.py --networks conv4 --rounds 3 --scope global

Conv-4 at batch 128 and LeNet-300-100 at batch 64, on random images, by SGD with momentum and weight decay as in arXiv
1911.13299; several steps a visit and neither validation, logger nor checkpoint, so that little else than the step is
measured. Both variants run in one process in interleaved rounds, each on a network and an optimizer of its own; ratios
are within a round. "selection" is `functional.popup.highest` alone, over trained scores of each layer. The last line is
JSON.
"""

import argparse
import gc
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import lightning.pytorch as L
import torch
from bench_measuring import Laps, hidden, interleaved, repeated, say
from bench_training import machine, quotients, rounded, spread
from torch import Tensor, nn

from lottery_callbacks import EdgePopup
from lottery_callbacks.functional import popup
from lottery_lightning.data import TensorDataModule
from lottery_lightning.networks import Conv, Dense
from lottery_lightning.tasks import ImageClassifier

Figures = dict[str, Any]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int]] = {
    # what makes it, an image's shape, batch, steps, steps a visit
    "conv4": (partial(Conv, 4), (3, 32, 32), 128, 20, 10),
    "lenet": (partial(Dense, [784, 300, 100, 10]), (1, 28, 28), 64, 1000, 50),
}
BATCHES = 10


class RandomImages(TensorDataModule):
    """A few batches of random images in ten classes."""

    def __init__(self, shape: tuple[int, ...], batch_size: int) -> None:
        super().__init__(batch_size)
        self.shape = shape

    def load(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        generator, size = torch.Generator().manual_seed(0), BATCHES * self.batch_size
        return {"train": (torch.randn(size, *self.shape, generator=generator), torch.arange(size) % 10)}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def train(name: str, args: argparse.Namespace, *callbacks: L.Callback) -> float:
    """Microseconds a step of one fit, without what comes before its first step."""
    make, shape, batch, steps, visit = NETWORKS[name]
    steps, laps = args.steps or steps, Laps()
    torch.manual_seed(0)
    task = ImageClassifier(make(), sgd, steps_per_visit=visit)
    with hidden(), tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=steps,
            callbacks=[*callbacks, laps],
            accelerator="gpu" if args.device == "cuda" else "cpu",
            devices=1,
            precision=args.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        trainer.fit(task, datamodule=RandomImages(shape, batch))
    return 1e6 * laps.seconds["training"] / steps


def measure(name: str, args: argparse.Namespace) -> tuple[list[Figures], Figures]:
    """The rows of one network, and its figures."""
    found = EdgePopup(args.sparsity, args.scope)
    train(name, args, found)
    device = torch.device(args.device)
    scores = {layer: score.to(device) for layer, score in found.scores.items()}
    sizes = {layer: score.numel() for layer, score in scores.items()}
    select = partial(popup.highest, scores, popup.budget(sizes, args.sparsity, args.scope))
    timers = {
        "dense": lambda: train(name, args),
        "edge_popup": lambda: train(name, args, EdgePopup(args.sparsity, args.scope)),
        "selection": lambda: repeated(select),
    }
    us, _ = interleaved(name, timers, args.rounds, device)
    rows = [
        {"network": name, "variant": variant} | spread("us", taken) | spread("ratio", quotients(taken, us["dense"]))
        for variant, taken in us.items()
    ]
    figures: Figures = {f"{row['variant']}_us": row["us_median"] for row in rows}
    ratios = quotients(us["edge_popup"], us["dense"])
    return rows, figures | {
        "scores": sum(sizes.values()),
        "edge_popup_over_dense": median(ratios),
        "edge_popup_over_dense_range": [min(ratios), max(ratios)],
    }


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a fit; by default 20 of conv4 and 1,000 of lenet")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--scope", choices=("layerwise", "global"), default="layerwise")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    args = parser.parse_args(argv)
    names = args.networks.split(",")
    if unknown := set(names) - set(NETWORKS):
        parser.error(f"{', '.join(sorted(unknown))}: choose of {', '.join(NETWORKS)}")
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    found: Figures = {
        "device": machine(args.device),
        "rounds": args.rounds,
        "scope": args.scope,
        "precision": args.precision,
    }
    rows: list[Figures] = []
    for name in names:
        some, figures = measure(name, args)
        rows += some
        found |= {f"{name}.{key}": value for key, value in figures.items()}
    say("")
    print(f"{found['device']}; {args.rounds} interleaved rounds, {args.scope}, {args.precision}, median (min to max)\n")
    for row in rows:
        us = "{us_median:,.0f} ({us_min:,.0f} to {us_max:,.0f}) us".format(**row)
        ratio = "{ratio_median:.3f} ({ratio_min:.3f} to {ratio_max:.3f})".format(**row)
        print(f"{row['network']:<6} {row['variant']:<11} {us:>36} a step {ratio:>26} of dense")
    print(json.dumps({key: rounded(value) for key, value in found.items()}))
    return 0


if __name__ == "__main__":
    gc.freeze()
    sys.exit(main())
